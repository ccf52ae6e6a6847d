//! Export of models: written files are read back and compared.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Device;
use quantune::export::{
    ExportSource, FileType, Recipe, VerifyBounds, types, verify, write_folder, write_gguf,
};
use quantune::model::config::{FAMILIES, RopeScaling, Variation};
use quantune::model::{ActiveAdapter, Config, Decoder, load};
use quantune::ops::Compute;
use quantune::quant::BlockType;
use quantune::text::{Special, Tokenizer};
use quantune::weights::{Checkpoint, Gguf, GgufValue};
use quantune_adapters::format;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::support::{golden, golden_json, model_path};

const FOLDERS: &[&str] = &["llama-tiny", "llama-untied", "qwen2-tiny"];
const GGUFS: &[&str] = &["llama-q8_0", "llama-q4_0", "qwen2-mix", "llama-k"];

const TEXTS: &[&str] = &[
    "She'd 365 boats, 10,000 nets\n\n  and the Fähre. Паром 渡し船 \u{1f680}",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "   \n\t tabs\r\n x=1; y+=2  ",
    "",
];

/// Checks that two checkpoints tokenize text and render messages the same way.
fn same_tokenizer(one: &Checkpoint, other: &Checkpoint) {
    let (one, other) = (Tokenizer::open(one).unwrap(), Tokenizer::open(other).unwrap());
    for text in TEXTS {
        for special in [Special::Parse, Special::AsText] {
            let ids = one.encode(text, special).unwrap();
            assert_eq!(ids, other.encode(text, special).unwrap(), "{text:?} {special:?}");
            assert_eq!(one.decode(&ids, false).unwrap(), other.decode(&ids, false).unwrap());
            assert_eq!(one.decode(&ids, true).unwrap(), other.decode(&ids, true).unwrap());
        }
    }
    let about = |t: &Tokenizer| {
        let ends: Vec<u32> = (0..512).filter(|id| t.is_end_of_generation(*id)).collect();
        (t.bos(), t.eos(), t.pad(), t.adds_bos(), ends)
    };
    assert_eq!(about(&one), about(&other));
    let messages = [json!({"role": "user", "content": "hi"})];
    let text = |t: &Tokenizer| t.chat_template().unwrap().render(&messages, None, true).unwrap();
    assert_eq!(text(&one), text(&other));
}

#[test]
fn model_converts_to_other_format_and_back() {
    let folder = tempfile::tempdir().unwrap();
    for name in FOLDERS.iter().chain(GGUFS) {
        let base = Checkpoint::open(model_path(name)).unwrap();
        let source = ExportSource::open(&base, &[]).unwrap();
        let gguf = folder.path().join(format!("{name}.gguf"));
        let written = write_gguf(&source, &Recipe::new(FileType::F32), None, &gguf).unwrap();
        assert!(written.tensors.iter().all(|t| t.relative_error == 0.0));
        let first = verify(&base, &[], &gguf, VerifyBounds::F32).unwrap();

        let gguf = Checkpoint::open(&gguf).unwrap();
        same_tokenizer(&base, &gguf);
        let out = folder.path().join(name);
        write_folder(&ExportSource::open(&gguf, &[]).unwrap(), BlockType::F32, &out).unwrap();
        let second = verify(&base, &[], &out, VerifyBounds::F32).unwrap();
        let out = Checkpoint::open(&out).unwrap();
        same_tokenizer(&base, &out);
        println!("{name}: {first:?} {second:?}");

        let config = |checkpoint| Config::read(checkpoint).unwrap();
        let (of_base, of_out) = (config(&base), config(&out));
        assert_eq!(of_base.num_key_value_heads, of_out.num_key_value_heads);
        assert_eq!(of_base.tie_word_embeddings, of_out.tie_word_embeddings);
        for (a, b) in of_base.inv_freq().iter().zip(of_out.inv_freq()) {
            assert!((a / b - 1.0).abs() < 1e-5, "{name}: rope {a} and {b}");
        }
    }
}

#[test]
fn tensors_of_same_type_are_copied_verbatim() {
    let folder = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(model_path("llama-q8_0")).unwrap();
    let out = folder.path().join("out.gguf");
    let source = ExportSource::open(&base, &[]).unwrap();
    write_gguf(&source, &Recipe::new(FileType::Q8_0), None, &out).unwrap();
    let (old, new) = (Gguf::open(base.path()).unwrap(), Gguf::open(&out).unwrap());
    assert_eq!(old.tensors().len(), new.tensors().len());
    for info in old.tensors() {
        let (old, new) = (old.tensor(&info.name).unwrap(), new.tensor(&info.name).unwrap());
        assert_eq!(old.bytes[..], new.bytes[..], "{}", info.name);
    }
    let kept = |key: &str| !key.starts_with("general.");
    let keys = |gguf: &Gguf| -> Vec<(String, String)> {
        let keys = gguf.metadata().filter(|(key, _)| kept(key));
        keys.map(|(key, value)| (key.to_string(), value.to_string())).collect()
    };
    assert_eq!(keys(&old), keys(&new));
    assert_eq!(new.u64("general.file_type").unwrap(), Some(7));
}

/// The adapters of the training goldens, B away from zero.
fn trained(base: &Checkpoint, name: &str, weight: f64) -> ActiveAdapter {
    let decoder = Decoder::load(base, Compute::F32).unwrap();
    let path = golden(&format!("train/{name}/final"));
    let linears = decoder.linears();
    let read = format::read_folder(&path, name, &linears, Some("lm_head"), &Device::Cpu);
    ActiveAdapter { adapter: read.unwrap().0.into(), weight, trainable: false }
}

#[test]
fn merged_weights_equal_base_plus_updates() {
    for (model, adapters) in [
        ("llama-tiny", &["llama-tiny", "llama-tiny-rslora"][..]),
        ("qwen2-tiny", &["qwen2-tiny"]),
        ("llama-q8_0", &["llama-q8_0"]),
    ] {
        let base = Checkpoint::open(model_path(model)).unwrap();
        let weights = [1.0, -0.7];
        let active: Vec<ActiveAdapter> =
            adapters.iter().zip(weights).map(|(name, w)| trained(&base, name, w)).collect();
        let (plain, merged) =
            (ExportSource::open(&base, &[]).unwrap(), ExportSource::open(&base, &active).unwrap());
        let mut changed = 0;
        for (plain, merged) in plain.tensors.iter().zip(&merged.tensors) {
            let read = |tensor: &quantune::export::ExportTensor| {
                let mut values = vec![0.0; tensor.rows() * tensor.cols()];
                tensor.read(0..tensor.rows(), &mut values).unwrap();
                values
            };
            let (mut needed, found) = (read(plain), read(merged));
            let module = plain.name.strip_suffix(".weight").unwrap_or_default();
            for active in &active {
                let Some(lora) = active.adapter.modules.get(module) else { continue };
                changed += 1;
                let by = active.weight * lora.scale;
                let delta = (lora.b.matmul(&lora.a).unwrap() * by).unwrap();
                let delta = delta.flatten_all().unwrap().to_vec1::<f32>().unwrap();
                needed.iter_mut().zip(delta).for_each(|(w, delta)| *w += delta);
            }
            for (needed, found) in needed.iter().zip(&found) {
                assert!((needed - found).abs() < 1e-6, "{}: {needed} {found}", plain.name);
            }
        }
        assert!(changed > 0);

        let folder = tempfile::tempdir().unwrap();
        for (file_type, bounds) in [
            (FileType::F32, VerifyBounds::F32),
            (FileType::F16, VerifyBounds::F16),
            (FileType::BF16, VerifyBounds::BF16),
            (FileType::Q8_0, VerifyBounds::QUANTIZED),
        ] {
            let out = folder.path().join("merged.gguf");
            write_gguf(&merged, &Recipe::new(file_type), None, &out).unwrap();
            let off = verify(&base, &active, &out, bounds).unwrap();
            println!("{model} {file_type}: {off:?}");
            let out = folder.path().join("merged");
            if !file_type.is_quantized() {
                write_folder(&merged, file_type.block_type(), &out).unwrap();
                verify(&base, &active, &out, bounds).unwrap();
            }
        }
        // The base without the adapter differs, which is detected.
        let out = folder.path().join("plain.gguf");
        write_gguf(&plain, &Recipe::new(FileType::F32), None, &out).unwrap();
        let error = verify(&base, &active, &out, VerifyBounds::F32).unwrap_err().to_string();
        assert!(error.contains("removed") && !out.exists(), "{error}");
    }
}

#[test]
fn failed_export_leaves_no_files() {
    let folder = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(model_path("llama-tiny")).unwrap();
    let source = ExportSource::open(&base, &[]).unwrap();
    let error = |result: Result<_, quantune::export::ExportError>| match result {
        Ok(_) => panic!("written"),
        Err(error) => error.to_string(),
    };
    // Rows of 96 values have no whole blocks of 256; the type is requested explicitly.
    let mut recipe = Recipe::new(FileType::Q8_0);
    recipe.token_embedding_type = Some(BlockType::Q4_K);
    let found = error(write_gguf(&source, &recipe, None, &folder.path().join("a.gguf")));
    assert!(found.contains("token_embd.weight") && found.contains("Q4_K"), "{found}");
    let found = error(write_folder(&source, BlockType::Q8_0, &folder.path().join("a")));
    assert!(found.contains("F32, F16 or BF16"), "{found}");

    let full = folder.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("thesis.txt"), "ten years").unwrap();
    let found = error(write_folder(&source, BlockType::F32, &full));
    assert!(found.contains("thesis.txt"), "{found}");
    assert!(full.join("thesis.txt").exists());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

    // A NaN in memory.
    let config = Config::read(&base).unwrap();
    let values: Vec<Vec<f32>> = load::tensors(&config)
        .iter()
        .map(|(_, shape)| vec![f32::NAN; shape.iter().product()])
        .collect();
    let tensors = load::tensors(&config);
    let named = tensors.iter().zip(&values).map(|((n, s), v)| (&n[..], &s[..], &v[..]));
    let source = ExportSource::from_memory(config, named, base.path()).unwrap();
    let out = folder.path().join("nan.gguf");
    let found = error(write_gguf(&source, &Recipe::new(FileType::F16), None, &out));
    assert!(found.contains("NaN") && found.contains("row 0"), "{found}");
    let found = error(write_folder(&source, BlockType::F16, &folder.path().join("nan")));
    assert!(found.contains("NaN"), "{found}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn model_in_memory_is_written_in_both_formats() {
    let folder = tempfile::tempdir().unwrap();
    for name in FOLDERS {
        let base = Checkpoint::open(model_path(name)).unwrap();
        let config = Config::read(&base).unwrap();
        let read = ExportSource::open(&base, &[]).unwrap();
        let values: Vec<Vec<f32>> = read
            .tensors
            .iter()
            .map(|tensor| {
                let mut values = vec![0.0; tensor.rows() * tensor.cols()];
                tensor.read(0..tensor.rows(), &mut values).unwrap();
                values
            })
            .collect();
        let named = read.tensors.iter().zip(&values);
        let named = named.map(|(t, v)| (t.name.as_str(), &t.shape[..], &v[..]));
        let source = ExportSource::from_memory(config, named, Path::new(base.path())).unwrap();
        let (gguf, out) = (folder.path().join("m.gguf"), folder.path().join(name));
        write_gguf(&source, &Recipe::new(FileType::F32), None, &gguf).unwrap();
        verify(&base, &[], &gguf, VerifyBounds::F32).unwrap();
        for _ in 0..2 {
            write_folder(&source, BlockType::F32, &out).unwrap(); // replacing the existing folder
        }
        verify(&base, &[], &out, VerifyBounds::F32).unwrap();
        same_tokenizer(&base, &Checkpoint::open(&out).unwrap());
    }
}

/// A GGUF has no key for Unicode normalization, which is warned of; a folder keeps it.
#[test]
fn export_warns_when_tokenizers_differ() {
    let folder = tempfile::tempdir().unwrap();
    for normalizer in [json!(null), json!({ "type": "NFC" })] {
        let own = folder.path().join("base");
        std::fs::create_dir_all(&own).unwrap();
        for entry in std::fs::read_dir(model_path("llama-tiny")).unwrap() {
            let entry = entry.unwrap();
            std::fs::copy(entry.path(), own.join(entry.file_name())).unwrap();
        }
        let path = own.join("tokenizer.json");
        let mut tokenizer: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        tokenizer["normalizer"] = normalizer.clone();
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        let base = Checkpoint::open(&own).unwrap();
        let source = ExportSource::open(&base, &[]).unwrap();
        let (gguf, out) = (folder.path().join("out.gguf"), folder.path().join("out"));
        write_gguf(&source, &Recipe::new(FileType::F32), None, &gguf).unwrap();
        write_folder(&source, BlockType::F32, &out).unwrap();
        let warning_of =
            |path: &Path| verify(&base, &[], path, VerifyBounds::F32).unwrap().warning(path);
        assert_eq!(warning_of(&out), None);
        let warning = warning_of(&gguf).unwrap_or_default();
        assert_eq!(
            warning.contains("out.gguf splits some words differently"),
            !normalizer.is_null()
        );
    }
}

/// The config of one of the models that llama-quantize was run on.
fn quantized_config(model: &serde_json::Value) -> Config {
    let size = |key: &str| model[key].as_u64().unwrap() as usize;
    let family = FAMILIES.iter().find(|family| model["arch"] == family.architecture).unwrap();
    Config {
        family,
        hidden_size: size("hidden"),
        num_hidden_layers: size("layers"),
        num_attention_heads: size("heads"),
        num_key_value_heads: size("kv"),
        head_dim: size("hidden") / size("heads"),
        intermediate_size: size("inner"),
        vocab_size: 64,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: model["tied"] == true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        variation: Variation::default(),
    }
}

#[test]
fn tensor_types_match_llama_quantize() {
    let golden = golden_json("export/types.json");
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let config = quantized_config(&golden["models"][case["model"].as_str().unwrap()]);
        let mut recipe = Recipe::new(case["type"].as_str().unwrap().parse().unwrap());
        let mut importance = false;
        let flags: Vec<&str> =
            case["flags"].as_array().unwrap().iter().map(|f| f.as_str().unwrap()).collect();
        let mut flags = flags.into_iter();
        while let Some(flag) = flags.next() {
            let of = |value: Option<&str>| Some(types::block_type(value.unwrap()).unwrap());
            match flag {
                "--pure" => recipe.pure = true,
                "--imatrix" => importance = true,
                "--output-tensor-type" => recipe.output_tensor_type = of(flags.next()),
                "--token-embedding-type" => recipe.token_embedding_type = of(flags.next()),
                "--tensor-type" => {
                    recipe.tensor_types.push(flags.next().unwrap().parse().unwrap());
                }
                other => panic!("{other}"),
            }
        }
        let found = recipe.types(&config, importance).unwrap();
        let mut of_kind: HashMap<String, Vec<String>> = HashMap::new();
        for ((name, shape), of) in load::tensors(&config).iter().zip(found) {
            let name = load::gguf_name(config.family, name);
            let parts: Vec<&str> = name.split('.').collect();
            let kind = if parts[0] == "blk" { parts[2] } else { parts[0] };
            match shape.len() {
                1 => assert_eq!(of, BlockType::F32),
                _ => of_kind.entry(kind.into()).or_default().push(of.to_string()),
            }
        }
        let types = case["types"].as_object().unwrap();
        assert_eq!(types.len(), of_kind.len());
        for (kind, needed) in types {
            let found = &of_kind[kind];
            let needed: Vec<&str> = needed.as_str().unwrap().split(' ').collect();
            let needed = if needed.len() == 1 { vec![needed[0]; found.len()] } else { needed };
            let about = format!("{} {} {} {kind}", case["model"], case["type"], case["flags"]);
            assert_eq!(found, &needed, "{about}");
        }
    }
    assert!(cases.len() > 100);
}

#[test]
fn keys_and_tensors_match_llama_cpp_converter() {
    let digest = |bytes: &[u8]| {
        Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let golden = golden_json("export/converted.json");
    for name in FOLDERS {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out.gguf");
        let base = Checkpoint::open(model_path(name)).unwrap();
        let recipe = Recipe::new(FileType::F32);
        write_gguf(&ExportSource::open(&base, &[]).unwrap(), &recipe, None, &out).unwrap();
        let gguf = Gguf::open(&out).unwrap();

        for (key, needed) in golden[*name]["keys"].as_object().unwrap() {
            let found = gguf.get(key).unwrap_or_else(|| panic!("{name}: no {key}"));
            let found = match found {
                GgufValue::Array(items) => {
                    let items: Vec<serde_json::Value> = items
                        .iter()
                        .map(|item| item.as_str().map_or_else(|| json!(item.as_i64()), Into::into))
                        .collect();
                    digest(serde_json::to_string(&items).unwrap().as_bytes()).into()
                }
                GgufValue::F32(v) => json!(f64::from(v)),
                GgufValue::U32(v) => json!(v),
                GgufValue::Bool(v) => json!(v),
                other => json!(other.as_str()),
            };
            let same = match (found.as_f64(), needed.as_f64()) {
                (Some(found), Some(needed)) => found == needed,
                _ => &found == needed,
            };
            assert!(same, "{name}: {key} is {found}, needed {needed}");
        }
        let tensors = golden[*name]["tensors"].as_object().unwrap();
        assert_eq!(tensors.len(), gguf.tensors().len());
        for (tensor, needed) in tensors {
            let found = gguf.tensor(tensor).unwrap();
            assert_eq!(json!(found.shape), needed[0], "{name}: {tensor}");
            if let Some(needed) = needed[1].as_array() {
                for (found, needed) in found.vector().unwrap().iter().zip(needed) {
                    let needed = needed.as_f64().unwrap();
                    assert!((f64::from(*found) / needed - 1.0).abs() < 1e-6, "{found} {needed}");
                }
                continue;
            }
            assert_eq!(json!(digest(&found.bytes)), needed[1], "{name}: {tensor}");
        }
    }
}
