//! Model files: checkpoints, the final model, and its export.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::export::{
    ExportError, ExportSource, FileType, Recipe, VerifyBounds, expressible, verify, write_folder,
    write_gguf,
};
use crate::model::full::FullModel;
use crate::monitor::Monitor;
use crate::ops::Values;
use crate::quant::BlockType;
use crate::text::convert;
use crate::train::TrainError;
use crate::train::run_dir::RunDir;
use crate::train::settings::{FloatType, PretrainSettings};
use crate::weights::{Checkpoint, write_atomically};

/// The model's folder in a run and in each of its checkpoints.
pub(super) const MODEL: &str = "model";

/// Writes a model to files.
pub(super) struct ModelWriter<'a> {
    /// The model.
    pub model: &'a FullModel,
    /// The folder of its tokenizer.
    pub tokenizer_folder: &'a Path,
    /// The settings of the run.
    pub settings: &'a PretrainSettings,
}

impl ModelWriter<'_> {
    /// Calls `with` with the current model as an export source.
    fn written<T>(
        &self,
        with: impl FnOnce(&ExportSource) -> Result<T, ExportError>,
    ) -> Result<T, TrainError> {
        let model = self.model;
        let parameters = model.on_cpu()?;
        let values = parameters.iter().map(Values::of);
        let values: Vec<Values> = values.collect::<candle_core::Result<_>>()?;
        let named = model.names.iter().zip(&model.parameters).zip(&values);
        let named = named.map(|((name, var), values)| (name.as_str(), var.dims(), &values[..]));
        let source = ExportSource::from_memory(model.config.clone(), named, self.tokenizer_folder)?;
        Ok(with(&source)?)
    }

    /// Writes a Hugging Face folder.
    pub(super) fn write_folder(&self, folder: &Path, of: FloatType) -> Result<(), TrainError> {
        let block_type = match of {
            FloatType::F32 => BlockType::F32,
            FloatType::F16 => BlockType::F16,
            FloatType::Bf16 => BlockType::BF16,
        };
        self.written(|source| write_folder(source, block_type, folder))?;
        Ok(())
    }

    fn write_gguf(&self, of: FileType, path: &Path) -> Result<(), TrainError> {
        self.written(|source| write_gguf(source, &Recipe::new(of), None, path))?;
        Ok(())
    }

    /// Writes and verifies the export, if requested. Returns its path.
    pub(super) fn write_export(
        &self,
        export_type: FileType,
        folder: &Path,
        monitor: Monitor<'_>,
    ) -> Result<Option<PathBuf>, TrainError> {
        let path = &self.settings.export;
        if path.as_os_str().is_empty() {
            return Ok(None);
        }
        self.write_gguf(export_type, path)?;
        read_back(folder, self.settings, export_type, monitor)?;
        Ok(Some(path.clone()))
    }
}

/// Loads an export and compares it with the model's folder.
fn read_back(
    folder: &Path,
    settings: &PretrainSettings,
    of: FileType,
    monitor: Monitor<'_>,
) -> Result<(), TrainError> {
    // Both were rounded separately, so the tolerance is that of the coarser type.
    let bounds = match (of, settings.dtype) {
        (FileType::F32 | FileType::F16, FloatType::Bf16) => VerifyBounds::BF16,
        (FileType::F32, FloatType::F16) => VerifyBounds::F16,
        (of, _) => VerifyBounds::of(of),
    };
    let verified = verify(&Checkpoint::open(folder)?, &[], &settings.export, bounds)?;
    if let Some(warning) = verified.warning(&settings.export) {
        monitor.warn(warning);
    }
    Ok(())
}

/// The folder of the tokenizer; the tokenizer of a GGUF is converted into the run directory.
pub(super) fn tokenizer_folder(
    settings: &PretrainSettings,
    files: Option<Vec<(&'static str, String)>>,
    run: &RunDir,
) -> Result<PathBuf, TrainError> {
    let Some(files) = files else { return Ok(own_tokenizer(settings).into()) };
    let folder = run.file("tokenizer");
    let io = |source| TrainError::Io { path: folder.clone(), source };
    std::fs::create_dir_all(&folder).map_err(io)?;
    for (name, text) in files {
        write_atomically(folder.join(name), |file| file.write_all(text.as_bytes()))?;
    }
    Ok(folder)
}

/// The folder that the tokenizer is read from, if it is not in a GGUF.
fn own_tokenizer(settings: &PretrainSettings) -> &Path {
    if settings.tokenizer.as_os_str().is_empty() { &settings.base } else { &settings.tokenizer }
}

/// Checks before training that the result can be written in the requested formats and places.
pub(super) fn check_writable(
    settings: &PretrainSettings,
    model: &FullModel,
    converted: bool,
) -> Result<(), TrainError> {
    expressible(&model.config)?;
    let path = &settings.export;
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let same = |other: &Path| {
        path.canonicalize().is_ok_and(|p| other.canonicalize().is_ok_and(|o| p == o))
    };
    if same(&settings.base) {
        let fault = format!("--export is {}, the base itself", path.display());
        return Err(TrainError::Settings(fault));
    }
    let own = path.starts_with(&settings.out); // which is created with the run
    if !own && !path.parent().is_some_and(Path::is_dir) {
        let fault = format!("--export is {}, whose folder does not exist", path.display());
        return Err(TrainError::Settings(fault));
    }
    if !converted {
        convert::to_gguf(own_tokenizer(settings), model.config.vocab_size, &[])?;
    }
    Ok(())
}
