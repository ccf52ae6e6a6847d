//! Export of adapters as GGUF LoRA, importance matrices, and the quality report.

use std::path::Path;
use std::sync::Arc;

use candle_core::{Device, Tensor, Var};
use quantune::export::{
    ExportSource, FileType, Importance, Recipe, VerifyBounds, imatrix, lora, quality_report,
    verify, write_gguf,
};
use quantune::model::{ActiveAdapter, Decoder, adapter_files};
use quantune::ops::Compute;
use quantune::quant::BlockType;
use quantune::weights::{Checkpoint, Gguf, NewTensor, OwnedValue, write_gguf as write_plain};
use quantune_adapters::config::{InitLoraWeights, LoraConfig, Modules};
use quantune_adapters::delta::Adapter;
use quantune_adapters::format;
use quantune_adapters::targets::resolve;

use crate::support::{golden_json, ids, load, model_path};

/// A random adapter with ranks, alphas and scales of its own in some layers.
fn adapter(decoder: &Decoder, use_rslora: bool, several: bool) -> Adapter {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 6.0,
        use_rslora,
        rank_pattern: if several { vec![("v_proj".into(), 2)] } else { vec![] },
        alpha_pattern: if several { vec![("q_proj".into(), 11.0)] } else { vec![] },
        target_modules: Some(Modules::Expression("all-linear".into())),
        init_lora_weights: InitLoraWeights::Random,
        ..LoraConfig::default()
    };
    let resolved = resolve(&config, &decoder.linears(), Some("lm_head")).unwrap();
    Adapter::new("test", config, &resolved.targets, 3, &Device::Cpu).unwrap()
}

fn active(adapter: Adapter, weight: f64) -> [ActiveAdapter; 1] {
    [ActiveAdapter { adapter: Arc::new(adapter), weight, trainable: false }]
}

fn tokens(name: &str) -> Vec<u32> {
    ids(&golden_json(&format!("model/{name}.json"))["input_ids"][0])
}

#[test]
fn gguf_lora_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("lora.gguf");
    for name in ["llama-tiny", "llama-q4_0", "qwen2-tiny"] {
        let decoder = load(name, Compute::F32);
        for (use_rslora, several, weight) in
            [(false, false, 1.0), (true, false, 1.0), (false, true, 0.5), (true, true, -2.0)]
        {
            let about = format!("{name} rslora {use_rslora} several {several} weight {weight}");
            let before = active(adapter(&decoder, use_rslora, several), weight);
            for (dtype, bounds) in
                [(BlockType::F32, VerifyBounds::F32), (BlockType::F16, VerifyBounds::F16)]
            {
                let config = &decoder.config;
                lora::write_gguf_lora(&before[0].adapter, weight, config, dtype, &out).unwrap();
                let gguf = Gguf::open(&out).unwrap();
                let linears = decoder.linears();
                let read = adapter_files::read_gguf_lora(&gguf, "read", config, &linears).unwrap();
                let off =
                    lora::distance(&decoder, &before, &active(read.clone(), 1.0), &tokens(name));
                let off = off.unwrap();
                bounds.check(off).unwrap_or_else(|fault| panic!("{about} {dtype}: {fault}"));

                // The adapter read back can be written as a PEFT folder.
                let peft = folder.path().join("peft");
                format::write_folder(&read, &peft).unwrap();
                let (again, unmatched) =
                    format::read_folder(&peft, "again", &linears, Some("lm_head"), &Device::Cpu)
                        .unwrap();
                assert!(unmatched.is_empty());
                let (one, other) = (active(read, 1.0), active(again, 1.0));
                let off = lora::distance(&decoder, &one, &other, &tokens(name)).unwrap();
                assert!(off.worst_logp < 1e-4, "{about}: {off:?}");
            }
        }
    }
}

#[test]
fn unsupported_gguf_lora_contents_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("lora.gguf");
    let decoder = load("llama-tiny", Compute::F32);
    let write = |adapter: &Adapter, dtype| {
        let written = lora::write_gguf_lora(adapter, 1.0, &decoder.config, dtype, &out);
        written.unwrap_err().to_string()
    };
    let mut scored = adapter(&decoder, false, false);
    scored.add_score(64, false, 1).unwrap();
    assert!(write(&scored, BlockType::F32).contains("score head"));
    let plain = adapter(&decoder, false, false);
    assert!(write(&plain, BlockType::Q8_0).contains("F32 or F16"));
    let mut huge = adapter(&decoder, false, false);
    let lora = huge.modules.values_mut().next().unwrap();
    lora.a =
        Var::from_tensor(&Tensor::full(1e6f32, lora.a.shape(), &Device::Cpu).unwrap()).unwrap();
    assert!(write(&huge, BlockType::F16).contains("F16 cannot"));
    assert!(!out.exists());

    // An adapter of another family, and a model instead of an adapter.
    lora::write_gguf_lora(&plain, 1.0, &decoder.config, BlockType::F32, &out).unwrap();
    let other = load("qwen2-tiny", Compute::F32);
    for (path, words) in
        [(out.clone(), "general.architecture"), (model_path("qwen2-mix"), "general.type")]
    {
        let gguf = Gguf::open(path).unwrap();
        let found = adapter_files::read_gguf_lora(&gguf, "x", &other.config, &other.linears());
        let error = found.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// The importance of the layers of a golden model on its own tokens.
fn importance(name: &str) -> Importance {
    let decoder = load(name, Compute::F32);
    imatrix::measure(&decoder, &[], &tokens(name), 37, None).unwrap()
}

#[test]
fn importance_is_mean_square_of_inputs() {
    let name = "llama-k";
    let decoder = load(name, Compute::F32);
    let found = importance(name);
    let mut linears = decoder.linears();
    linears.retain(|spec| spec.name.starts_with("model.layers"));
    assert_eq!(found.columns.len(), linears.len());
    assert_eq!(found.chunks, Some((tokens(name).len() / 37) as u32));
    for spec in &linears {
        let gguf = quantune::model::load::gguf_name(
            decoder.config.family,
            &format!("{}.weight", spec.name),
        );
        let means = &found.columns[&gguf];
        assert_eq!(means.len(), spec.in_features);
        assert!(means.iter().all(|m| m.is_finite() && *m >= 0.0) && means.iter().any(|m| *m > 0.0));
    }
    // One input for three; the norm makes its mean square that of the norm's weights, about.
    assert_eq!(found.columns["blk.0.attn_q.weight"], found.columns["blk.0.attn_v.weight"]);
    assert_ne!(found.columns["blk.0.attn_q.weight"], found.columns["blk.0.ffn_up.weight"]);
    let portable = load(name, Compute::REFERENCE);
    let theirs = imatrix::measure(&portable, &[], &tokens(name), 37, None).unwrap();
    for (tensor, means) in &found.columns {
        for (a, b) in means.iter().zip(&theirs.columns[tensor]) {
            assert!((a - b).abs() < 1e-3 * (1e-3 + b), "{tensor}: {a} and {b}");
        }
    }
}

#[test]
fn importance_matrices_of_both_formats_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let values = [("blk.0.attn_q.weight", vec![1.0f32, 4.0, 9.0]), ("b", vec![0.5, 0.25])];
    let path = folder.path().join("imatrix");
    let mut dat = Vec::new();
    dat.extend(2i32.to_le_bytes());
    for (name, values) in &values {
        dat.extend((name.len() as i32).to_le_bytes());
        dat.extend(name.as_bytes());
        dat.extend(2i32.to_le_bytes()); // calls
        dat.extend((values.len() as i32).to_le_bytes());
        values.iter().for_each(|v| dat.extend((2.0 * v).to_le_bytes()));
    }
    dat.extend(2i32.to_le_bytes()); // the last call, and what it was computed on
    dat.extend(4i32.to_le_bytes());
    dat.extend(b"text");
    std::fs::write(&path, &dat).unwrap();
    let check = |found: Importance| {
        assert_eq!(found.columns.len(), 2);
        for (name, values) in &values {
            assert_eq!(&found.columns[*name], values, "{name}");
        }
        assert_eq!(found.file, Some(path.display().to_string()));
        assert_eq!((found.dataset.as_deref(), found.chunks), (Some("text"), Some(2)));
    };
    check(imatrix::read(&path).unwrap());
    let fault = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        imatrix::read(&path).unwrap_err().to_string()
    };
    assert!(fault(&dat[..30]).contains("bytes"));
    assert!(fault(b"").contains("needed 4 bytes"));
    assert!(fault(&[0xff; 64]).contains("-1 entries"));
    let mut nan = dat.clone();
    let at = 4 + 4 + values[0].0.len() + 8;
    nan[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert!(fault(&nan).contains("NaN"));

    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let mut tensors = Vec::new();
    for (name, values) in &values {
        let sums: Vec<f32> = values.iter().map(|v| v * 512.0).collect();
        tensors.push((format!("{name}.in_sum2"), vec![1, values.len()], bytes(&sums)));
        tensors.push((format!("{name}.counts"), vec![1, 1], bytes(&[512.0])));
    }
    let tensors: Vec<NewTensor> = tensors
        .iter()
        .map(|(name, shape, bytes)| NewTensor { name, shape, block_type: BlockType::F32, bytes })
        .collect();
    let keys = [
        ("general.type".to_string(), OwnedValue::from("imatrix")),
        ("imatrix.datasets".to_string(), OwnedValue::strings(["text", "other"])),
        ("imatrix.chunk_count".to_string(), OwnedValue::U32(2)),
    ];
    write_plain(&path, &keys, &tensors).unwrap();
    check(imatrix::read(&path).unwrap());
}

#[test]
fn quality_report_ranks_bits_and_importance() {
    let name = "llama-k";
    let folder = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(model_path(name)).unwrap();
    let source = ExportSource::open(&base, &[]).unwrap();
    let write = |of: FileType, importance: Option<&Importance>, file: &str| {
        let out = folder.path().join(file);
        let mut recipe = Recipe::new(of);
        recipe.pure = true;
        write_gguf(&source, &recipe, importance, &out).unwrap();
        verify(&base, &[], &out, VerifyBounds::QUANTIZED).unwrap();
        let written = Gguf::open(&out).unwrap();
        let entries = written.u64("quantize.imatrix.entries_count").unwrap();
        assert_eq!(entries, importance.map(|importance| importance.columns.len() as u64));
        out
    };
    let importance = importance(name);
    let mut candidates = vec![quality_report::ReportCandidate {
        name: "itself".into(),
        bytes: 1,
        decoder: load(name, Compute::F32),
        active: Vec::new(),
    }];
    let mut add = |path: &Path| {
        let decoder = Decoder::load(&Checkpoint::open(path).unwrap(), Compute::F32).unwrap();
        let name = path.display().to_string();
        candidates.push(quality_report::ReportCandidate {
            name,
            bytes: 1,
            decoder,
            active: Vec::new(),
        });
    };
    add(&write(FileType::F16, None, "f16.gguf"));
    add(&write(FileType::Q8_0, None, "q8.gguf"));
    add(&write(FileType::Q4_0, None, "q4.gguf"));
    add(&write(FileType::Q4_0, Some(&importance), "q4i.gguf"));
    let text: Vec<u32> = [tokens(name), tokens(name)].concat();
    let exact = load(name, Compute::F32);
    let lines = quality_report::measure((&exact, &[]), &candidates, &text, 36, None).unwrap();
    println!("{}", quality_report::table(&lines));
    let kl: Vec<f64> = lines.iter().map(|line| line.mean_kl).collect();
    assert!(kl[0] == 0.0 && lines[0].same_top == 1.0, "{lines:?}");
    assert!(kl[0] < kl[1] && kl[1] < kl[2] && kl[2] < kl[3], "{kl:?}");

    // Importance gives less error where inputs are large.
    let error = |file: &str, tensor: &quantune::export::ExportTensor, weights: &[f32]| {
        let written = Checkpoint::open(folder.path().join(file)).unwrap();
        let written = ExportSource::open(&written, &[]).unwrap();
        let of = written.tensors.iter().find(|other| other.name == tensor.name).unwrap();
        let read = |tensor: &quantune::export::ExportTensor| {
            let mut values = vec![0.0; tensor.rows() * tensor.cols()];
            tensor.read(0..tensor.rows(), &mut values).unwrap();
            values
        };
        let (exact, found) = (read(tensor), read(of));
        let off = exact.iter().zip(found).map(|(w, q)| f64::from(w - q).powi(2));
        let weights = weights.iter().cycle();
        off.zip(weights).map(|(off, w)| off * f64::from(*w)).sum::<f64>()
    };
    for tensor in &source.tensors {
        let gguf = quantune::model::load::gguf_name(source.config.family, &tensor.name);
        let Some(weights) = importance.columns.get(&gguf) else { continue };
        let (plain, weighted) =
            (error("q4.gguf", tensor, weights), error("q4i.gguf", tensor, weights));
        assert!(weighted < plain, "{gguf}: {weighted:e} after {plain:e}");
    }

    // An importance matrix of another model.
    let mut wrong = importance.clone();
    wrong.columns.insert("blk.0.attn_q.weight".into(), vec![1.0; 7]);
    let out = folder.path().join("wrong.gguf");
    let error = write_gguf(&source, &Recipe::new(FileType::Q4_0), Some(&wrong), &out);
    assert!(error.unwrap_err().to_string().contains("7 columns"));
    assert!(!out.exists());
}
