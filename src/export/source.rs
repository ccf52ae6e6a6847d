//! The tensors of a model to export, merged with adapters as they are read.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantune_adapters::BaseRows;
use quantune_adapters::delta::{Adapter, Lora, TokenRows};
use rayon::prelude::*;

use super::ExportError;
use super::chunk::StoredForm;
use crate::model::{ActiveAdapter, Config, ModelError, load};
use crate::ops::Values;
use crate::quant::{BlockType, FrozenMatrix, RowOrder};
use crate::text::{AddedTokenSpec, Tokenizer};
use crate::weights::{Checkpoint, Gguf, WeightsError};
use quantune_adapters::config::{EMBEDDING, HEAD};

/// A model to export.
#[derive(Debug)]
pub struct ExportSource<'a> {
    /// Its config.
    pub config: Config,
    /// Its tensors, in the order of the forward pass.
    pub tensors: Vec<ExportTensor<'a>>,
    pub(super) origin: ModelOrigin<'a>,
    /// Tokens that were added to its origin's vocabulary.
    pub(super) added: Vec<AddedTokenSpec>,
}

/// Where a model comes from: its tokenizer and other metadata are read there.
#[derive(Debug)]
pub(super) enum ModelOrigin<'a> {
    Gguf(&'a Gguf),
    Folder(PathBuf),
    /// Trained here from random weights; the folder holds its tokenizer.
    Fresh(PathBuf),
}

/// A tensor to export.
#[derive(Debug)]
pub struct ExportTensor<'a> {
    /// Hugging Face's name.
    pub name: String,
    /// Outermost dimension first: one or two.
    pub shape: Vec<usize>,
    base: BaseValues<'a>,
    /// Adapters that change it, with their weights.
    updates: Vec<(Arc<Adapter>, f64)>,
    /// Whether it is the embedding or the head, whose rows adapters may replace by token.
    end: Option<TokenMatrix>,
}

/// A matrix with a row for each token of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TokenMatrix {
    Embedding,
    Head {
        /// Whether it was tied to the embedding.
        was_tied: bool,
    },
}

impl TokenMatrix {
    fn rows(self, adapter: &Adapter) -> Option<&TokenRows> {
        match self {
            Self::Embedding => adapter.tokens.as_ref(),
            Self::Head { was_tied } => adapter.head_rows(was_tied).map(|(rows, _)| rows),
        }
    }
}

#[derive(Debug)]
enum BaseValues<'a> {
    /// Rows in Hugging Face's order; a vector is a column. Values lie `offset` above Hugging Face's.
    Stored {
        matrix: FrozenMatrix,
        order: RowOrder,
        offset: f32,
    },
    Memory(&'a [f32]),
}

/// A tensor in memory: Hugging Face's name, shape and values.
pub type NamedTensor<'a> = (&'a str, &'a [usize], &'a [f32]);

impl<'a> ExportSource<'a> {
    /// The model of a checkpoint with adapters merged in: `W + Σ weight · (W' - W)` with each
    /// adapter's `W' = W + scale · B · A`, with DoRA's magnitudes, or replaced as a whole. A tied head
    /// becomes untied where an adapter changes only one of the two.
    ///
    /// # Errors
    /// If the checkpoint is not a supported decoder, or an adapter has an update of a layer that the
    /// decoder does not have.
    pub fn open(checkpoint: &'a Checkpoint, active: &[ActiveAdapter]) -> Result<Self, ExportError> {
        Self::open_with_added_tokens(checkpoint, &[], active)
    }

    /// [`Self::open`] with added tokens. Rows that the checkpoint does not have start as the mean of its
    /// rows.
    ///
    /// # Errors
    /// As [`Self::open`], and if the tokenizer cannot be read.
    pub fn open_with_added_tokens(
        checkpoint: &'a Checkpoint,
        added: &[AddedTokenSpec],
        active: &[ActiveAdapter],
    ) -> Result<Self, ExportError> {
        let mut config = Config::read(checkpoint)?;
        if !added.is_empty() {
            let needed = Tokenizer::open_with(checkpoint, added)?.rows_needed();
            config.vocab_size = config.vocab_size.max(needed);
        }
        let tied = config.tie_word_embeddings;
        config.tie_word_embeddings = tied && !active.iter().any(|active| unties(&active.adapter));
        if checkpoint.contains("score.weight") && !checkpoint.contains("lm_head.weight") {
            let path = checkpoint.path().display();
            let reason = format!("{path} is a sequence classifier, which has no logits");
            return Err(ExportError::Inexpressible { form: "an exported model", reason });
        }
        let mut tensors = Vec::new();
        let mut faults = Vec::new();
        for (name, shape) in load::tensors(&config) {
            let head = name == head_name();
            let of = if head && tied { &embedding_name() } else { &name };
            let end = if head {
                Some(TokenMatrix::Head { was_tied: tied })
            } else {
                (name == embedding_name()).then_some(TokenMatrix::Embedding)
            };
            match stored(checkpoint, &config, of, &shape, end.is_some()) {
                Ok(base) => {
                    let updates = updates(&name, end, active);
                    tensors.push(ExportTensor { name, shape, base, updates, end });
                }
                Err(fault) => faults.push(fault),
            }
        }
        if !faults.is_empty() {
            faults.truncate(8);
            let (path, reason) = (checkpoint.path().display().to_string(), faults.join("; "));
            return Err(ModelError::Tensors { path, reason }.into());
        }
        for active in active {
            let known = |module: &str| tensors.iter().any(|t| t.module() == Some(module));
            let mut modules = active.adapter.modules.keys().chain(active.adapter.saved.keys());
            if let Some(module) = modules.find(|module| !known(module)) {
                let reason = format!("adapter {:?} has an update for it", active.adapter.name);
                return Err(ExportError::tensor(module, format!("no such layer, but {reason}")));
            }
            if active.adapter.score.is_some() {
                let name = &active.adapter.name;
                let reason = format!("adapter {name:?} is a reward model, which has no logits");
                return Err(ExportError::Inexpressible { form: "a merged model", reason });
            }
        }
        let origin = match checkpoint {
            Checkpoint::Gguf(gguf) => ModelOrigin::Gguf(gguf),
            Checkpoint::HuggingFace(folder) => ModelOrigin::Folder(folder.path().into()),
        };
        Ok(Self { config, tensors, origin, added: added.to_vec() })
    }

    /// A model in memory; `tokenizer` is the folder of its tokenizer.
    ///
    /// # Errors
    /// If the tensors are not exactly those of the config.
    pub fn from_memory(
        config: Config,
        tensors: impl IntoIterator<Item = NamedTensor<'a>>,
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
            let (base, updates) = (BaseValues::Memory(values), Vec::new());
            found.push(ExportTensor { name, shape, base, updates, end: None });
        }
        if let Some(name) = given.keys().min() {
            return Err(ExportError::tensor(name, "is an unknown tensor"));
        }
        let (origin, added) = (ModelOrigin::Fresh(tokenizer.into()), Vec::new());
        Ok(Self { config, tensors: found, origin, added })
    }
}

fn embedding_name() -> String {
    format!("{EMBEDDING}.weight")
}

fn head_name() -> String {
    format!("{HEAD}.weight")
}

/// Whether an adapter changes the embedding and a tied head differently.
fn unties(adapter: &Adapter) -> bool {
    let has = |module| adapter.modules.contains_key(module) || adapter.saved.contains_key(module);
    has(EMBEDDING) || has(HEAD) || adapter.head_tokens.is_some()
}

fn updates(
    name: &str,
    end: Option<TokenMatrix>,
    active: &[ActiveAdapter],
) -> Vec<(Arc<Adapter>, f64)> {
    let module = name.strip_suffix(".weight").unwrap_or_default();
    let has = |active: &&ActiveAdapter| {
        let adapter = &active.adapter;
        let whole = adapter.modules.contains_key(module) || adapter.saved.contains_key(module);
        whole || end.is_some_and(|end| end.rows(adapter).is_some())
    };
    active.iter().filter(has).map(|active| (active.adapter.clone(), active.weight)).collect()
}

/// A tensor of a checkpoint, or what is wrong with it.
fn stored<'a>(
    checkpoint: &Checkpoint,
    config: &Config,
    name: &str,
    shape: &[usize],
    may_grow: bool,
) -> Result<BaseValues<'a>, String> {
    let stored = load::stored_name(checkpoint, config, name);
    let tensor = checkpoint.tensor(&stored).map_err(|e| match e {
        WeightsError::MissingTensor { .. } => format!("no tensor {stored:?}"),
        other => other.to_string(),
    })?;
    let more = match (may_grow, &tensor.shape[..], shape) {
        (true, [own, width], [rows, cols]) if own < rows && width == cols => rows - own,
        _ => 0,
    };
    if more == 0 && tensor.shape != shape {
        return Err(format!("{stored} is {:?}, needed {shape:?}", tensor.shape));
    }
    let (rows, cols) = (shape[0] - more, shape.get(1).copied().unwrap_or(1));
    let order = load::stored_order(checkpoint, config, name);
    let matrix = FrozenMatrix::new(tensor.bytes, tensor.block_type, rows, cols);
    let matrix = matrix.and_then(|matrix| matrix.with_order(order));
    let matrix = matrix.and_then(|matrix| match more {
        0 => Ok(matrix),
        more => matrix.grown(more, &matrix.mean_row()),
    });
    let matrix = matrix.map_err(|e| format!("{stored}: {e}"))?;
    let offset = load::stored_offset(checkpoint, config, name);
    Ok(BaseValues::Stored { matrix, order, offset })
}

impl ExportTensor<'_> {
    /// The module path of the linear layer whose weight it is.
    fn module(&self) -> Option<&str> {
        self.name.strip_suffix(".weight").filter(|_| self.shape.len() == 2)
    }

    /// Number of rows; the length of a vector.
    pub fn rows(&self) -> usize {
        self.shape[0]
    }

    /// Number of columns; 1 for a vector.
    pub fn cols(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    /// Its block type in the checkpoint; `None` if it is from memory or an adapter changes it.
    pub fn stored_type(&self) -> Option<BlockType> {
        match &self.base {
            BaseValues::Stored { matrix, .. } if self.updates.is_empty() => {
                Some(matrix.block_type())
            }
            _ => None,
        }
    }

    /// Its bytes in the checkpoint, if they are in the wanted form and no adapter changes it.
    pub(super) fn verbatim(&self, wanted: &StoredForm) -> Option<&[u8]> {
        match &self.base {
            BaseValues::Stored { matrix, order, offset } => {
                let block_type = matrix.block_type();
                let form = StoredForm { block_type, order: *order, offset: *offset };
                let same = form == *wanted && matrix.more_rows().is_none();
                (same && self.updates.is_empty()).then(|| matrix.bytes())
            }
            BaseValues::Memory(_) => None,
        }
    }

    /// What [`Self::read`] adds to Hugging Face's values.
    pub(super) fn offset(&self) -> f32 {
        match &self.base {
            BaseValues::Stored { offset, .. } => *offset,
            BaseValues::Memory(_) => 0.0,
        }
    }

    /// Reads merged rows in Hugging Face's order into `out (rows, cols)` F32. Updates are summed in f64.
    ///
    /// # Errors
    /// If an adapter's tensors have another shape.
    ///
    /// # Panics
    /// If the range exceeds the rows or `out` has another size.
    pub fn read(&self, rows: Range<usize>, out: &mut [f32]) -> Result<(), ExportError> {
        let cols = self.cols();
        assert_eq!(out.len(), rows.len() * cols);
        self.read_base(rows.clone(), out);
        if self.updates.is_empty() {
            return Ok(());
        }
        let mut updates = Vec::new();
        for (adapter, weight) in &self.updates {
            updates.push(TensorUpdate::new(self, adapter, *weight)?);
        }
        let updates: Vec<TensorUpdateView> = updates.iter().map(TensorUpdate::borrowed).collect();
        out.par_chunks_exact_mut(cols).zip(rows).for_each(|(out, row)| {
            let base: Vec<f64> = out.iter().map(|v| f64::from(*v)).collect();
            let mut sum = base.clone();
            for update in &updates {
                let mut delta = vec![0f64; cols];
                update.add(row, &base, &mut delta);
                sum.iter_mut().zip(delta).for_each(|(sum, d)| *sum += update.weight * d);
            }
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
        });
        Ok(())
    }

    fn read_base(&self, rows: Range<usize>, out: &mut [f32]) {
        let cols = self.cols();
        match &self.base {
            BaseValues::Stored { matrix, .. } => matrix.read_tile(rows, 0..cols, out),
            BaseValues::Memory(values) => {
                out.copy_from_slice(&values[rows.start * cols..rows.end * cols]);
            }
        }
    }
}

/// The weight without adapters.
impl BaseRows for ExportTensor<'_> {
    fn rows(&self) -> usize {
        self.shape[0]
    }

    fn cols(&self) -> usize {
        self.shape.get(1).copied().unwrap_or(1)
    }

    fn read(&self, rows: Range<usize>, out: &mut [f32]) {
        self.read_base(rows, out);
    }
}

/// How an adapter changes a tensor.
struct TensorUpdate<'a> {
    weight: f64,
    low: Option<LowRankUpdate<'a>>,
    whole: Option<Values<'a>>,
    tokens: Option<(&'a [u32], Values<'a>)>,
}

struct LowRankUpdate<'a> {
    a: Values<'a>,
    b: Values<'a>,
    lora: &'a Lora,
    /// DoRA's `m / ‖·‖` of each row.
    scales: Option<Vec<f32>>,
    /// Whether the rows are inputs, as in an embedding: A and B swap roles.
    embedding: bool,
}

impl<'a> TensorUpdate<'a> {
    fn new(tensor: &ExportTensor, adapter: &'a Adapter, weight: f64) -> Result<Self, ExportError> {
        let (rows, cols) = (ExportTensor::rows(tensor), ExportTensor::cols(tensor));
        let module = tensor.module().expect("only matrices have updates");
        let fits = |found: [usize; 2], what: &str| {
            if found == [rows, cols] {
                Ok(())
            } else {
                let reason = format!("an adapter's {what} is {found:?}, needed [{rows}, {cols}]");
                Err(ExportError::tensor(&tensor.name, reason))
            }
        };
        let low = match adapter.modules.get(module) {
            Some(lora) => {
                let embedding = module == EMBEDDING;
                let (out, of_in) = (lora.out_features(), lora.in_features());
                fits(if embedding { [of_in, out] } else { [out, of_in] }, "update")?;
                let (a, b) = (Values::of(lora.a.as_tensor())?, Values::of(lora.b.as_tensor())?);
                let scales = lora.row_scales(tensor)?;
                Some(LowRankUpdate { a, b, lora, scales, embedding })
            }
            None => None,
        };
        let whole = match adapter.saved.get(module) {
            Some(own) => {
                fits(own.dims2()?.into(), "matrix")?;
                Some(Values::of(own.as_tensor())?)
            }
            None => None,
        };
        let tokens = match tensor.end.and_then(|end| end.rows(adapter)) {
            Some(own) => {
                let width = own.rows.dim(1)?;
                fits([rows, width], "token rows for a matrix that")?;
                Some((&own.indices[..], Values::of(own.rows.as_tensor())?))
            }
            None => None,
        };
        Ok(Self { weight, low, whole, tokens })
    }

    fn borrowed(&self) -> TensorUpdateView<'_> {
        let low = self.low.as_ref().map(|low| LowRankView {
            a: &low.a,
            b: &low.b,
            r: low.lora.r(),
            scale: low.lora.scale,
            scales: low.scales.as_deref(),
            embedding: low.embedding,
        });
        let tokens = self.tokens.as_ref().map(|(indices, rows)| (*indices, &**rows));
        TensorUpdateView { weight: self.weight, low, whole: self.whole.as_deref(), tokens }
    }
}

/// A [`TensorUpdate`] that threads can share.
struct TensorUpdateView<'a> {
    weight: f64,
    low: Option<LowRankView<'a>>,
    whole: Option<&'a [f32]>,
    tokens: Option<(&'a [u32], &'a [f32])>,
}

struct LowRankView<'a> {
    a: &'a [f32],
    b: &'a [f32],
    r: usize,
    scale: f64,
    scales: Option<&'a [f32]>,
    embedding: bool,
}

impl TensorUpdateView<'_> {
    /// Adds the change of one row: the row with the adapter minus the row of the base.
    fn add(&self, row: usize, base: &[f64], delta: &mut [f64]) {
        let cols = base.len();
        if let Some(low) = &self.low {
            let (a, b, r) = (low.a, low.b, low.r);
            if low.embedding {
                let rows = a.len() / r;
                for (delta, b) in delta.iter_mut().zip(b.chunks_exact(r)) {
                    let a = a[row..].iter().step_by(rows);
                    let sum: f64 =
                        b.iter().zip(a).map(|(b, a)| f64::from(*b) * f64::from(*a)).sum();
                    *delta += low.scale * sum;
                }
            } else {
                for (k, b) in b[row * r..(row + 1) * r].iter().enumerate() {
                    let by = low.scale * f64::from(*b);
                    let a = &a[k * cols..(k + 1) * cols];
                    delta.iter_mut().zip(a).for_each(|(d, a)| *d += by * f64::from(*a));
                }
            }
            if let Some(scales) = low.scales {
                let s = f64::from(scales[row]);
                delta.iter_mut().zip(base).for_each(|(d, w)| *d = s * (w + *d) - w);
            }
        }
        let mut replace = |own: &[f32]| {
            let both = own.iter().zip(base);
            delta.iter_mut().zip(both).for_each(|(d, (own, w))| *d += f64::from(*own) - w);
        };
        if let Some(own) = self.whole {
            replace(&own[row * cols..(row + 1) * cols]);
        }
        if let Some((indices, rows)) = self.tokens
            && let Ok(at) = indices.binary_search(&(row as u32))
        {
            replace(&rows[at * cols..(at + 1) * cols]);
        }
    }
}
