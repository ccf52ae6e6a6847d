//! `quantune merge` and `quantune quantize`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::combining::Combining;
use super::{UsageError, load_adapters, paths, read_text, to_json};
use crate::export::{
    ExportSource, FileType, Importance, Recipe, VerifyBounds, Written, imatrix,
    load_with_added_tokens, quality_report, types, verify_with_added_tokens, write_folder,
    write_gguf,
};
use crate::model::{ActiveAdapter, Decoder};
use crate::ops::Compute;
use crate::quant::BlockType;
use crate::text::{AddedTokenSpec, Special, Tokenizer, added_by_adapters};
use crate::train::settings::AdapterPath;
use crate::weights::Checkpoint;

#[derive(Debug, clap::Args)]
pub(super) struct Merge {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// PEFT adapter folder or GGUF LoRA, PATH or PATH=WEIGHT; can be repeated
    #[arg(long, required = true)]
    adapter: Vec<AdapterPath>,
    #[command(flatten)]
    combining: Combining,
    /// Output: a file that ends in .gguf, or a Hugging Face folder
    #[arg(long)]
    out: PathBuf,
    /// Type: F32, F16 or BF16, and for a GGUF also Q8_0, Q4_0 to Q6_K and mixtures such as Q4_K_M
    /// [default: the type of the base if it is F32, F16 or BF16, else F16]
    #[arg(long = "type", value_name = "TYPE")]
    file_type: Option<FileType>,
    #[command(flatten)]
    options: OutputOptions,
}

#[derive(Debug, clap::Args)]
pub(super) struct Quantize {
    /// Base model: a GGUF file or a Hugging Face folder
    #[arg(long)]
    base: PathBuf,
    /// Output GGUF file
    #[arg(long)]
    out: PathBuf,
    /// F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K_S, Q3_K_M, Q3_K_L, Q4_K_S, Q4_K_M,
    /// Q5_K_S, Q5_K_M or Q6_K
    #[arg(long = "type", value_name = "TYPE")]
    file_type: FileType,
    #[command(flatten)]
    options: OutputOptions,
}

/// Options of the written model and its quality report.
#[derive(Debug, clap::Args)]
struct OutputOptions {
    /// Use the same type for all matrices, without a mixture
    #[arg(long)]
    pure: bool,
    /// Type of lm_head, and of the embedding if tied
    #[arg(long, value_name = "TYPE", value_parser = types::block_type)]
    output_tensor_type: Option<BlockType>,
    /// Type of the embedding
    #[arg(long, value_name = "TYPE", value_parser = types::block_type)]
    token_embedding_type: Option<BlockType>,
    /// Type of tensors whose GGUF name matches a regular expression, such as attn_v=Q8_0; can be repeated,
    /// the first match counts
    #[arg(long, value_name = "PATTERN=TYPE")]
    tensor_type: Vec<types::TypeRule>,
    /// Importance matrix of llama.cpp (.gguf, or .dat of older versions)
    #[arg(long, value_name = "FILE", conflicts_with = "imatrix_data")]
    imatrix: Option<PathBuf>,
    /// Calibration text: measure an importance matrix on it
    #[arg(long, value_name = "TEXT")]
    imatrix_data: Option<PathBuf>,
    /// Evaluation text of a quality report: perplexity, and KL divergence from the model in full precision
    #[arg(long, value_name = "TEXT")]
    report: Option<PathBuf>,
    /// Reference model of the quality report: the base in full precision [default: --base]
    #[arg(long, value_name = "BASE", requires = "report")]
    reference: Option<PathBuf>,
    /// Chunk size of --report and --imatrix-data in tokens [default: 512]
    #[arg(long)]
    n_ctx: Option<usize>,
}

impl OutputOptions {
    fn recipe(&self, file_type: FileType) -> Recipe {
        Recipe {
            file_type,
            pure: self.pure,
            output_tensor_type: self.output_tensor_type,
            token_embedding_type: self.token_embedding_type,
            tensor_types: self.tensor_type.clone(),
        }
    }

    /// A flag that only applies to a GGUF, if one is given.
    fn of_gguf_only(&self) -> Option<&'static str> {
        let flags = [
            ("--pure", self.pure),
            ("--output-tensor-type", self.output_tensor_type.is_some()),
            ("--token-embedding-type", self.token_embedding_type.is_some()),
            ("--tensor-type", !self.tensor_type.is_empty()),
            ("--imatrix", self.imatrix.is_some()),
            ("--imatrix-data", self.imatrix_data.is_some()),
        ];
        flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag)
    }

    fn importance(
        &self,
        base: &Checkpoint,
        added: &[AddedTokenSpec],
        active: &[ActiveAdapter],
    ) -> Result<Option<Importance>> {
        if let Some(path) = &self.imatrix {
            return Ok(Some(imatrix::read(path)?));
        }
        let Some(text) = &self.imatrix_data else { return Ok(None) };
        let decoder = load_with_added_tokens(base, added)?;
        let (tokens, bos) = tokens(base, added, text)?;
        let n_ctx = self.n_ctx(&decoder);
        let mut importance = imatrix::measure(&decoder, active, &tokens, n_ctx, bos)
            .with_context(|| text.display().to_string())?;
        importance.dataset = Some(text.display().to_string());
        Ok(Some(importance))
    }

    fn n_ctx(&self, decoder: &Decoder) -> usize {
        self.n_ctx.unwrap_or(512).min(decoder.config.max_position_embeddings)
    }
}

/// Tokens of a text, and BOS if the tokenizer adds it.
fn tokens(
    base: &Checkpoint,
    added: &[AddedTokenSpec],
    text: &Path,
) -> Result<(Vec<u32>, Option<u32>)> {
    let tokenizer = Tokenizer::open_with(base, added)?;
    let ids = tokenizer.encode(&read_text(text)?, Special::AsText)?;
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    Ok((tokenizer.with_bos(ids), bos))
}

fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

/// The float type that represents the base without loss.
fn own_type(source: &ExportSource) -> FileType {
    match source.tensors[0].stored_type() {
        Some(BlockType::F32) => FileType::F32,
        Some(BlockType::BF16) => FileType::BF16,
        _ => FileType::F16,
    }
}

impl Merge {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        let base = Checkpoint::open(&self.base)?;
        let added = added_by_adapters(&base, &paths(&self.adapter))?;
        let decoder = load_with_added_tokens(&base, &added)?;
        let active = self.combining.combine(load_adapters(&self.adapter, &decoder)?)?;
        drop(decoder);
        let source = ExportSource::open_with_added_tokens(&base, &added, &active)?;
        let file_type = self.file_type.unwrap_or_else(|| own_type(&source));
        let sizes = self.adapter.iter().map(|adapter| bytes_of(&adapter.path));
        let adapter_bytes = sizes.sum();
        let (base, active) = (&base, &active[..]);
        let job = ExportJob { base, added, active, source, out: &self.out, options: &self.options };
        job.run(file_type, adapter_bytes, json)
    }
}

impl Quantize {
    pub(super) fn run(self, json: bool) -> Result<Value> {
        if !is_gguf(&self.out) {
            let out = self.out.display();
            return Err(
                UsageError(format!("--out is {out}, needed a file that ends in .gguf")).into()
            );
        }
        let base = Checkpoint::open(&self.base)?;
        let source = ExportSource::open(&base, &[])?;
        let (base, added, active) = (&base, Vec::new(), &[][..]);
        let job = ExportJob { base, added, active, source, out: &self.out, options: &self.options };
        job.run(self.file_type, 0, json)
    }
}

/// One export of a model.
struct ExportJob<'a> {
    base: &'a Checkpoint,
    /// Tokens that the adapters added.
    added: Vec<AddedTokenSpec>,
    active: &'a [ActiveAdapter],
    source: ExportSource<'a>,
    out: &'a Path,
    options: &'a OutputOptions,
}

impl ExportJob<'_> {
    fn run(&self, file_type: FileType, adapter_bytes: u64, json: bool) -> Result<Value> {
        let (out, options) = (self.out, self.options);
        if same_place(self.base.path(), out) {
            bail!("--out is {}, the base itself", out.display());
        }
        if let (false, Some(flag)) = (is_gguf(out), options.of_gguf_only()) {
            return Err(UsageError(format!(
                "{flag} only applies to a GGUF, but --out is a folder"
            ))
            .into());
        }
        if options.n_ctx.is_some() && options.report.is_none() && options.imatrix_data.is_none() {
            return Err(UsageError("--n-ctx requires --report or --imatrix-data".into()).into());
        }
        let bounds = match options.of_gguf_only() {
            Some(_) => VerifyBounds::QUANTIZED,
            None => VerifyBounds::of(file_type),
        };
        let importance = options.importance(self.base, &self.added, self.active)?;
        let written = match is_gguf(out) {
            true => self.gguf(file_type, importance.as_ref(), out)?,
            false => write_folder(&self.source, file_type.block_type(), out)?,
        };
        let verified = verify_with_added_tokens(self.base, &self.added, self.active, out, bounds)?;
        if let Some(warning) = verified.warning(out) {
            eprintln!("warning: {warning}");
        }
        let distance = verified.distance;
        let values: usize = written.tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum();
        let bits = written.bytes as f64 * 8.0 / values.max(1) as f64;
        let lines = match &options.report {
            Some(text) => Some(self.report(text, file_type, importance.as_ref(), adapter_bytes)?),
            None => None,
        };
        if !json {
            crate::cli::say!(
                "{}: {file_type}, {:.1} MB, {bits:.2} bits per weight; read back, mean KL from {} is {:.2e} \
                 over {} tokens",
                out.display(),
                written.bytes as f64 / 1e6,
                if self.active.is_empty() { "the base" } else { "the base with its adapters" },
                distance.mean_kl,
                distance.tokens,
            );
            if let Some(lines) = &lines {
                crate::cli::say!("\n{}", quality_report::table(lines));
            }
        }
        let mut value = json!({
            "out": out.display().to_string(),
            "type": file_type.to_string(),
            "bytes": written.bytes,
            "bits_per_weight": bits,
            "distance": to_json(&distance)?,
            "cut_otherwise": verified.cut_otherwise,
            "tensors": to_json(&written.tensors)?,
        });
        if let Some(lines) = &lines {
            value["report"] = to_json(lines)?;
        }
        Ok(value)
    }

    fn gguf(
        &self,
        file_type: FileType,
        importance: Option<&Importance>,
        out: &Path,
    ) -> Result<Written> {
        Ok(write_gguf(&self.source, &self.options.recipe(file_type), importance, out)?)
    }

    /// The quality report: each variant of the model, measured on a text.
    fn report(
        &self,
        text: &Path,
        file_type: FileType,
        importance: Option<&Importance>,
        adapter_bytes: u64,
    ) -> Result<Vec<quality_report::QualityReportRow>> {
        let reference = match &self.options.reference {
            Some(path) => Checkpoint::open(path)?,
            None => self.base.clone(),
        };
        let exact = load_with_added_tokens(&reference, &self.added)?;
        let beside = load_with_added_tokens(self.base, &self.added)?;
        if exact.config.vocab_size != beside.config.vocab_size {
            let (found, needed) = (exact.config.vocab_size, beside.config.vocab_size);
            bail!("--reference has a vocabulary of {found} tokens, needed {needed} as the base");
        }
        let folder = self.out.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = folder.unwrap_or(Path::new(".")).to_path_buf();
        let mut files: Vec<(String, PathBuf, bool)> = Vec::new();
        let mut make = |of: FileType, importance: Option<&Importance>, name: &str| -> Result<()> {
            let path = folder.join(format!(".report-{}-{}.gguf", std::process::id(), files.len()));
            files.push((name.into(), path.clone(), true));
            write_gguf(&self.source, &self.options.recipe(of), importance, &path)?;
            Ok(())
        };
        let merged = if self.active.is_empty() { "" } else { "merged, " };
        let made = (|| -> Result<()> {
            if file_type != FileType::F16 {
                make(FileType::F16, None, &format!("{merged}F16"))?;
            }
            if file_type.is_quantized() && importance.is_some() {
                make(file_type, None, &format!("{merged}{file_type}"))?;
            }
            Ok(())
        })();
        let weighted = if importance.is_some() { ", imatrix" } else { "" };
        files.push((format!("{merged}{file_type}{weighted}"), self.out.into(), false));
        let lines = made.and_then(|()| {
            let mut candidates = vec![quality_report::ReportCandidate {
                name: match self.active.is_empty() {
                    true => "the base".into(),
                    false => "adapter beside the base".into(),
                },
                bytes: bytes_of(self.base.path()) + adapter_bytes,
                decoder: beside,
                active: self.active.to_vec(),
            }];
            for (name, path, _) in &files {
                let decoder = Decoder::load(&Checkpoint::open(path)?, Compute::F32)?;
                let (name, bytes) = (name.clone(), bytes_of(path));
                candidates.push(quality_report::ReportCandidate {
                    name,
                    bytes,
                    decoder,
                    active: Vec::new(),
                });
            }
            let (tokens, bos) = tokens(self.base, &self.added, text)?;
            let n_ctx = self.options.n_ctx(&exact);
            quality_report::measure((&exact, self.active), &candidates, &tokens, n_ctx, bos)
                .with_context(|| text.display().to_string())
        });
        for (_, path, temporary) in &files {
            if *temporary {
                let _ = std::fs::remove_file(path); // it may not exist
            }
        }
        lines
    }
}

/// Whether two paths refer to the same file or folder.
fn same_place(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// Bytes of a file, or of the weights in a folder.
fn bytes_of(path: &Path) -> u64 {
    let of = |path: &Path| std::fs::metadata(path).map_or(0, |about| about.len());
    match std::fs::read_dir(path) {
        Err(_) => of(path),
        Ok(entries) => {
            let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
            let weights = paths.filter(|p| p.extension().is_some_and(|e| e == "safetensors"));
            weights.map(|path| of(&path)).sum()
        }
    }
}
