//! The tensors of a model on its way out, merged as they are read.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantune_adapters::delta::Adapter;
use rayon::prelude::*;

use super::ExportError;
use crate::model::{Config, ModelError, Worn, load};
use crate::ops::Values;
use crate::quant::{BlockType, FrozenMatrix, RowOrder};
use crate::weights::{Checkpoint, Gguf, WeightsError};

/// A model on its way out.
#[derive(Debug)]
pub struct Source<'a> {
    /// Its properties.
    pub config: Config,
    /// Its tensors, in the order of the forward pass.
    pub tensors: Vec<SourceTensor<'a>>,
    pub(super) origin: Origin<'a>,
}

/// Where a model came from, and with it its tokenizer and what else is known of it.
#[derive(Debug)]
pub(super) enum Origin<'a> {
    Gguf(&'a Gguf),
    Folder(PathBuf),
    /// Made here; the folder holds its tokenizer.
    Fresh(PathBuf),
}

/// A tensor on its way out.
#[derive(Debug)]
pub struct SourceTensor<'a> {
    /// Hugging Face's name.
    pub name: String,
    /// Outermost dimension first: one or two.
    pub shape: Vec<usize>,
    base: Base<'a>,
    /// Adapters that have an update for it, each with its weight.
    updates: Vec<(Arc<Adapter>, f64)>,
}

#[derive(Debug)]
enum Base<'a> {
    /// Rows in Hugging Face's order; a vector is a column.
    Stored {
        matrix: FrozenMatrix,
        order: RowOrder,
    },
    Memory(&'a [f32]),
}

/// A tensor in memory: Hugging Face's name, shape and values.
pub type Named<'a> = (&'a str, &'a [usize], &'a [f32]);

impl<'a> Source<'a> {
    /// The model of a checkpoint with adapters merged in: `W + Σ weight · scale · B · A`.
    ///
    /// # Errors
    /// If the checkpoint is no decoder, or an adapter sits on what it has not.
    pub fn open(checkpoint: &'a Checkpoint, worn: &[Worn]) -> Result<Self, ExportError> {
        let config = Config::read(checkpoint)?;
        if checkpoint.contains("score.weight") && !checkpoint.contains("lm_head.weight") {
            let path = checkpoint.path().display();
            let reason = format!("{path} is a sequence classifier, which has no logits");
            return Err(ExportError::Inexpressible { form: "an exported model", reason });
        }
        let mut tensors = Vec::new();
        let mut faults = Vec::new();
        for (name, shape) in load::tensors(&config) {
            match stored(checkpoint, &config, &name, &shape) {
                Ok(base) => {
                    let updates = updates(&name, worn);
                    tensors.push(SourceTensor { name, shape, base, updates });
                }
                Err(fault) => faults.push(fault),
            }
        }
        if !faults.is_empty() {
            faults.truncate(8);
            let (path, reason) = (checkpoint.path().display().to_string(), faults.join("; "));
            return Err(ModelError::Tensors { path, reason }.into());
        }
        for worn in worn {
            let known = |module: &str| tensors.iter().any(|t| t.module() == Some(module));
            let mut modules = worn.adapter.modules.keys();
            if let Some(module) = modules.find(|module| !known(module)) {
                let reason = format!("adapter {:?} has an update for it", worn.adapter.name);
                return Err(ExportError::tensor(module, format!("no such layer, but {reason}")));
            }
            if worn.adapter.score.is_some() {
                let name = &worn.adapter.name;
                let reason = format!("adapter {name:?} is a reward model: its score is no logit");
                return Err(ExportError::Inexpressible { form: "a merged model", reason });
            }
        }
        let origin = match checkpoint {
            Checkpoint::Gguf(gguf) => Origin::Gguf(gguf),
            Checkpoint::HuggingFace(folder) => Origin::Folder(folder.path().into()),
        };
        Ok(Self { config, tensors, origin })
    }

    /// A model in memory, with the folder of its tokenizer.
    ///
    /// # Errors
    /// If the tensors are not exactly those of the config.
    pub fn from_memory(
        config: Config,
        tensors: impl IntoIterator<Item = Named<'a>>,
        tokenizer: &Path,
    ) -> Result<Self, ExportError> {
        let mut given: std::collections::HashMap<&str, (&[usize], &[f32])> =
            tensors.into_iter().map(|(name, shape, values)| (name, (shape, values))).collect();
        let mut found = Vec::new();
        for (name, shape) in load::tensors(&config) {
            let Some((given_shape, values)) = given.remove(name.as_str()) else {
                return Err(ExportError::tensor(&name, "is missing"));
            };
            if given_shape != shape || values.len() != shape.iter().product::<usize>() {
                let n = values.len();
                let reason = format!("is {given_shape:?} with {n} values, needed {shape:?}");
                return Err(ExportError::tensor(&name, reason));
            }
            let (base, updates) = (Base::Memory(values), Vec::new());
            found.push(SourceTensor { name, shape, base, updates });
        }
        if let Some(name) = given.keys().min() {
            return Err(ExportError::tensor(name, "is none of this model's"));
        }
        Ok(Self { config, tensors: found, origin: Origin::Fresh(tokenizer.into()) })
    }
}

fn updates(name: &str, worn: &[Worn]) -> Vec<(Arc<Adapter>, f64)> {
    let module = name.strip_suffix(".weight").unwrap_or_default();
    let has = |worn: &&Worn| worn.adapter.modules.contains_key(module);
    worn.iter().filter(has).map(|worn| (worn.adapter.clone(), worn.weight)).collect()
}

/// A tensor of a checkpoint, or what is wrong with it.
fn stored<'a>(
    checkpoint: &Checkpoint,
    config: &Config,
    name: &str,
    shape: &[usize],
) -> Result<Base<'a>, String> {
    let stored = load::stored_name(checkpoint, name);
    let tensor = checkpoint.tensor(&stored).map_err(|e| match e {
        WeightsError::MissingTensor { .. } => format!("no tensor {stored:?}"),
        other => other.to_string(),
    })?;
    if tensor.shape != shape {
        return Err(format!("{stored} is {:?}, needed {shape:?}", tensor.shape));
    }
    let (rows, cols) = (shape[0], shape.get(1).copied().unwrap_or(1));
    let order = load::stored_order(checkpoint, config, name);
    let matrix = FrozenMatrix::new(tensor.bytes, tensor.block_type, rows, cols);
    let matrix = matrix.and_then(|matrix| matrix.with_order(order));
    let matrix = matrix.map_err(|e| format!("{stored}: {e}"))?;
    Ok(Base::Stored { matrix, order })
}

impl SourceTensor<'_> {
    /// The linear layer it is the weight of.
    fn module(&self) -> Option<&str> {
        self.name.strip_suffix(".weight").filter(|_| self.shape.len() == 2)
    }

    /// Rows; of a vector, its values.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Columns; of a vector, one.
    pub fn cols(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Its type in the checkpoint, where it comes from one and no adapter changes it.
    pub fn stored_type(&self) -> Option<BlockType> {
        match &self.base {
            Base::Stored { matrix, .. } if self.updates.is_empty() => Some(matrix.block_type()),
            _ => None,
        }
    }

    /// Its bytes as the checkpoint has them in this row order, where no adapter changes it.
    pub(super) fn verbatim(&self, of: BlockType, in_order: RowOrder) -> Option<&[u8]> {
        match &self.base {
            Base::Stored { matrix, order } => {
                let same = matrix.block_type() == of && *order == in_order;
                (same && self.updates.is_empty()).then(|| matrix.bytes())
            }
            Base::Memory(_) => None,
        }
    }

    /// Reads rows in Hugging Face's order, merged: `out (rows, cols)`. Sums of updates are `f64`.
    ///
    /// # Panics
    /// If the rows leave the tensor or `out` has another size: a caller's bug.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ExportError> {
        let cols = self.cols();
        assert_eq!(out.len(), rows.len() * cols);
        match &self.base {
            Base::Stored { matrix, .. } => matrix.read_tile(rows.clone(), 0..cols, out),
            Base::Memory(values) => {
                out.copy_from_slice(&values[rows.start * cols..rows.end * cols]);
            }
        }
        if self.updates.is_empty() {
            return Ok(());
        }
        let module = self.module().expect("only layers have updates");
        let loras = self.updates.iter().map(|(adapter, weight)| (&adapter.modules[module], weight));
        let mut terms = Vec::new();
        for (lora, weight) in loras {
            let fits = (lora.out_features(), lora.in_features()) == (self.rows(), cols);
            if !fits {
                let (found, needed) = ([lora.out_features(), lora.in_features()], &self.shape);
                let reason = format!("an adapter's update is {found:?}, needed {needed:?}");
                return Err(ExportError::tensor(&self.name, reason));
            }
            let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
            terms.push((a, b, lora.r(), weight * lora.scale));
        }
        let terms: Vec<(&[f32], &[f32], usize, f64)> =
            terms.iter().map(|(a, b, r, scale)| (&**a, &**b, *r, *scale)).collect();
        out.par_chunks_exact_mut(cols).zip(rows).for_each(|(out, row)| {
            let mut sum: Vec<f64> = out.iter().map(|v| f64::from(*v)).collect();
            for &(a, b, r, scale) in &terms {
                for (k, b) in b[row * r..(row + 1) * r].iter().enumerate() {
                    let by = scale * f64::from(*b);
                    let a = &a[k * cols..(k + 1) * cols];
                    sum.iter_mut().zip(a).for_each(|(sum, a)| *sum += by * f64::from(*a));
                }
            }
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
        });
        Ok(())
    }
}
