//! Export of every model family: merged in its own format and in the other, compared with llama.cpp's
//! converter.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quantune::export::{
    ExportSource, FileType, Recipe, VerifyBounds, lora, verify, write_folder, write_gguf,
};
use quantune::model::{ActiveAdapter, Config, Decoder, adapter_files};
use quantune::ops::Compute;
use quantune::quant::BlockType;
use quantune::weights::{Checkpoint, Gguf, GgufValue};
use serde_json::json;

use crate::model_families::{MODELS, adapter, rows, variant, worst};
use crate::support::{golden, golden_json};

fn open(path: impl AsRef<Path>) -> Checkpoint {
    Checkpoint::open(path.as_ref()).unwrap()
}

fn active(name: &str, base: &Checkpoint) -> [ActiveAdapter; 1] {
    let decoder = Decoder::load(base, Compute::F32).unwrap();
    let adapter = Arc::new(adapter(name, &decoder));
    [ActiveAdapter { adapter, weight: 0.7, trainable: false }]
}

/// A folder with a tokenizer of 64 letters, which the golden ones have not.
fn with_tokenizer(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(from.join(name), to.join(name)).unwrap();
    }
    let letters = ('!'..='~').chain('\u{a1}'..='\u{a9}').take(64);
    let vocab: serde_json::Map<String, serde_json::Value> =
        letters.zip(0..).map(|(letter, id)| (letter.to_string(), json!(id))).collect();
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [],
        "normalizer": null,
        "pre_tokenizer": level,
        "decoder": level,
        "post_processor": null,
        "model": { "type": "BPE", "vocab": vocab, "merges": [] },
    });
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// Keys with their values as text, without those that `dropped` selects.
fn keys(gguf: &Gguf, dropped: impl Fn(&str) -> bool) -> Vec<(String, String)> {
    let kept = gguf.metadata().filter(|(key, _)| !dropped(key));
    let mut keys: Vec<(String, String)> =
        kept.map(|(key, value)| (key.to_string(), value.to_string())).collect();
    keys.sort();
    keys
}

#[test]
fn merged_model_keeps_its_format() {
    let folder = tempfile::tempdir().unwrap();
    for name in MODELS {
        let base = open(golden(&format!("model_families/{name}")));
        let active = active(name, &base);
        let source = ExportSource::open(&base, &active).unwrap();
        let out = folder.path().join(name);
        for (of, bounds) in
            [(BlockType::F32, VerifyBounds::F32), (BlockType::F16, VerifyBounds::F16)]
        {
            write_folder(&source, of, &out).unwrap();
            verify(&base, &active, &out, bounds).unwrap_or_else(|e| panic!("{name} {of}: {e}"));
        }
        let read = |path: PathBuf| -> serde_json::Value {
            serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
        };
        let config = read(out.join("config.json"));
        assert_eq!(config, read(golden(&format!("model_families/{name}/config.json"))), "{name}");

        let base = open(golden(&format!("model_families/{name}.gguf")));
        let source = ExportSource::open(&base, &active).unwrap();
        let out = folder.path().join("out.gguf");
        for (of, bounds) in [
            (FileType::F32, VerifyBounds::F32),
            (FileType::F16, VerifyBounds::F16),
            (FileType::Q8_0, VerifyBounds::QUANTIZED),
        ] {
            write_gguf(&source, &Recipe::new(of), None, &out).unwrap();
            let off =
                verify(&base, &active, &out, bounds).unwrap_or_else(|e| panic!("{name} {of}: {e}"));
            assert!(off.distance.mean_kl < 0.05, "{name} {of}: {off:?}");
            let (old, new) = (Gguf::open(base.path()).unwrap(), Gguf::open(&out).unwrap());
            let of_type = |key: &str| key == "general.file_type";
            assert_eq!(keys(&old, of_type), keys(&new, of_type), "{name}");
            let names = |gguf: &Gguf| {
                let all = gguf.tensors().iter().map(|info| (info.name.clone(), info.shape.clone()));
                let mut all: Vec<_> = all.collect();
                all.sort();
                all
            };
            assert_eq!(names(&old), names(&new), "{name}");
        }
    }
}

#[test]
fn gguf_lora_round_trips_in_every_family() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("lora.gguf");
    for name in MODELS {
        let base = open(golden(&format!("model_families/{name}.gguf")));
        let active = active(name, &base);
        let decoder = Decoder::load(&base, Compute::F32).unwrap();
        let [ActiveAdapter { adapter, weight, .. }] = &active;
        lora::write_gguf_lora(adapter, *weight, &decoder.config, BlockType::F32, &out).unwrap();
        let gguf = Gguf::open(&out).unwrap();
        // Each update is of a tensor of the base.
        let base = Gguf::open(base.path()).unwrap();
        for info in gguf.tensors() {
            let of = info.name.strip_suffix(".lora_a").or(info.name.strip_suffix(".lora_b"));
            assert!(of.is_some_and(|of| base.tensor_info(of).is_some()), "{name}: {}", info.name);
        }
        let read =
            adapter_files::read_gguf_lora(&gguf, "read", &decoder.config, &decoder.linears())
                .unwrap();
        let read = [ActiveAdapter { adapter: Arc::new(read), weight: 1.0, trainable: false }];
        let off = lora::distance(&decoder, &active, &read, &rows(name)[0]).unwrap();
        VerifyBounds::F32.check(off).unwrap_or_else(|fault| panic!("{name}: {fault}"));
    }
}

/// Keys that only Quantune writes: llama.cpp's defaults, or (a Mistral's window) ones it does not read.
const OURS: &[&str] = &[
    "vocab_size",
    "rope.dimension_count",
    "rope.freq_base",
    "attention.key_length",
    "attention.value_length",
];

#[test]
fn folder_converts_to_llama_cpp_gguf_and_back() {
    let temporary = tempfile::tempdir().unwrap();
    for name in MODELS {
        let folder = temporary.path().join(name);
        with_tokenizer(&golden(&format!("model_families/{name}")), &folder);
        let base = open(&folder);
        let out = temporary.path().join("out.gguf");
        let source = ExportSource::open(&base, &[]).unwrap();
        write_gguf(&source, &Recipe::new(FileType::F16), None, &out).unwrap();
        let off =
            verify(&base, &[], &out, VerifyBounds::F32).unwrap_or_else(|e| panic!("{name}: {e}"));

        let needed = Gguf::open(golden(&format!("model_families/{name}.gguf"))).unwrap();
        let found = Gguf::open(&out).unwrap();
        let architecture = needed.str("general.architecture").unwrap().unwrap();
        let is_ours = |key: &str| {
            let key = key.strip_prefix(architecture).map_or(key, |key| &key[1..]);
            let window = *name == "mistral" && key == "attention.sliding_window";
            OURS.contains(&key) || window || key.starts_with("tokenizer.")
        };
        let is_theirs = |key: &str| {
            // A Phi-3 without longrope does not use its original context.
            key == "general.size_label" || key == "phi3.rope.scaling.original_context_length"
        };
        let of_name = |key: &str| key == "general.name";
        for (key, needed) in keys(&needed, |key| is_theirs(key) || of_name(key)) {
            let found = found.get(&key).unwrap_or_else(|| panic!("{name}: no {key}"));
            assert_eq!(found.to_string(), needed, "{name}: {key}");
        }
        for (key, value) in keys(&found, |key| is_ours(key) || of_name(key)) {
            assert!(
                needed.get(&key).is_some(),
                "{name}: {key} = {value} is none of the converter's"
            );
        }
        assert_eq!(found.tensors().len(), needed.tensors().len(), "{name}");
        for info in needed.tensors() {
            let (found, needed) =
                (found.tensor(&info.name).unwrap(), needed.tensor(&info.name).unwrap());
            assert_eq!((&found.shape, found.block_type), (&needed.shape, needed.block_type));
            assert_eq!(found.bytes[..], needed.bytes[..], "{name}: {}", info.name);
        }

        let gguf = open(&out);
        let again = temporary.path().join(format!("{name}-again"));
        write_folder(&ExportSource::open(&gguf, &[]).unwrap(), BlockType::F16, &again).unwrap();
        verify(&base, &[], &again, VerifyBounds::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        let again = open(&again);
        assert_eq!(Config::read(&base).unwrap(), Config::read(&again).unwrap(), "{name}");
        let decoder = Decoder::load(&again, Compute::F32).unwrap();
        let worst = worst(name, &decoder, usize::MAX);
        println!("{name}: gguf {off:?}, folder again {worst:.1e} off transformers");
        assert!(worst < 1e-3, "{name}: the folder of the GGUF is off by {worst}");
    }
}

#[test]
fn longrope_converts_both_ways() {
    let (from, _) = variant("phi3-long");
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("folder");
    with_tokenizer(from.path(), &folder);
    let base = open(&folder);
    let out = temporary.path().join("out.gguf");
    write_gguf(&ExportSource::open(&base, &[]).unwrap(), &Recipe::new(FileType::F16), None, &out)
        .unwrap();
    let found = Gguf::open(&out).unwrap();
    let golden = golden_json("model_families/phi3-long.json");
    for (key, needed) in golden["keys"].as_object().unwrap() {
        let found = found.get(key).unwrap_or_else(|| panic!("no {key}"));
        let found = found.as_f64().or(found.as_u64().map(|v| v as f64));
        assert_eq!(found, needed.as_f64(), "{key}");
    }
    for (tensor, needed) in golden["tensors"].as_object().unwrap() {
        let found = found.tensor(tensor).unwrap().vector().unwrap();
        assert_eq!(
            json!(found.iter().map(|v| f64::from(*v)).collect::<Vec<_>>()),
            *needed,
            "{tensor}"
        );
    }
    let gguf = open(&out);
    let again = temporary.path().join("again");
    write_folder(&ExportSource::open(&gguf, &[]).unwrap(), BlockType::F16, &again).unwrap();
    for written in [gguf, open(&again)] {
        for compute in [Compute::F32, Compute::REFERENCE] {
            let decoder = Decoder::load(&written, compute).unwrap();
            let worst = worst("phi3-long", &decoder, usize::MAX);
            assert!(worst < 1e-3, "{}: off by {worst}", written.path().display());
        }
    }
}

#[test]
fn yarn_parameters_are_written_to_gguf() {
    let (from, _) = variant("llama-yarn-all");
    let temporary = tempfile::tempdir().unwrap();
    let folder = temporary.path().join("folder");
    with_tokenizer(from.path(), &folder);
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let whole = text.replace("\"truncate\":false", "\"truncate\":true");
    assert_ne!(text, whole);
    std::fs::write(&path, whole).unwrap();
    let base = open(&folder);
    let out = temporary.path().join("out.gguf");
    write_gguf(&ExportSource::open(&base, &[]).unwrap(), &Recipe::new(FileType::F32), None, &out)
        .unwrap();
    verify(&base, &[], &out, VerifyBounds::F32).unwrap();
    let gguf = Gguf::open(&out).unwrap();
    // llama.cpp multiplies it by its own factor of 0.1 ln(4) + 1.
    let grown = gguf.f64("llama.rope.scaling.attn_factor").unwrap().unwrap();
    assert!((grown * (0.1 * 4f64.ln() + 1.0) - 1.3).abs() < 1e-6);
    assert!(matches!(gguf.get("llama.rope.scaling.yarn_beta_fast"), Some(GgufValue::F32(9.0))));
}

#[test]
fn unsupported_gguf_properties_are_errors() {
    let temporary = tempfile::tempdir().unwrap();
    for (name, words) in [
        ("llama-yarn-all", "truncate is false"),
        ("qwen3-window", "a window only"),
        ("gemma2-scalar", "query_pre_attn_scalar that is not 16"),
        ("smollm3-window", "a window only"),
    ] {
        let (from, _) = variant(name);
        let folder = temporary.path().join(name);
        with_tokenizer(from.path(), &folder);
        let base = open(&folder);
        let out = temporary.path().join("out.gguf");
        let source = ExportSource::open(&base, &[]).unwrap();
        let error = write_gguf(&source, &Recipe::new(FileType::F16), None, &out).unwrap_err();
        assert!(error.to_string().contains(words), "{name}: {error}");
        assert!(!out.exists());
    }
}

/// A tied head that an adapter changes is merged into a folder; llama.cpp's Gemma 2 has no place for it.
#[test]
fn changed_head_with_softcap_merges_into_folder() {
    let temporary = tempfile::tempdir().unwrap();
    let base = open(golden("model_families/gemma2"));
    for name in ["gemma2-head", "gemma2-tokens"] {
        let active = active(name, &base);
        let source = ExportSource::open(&base, &active).unwrap();
        let out = temporary.path().join(name);
        write_folder(&source, BlockType::F32, &out).unwrap();
        verify(&base, &active, &out, VerifyBounds::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    let gguf = open(golden("model_families/gemma2.gguf"));
    let active = active("gemma2-head", &gguf);
    let source = ExportSource::open(&gguf, &active).unwrap();
    let out = temporary.path().join("out.gguf");
    let error = write_gguf(&source, &Recipe::new(FileType::F16), None, &out).unwrap_err();
    assert!(error.to_string().contains("a head beside its embedding"), "{error}");
}
