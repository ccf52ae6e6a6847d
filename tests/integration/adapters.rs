//! The adapters crate compared with PEFT's files and choice of modules (scripts/golden/adapters.py).

use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use quantune_adapters::rng::Stream;
use quantune_adapters::{
    Adapter, InitLoraWeights, LinearSpec, Lora, LoraConfig, Modules, format, resolve,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/adapters").join(name)
}

fn matching_table() -> (Vec<LinearSpec>, Vec<Value>) {
    let text = fs::read_to_string(golden("matching.json")).unwrap();
    let table: Value = serde_json::from_str(&text).unwrap();
    let linears = table["linears"].as_array().unwrap().iter().map(|l| LinearSpec {
        name: l[0].as_str().unwrap().into(),
        in_features: l[1].as_u64().unwrap() as usize,
        out_features: l[2].as_u64().unwrap() as usize,
        embedding: false,
        added_tokens: 0,
    });
    (linears.collect(), table["cases"].as_array().unwrap().clone())
}

/// The linear layers of the goldens' Llama with two layers.
fn linears() -> Vec<LinearSpec> {
    let (mut linears, _) = matching_table();
    let two = ["model.layers.0.", "model.layers.1.", "lm_head"];
    linears.retain(|l| two.iter().any(|start| l.name.starts_with(start)));
    linears
}

fn read(folder: &Path, linears: &[LinearSpec]) -> Result<Adapter, String> {
    format::read_folder(folder, "test", linears, Some("lm_head"), &Device::Cpu)
        .map(|(adapter, _)| adapter)
        .map_err(|e| e.to_string())
}

/// A copy of PEFT's folder with changed files.
fn changed(config: impl Fn(&mut Value), tensors: impl Fn(Vec<u8>) -> Vec<u8>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let peft = golden("saved_by_peft");
    let text = fs::read_to_string(peft.join(format::CONFIG_FILE)).unwrap();
    let mut value = serde_json::from_str(&text).unwrap();
    config(&mut value);
    fs::write(folder.path().join(format::CONFIG_FILE), value.to_string()).unwrap();
    let bytes = tensors(fs::read(peft.join(format::TENSORS_FILE)).unwrap());
    fs::write(folder.path().join(format::TENSORS_FILE), bytes).unwrap();
    folder
}

/// The file's tensors under other names and in other bytes.
fn rewrite(
    bytes: &[u8],
    dtype: Dtype,
    name: impl Fn(&str) -> String,
    convert: impl Fn(f32) -> Vec<u8>,
) -> Vec<u8> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = file
        .iter()
        .map(|(n, view)| {
            let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            (name(n), view.shape().to_vec(), values.flat_map(&convert).collect())
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(n, shape, bytes)| (n, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn modules_ranks_and_scales_match_peft() {
    let (linears, cases) = matching_table();
    assert!(cases.len() > 50);
    for case in &cases {
        let made = LoraConfig::from_json(&case["config"].to_string())
            .map_err(|e| e.to_string())
            .and_then(|c| resolve(&c, &linears, Some("lm_head")).map_err(|e| e.to_string()));
        let Some(needed) = case["modules"].as_array() else {
            assert!(made.is_err(), "PEFT refuses {case}, we made {made:?}");
            continue;
        };
        let made = made.unwrap_or_else(|e| panic!("{}: {e}", case["config"])).targets;
        let needed = needed.iter().map(|m| {
            (m[0].as_str().unwrap(), m[1].as_u64().unwrap() as usize, m[2].as_f64().unwrap())
        });
        let made = made.iter().map(|t| (t.spec.name.as_str(), t.r, t.scale));
        assert_eq!(made.collect::<Vec<_>>(), needed.collect::<Vec<_>>(), "{}", case["config"]);
    }
}

#[test]
fn unmatched_targets_are_reported() {
    let linears = linears();
    let list = |names: &[&str]| Some(Modules::List(names.iter().map(|n| n.to_string()).collect()));
    let config = LoraConfig {
        target_modules: list(&["q_proj", "c_attn"]),
        rank_pattern: vec![("v_proj".into(), 2), ("q_proj".into(), 3)],
        ..LoraConfig::default()
    };
    let unmatched = resolve(&config, &linears, Some("lm_head")).unwrap().unmatched;
    let unmatched: Vec<String> = unmatched.iter().map(|u| u.to_string()).collect();
    let needed = [
        "target_modules \"c_attn\" matches no module",
        "rank_pattern \"v_proj\" matches no module",
    ];
    assert_eq!(unmatched, needed);

    let check = |config: LoraConfig, needed: &str| {
        let error = resolve(&config, &linears, Some("lm_head")).unwrap_err().to_string();
        assert!(error.contains(needed), "{error}");
    };
    let default = LoraConfig::default;
    check(
        LoraConfig { target_modules: list(&["c_attn"]), ..default() },
        "[\"c_attn\"] matches no linear layer; this base has q_proj, k_proj, v_proj, o_proj",
    );
    check(default(), "target_modules is null");
    let q = || list(&["q_proj"]);
    check(
        LoraConfig { target_modules: q(), exclude_modules: q(), ..default() },
        "[\"q_proj\"] leaves none of the 2 layers",
    );
    let slow = Modules::Expression(r"((\w|\.)*)*\1!".into()); // would backtrack for years
    check(
        LoraConfig { target_modules: Some(slow), ..default() },
        "not a usable regular expression",
    );
}

fn check_deltas(adapter: &Adapter, tolerance: f64) {
    let known =
        candle_core::safetensors::load(golden("saved_by_peft_deltas.safetensors"), &Device::Cpu)
            .unwrap();
    assert_eq!(known.len(), 2 * adapter.modules.len());
    for (module, lora) in &adapter.modules {
        let made = lora.delta(&known[&format!("{module}.x")], None, false).unwrap();
        let apart = (made - &known[&format!("{module}.y")]).unwrap().abs().unwrap();
        let apart =
            f64::from(apart.flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap());
        assert!(apart < tolerance, "{module}: {apart}");
    }
}

#[test]
fn peft_folder_gives_peft_outputs() {
    let adapter = read(&golden("saved_by_peft"), &linears()).unwrap();
    assert_eq!(adapter.modules.len(), 12);
    assert_eq!(adapter.modules["model.layers.1.mlp.up_proj"].r(), 1);
    assert_eq!(adapter.config.lora_dropout, 0.25);
    check_deltas(&adapter, 1e-5);

    let name = |n: &str| n.replace(".weight", ".default.weight");
    type Convert = fn(f32) -> Vec<u8>;
    let half: [(Dtype, Convert, f64); 2] = [
        (Dtype::F16, |v| f16::from_f32(v).to_le_bytes().to_vec(), 0.01),
        (Dtype::BF16, |v| bf16::from_f32(v).to_le_bytes().to_vec(), 0.05),
    ];
    for (dtype, convert, tolerance) in half {
        let folder = changed(|_| {}, |bytes| rewrite(&bytes, dtype, name, convert));
        check_deltas(&read(folder.path(), &linears()).unwrap(), tolerance);
    }
    // PEFT's default choice of modules, which only the tensors show.
    let folder = changed(|config| config["target_modules"] = Value::Null, |bytes| bytes);
    check_deltas(&read(folder.path(), &linears()).unwrap(), 1e-5);
}

/// Leaves the folder for `scripts/golden/adapters.py --check`.
#[test]
fn written_folder_reads_back_bit_for_bit() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("adapter_for_peft");
    let config = LoraConfig {
        task_type: Some("CAUSAL_LM".into()),
        base_model_name_or_path: Some("tiny".into()),
        r: 4,
        lora_alpha: 6.5,
        lora_dropout: 0.1,
        target_modules: Some(Modules::List(vec![
            "q_proj".into(),
            "up_proj".into(),
            "lm_head".into(),
        ])),
        exclude_modules: Some(Modules::Expression(r".*\.1\.mlp\..*".into())),
        rank_pattern: vec![("up_proj".into(), 2)],
        alpha_pattern: vec![(r"layers\.1.*".into(), 3.0), ("q_proj".into(), 2.5)],
        use_rslora: true,
        init_lora_weights: InitLoraWeights::Random,
        ..LoraConfig::default()
    };
    let targets = resolve(&config, &linears(), Some("lm_head")).unwrap().targets;
    let adapter = Adapter::new("test", config, &targets, 11, &Device::Cpu).unwrap();
    format::write_folder(&adapter, &folder).unwrap();
    let bytes = fs::read(folder.join(format::TENSORS_FILE)).unwrap();
    let config = fs::read(folder.join(format::CONFIG_FILE)).unwrap();
    let again = read(&folder, &linears()).unwrap();
    assert_eq!(again.config, adapter.config);
    format::write_folder(&again, &folder).unwrap(); // replacing an existing one
    assert_eq!(fs::read(folder.join(format::TENSORS_FILE)).unwrap(), bytes);
    assert_eq!(fs::read(folder.join(format::CONFIG_FILE)).unwrap(), config);
    let scales = |a: &Adapter| a.modules.values().map(|l: &Lora| l.scale).collect::<Vec<_>>();
    assert_eq!(scales(&again), scales(&adapter));
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["format"], "pt");

    let mut stream = Stream::new(1, "activations", &[]);
    let mut deltas = std::collections::HashMap::new();
    for (module, lora) in &adapter.modules {
        let x: Vec<f32> = (0..3 * lora.in_features()).map(|_| stream.normal()).collect();
        let x = Tensor::from_vec(x, (3, lora.in_features()), &Device::Cpu).unwrap();
        deltas.insert(format!("{module}.y"), lora.delta(&x, None, false).unwrap());
        deltas.insert(format!("{module}.x"), x);
    }
    candle_core::safetensors::save(&deltas, folder.join("deltas.safetensors")).unwrap();
    let mut files: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|f| f.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, [format::CONFIG_FILE, format::TENSORS_FILE, "deltas.safetensors"]);
}

#[test]
fn all_mismatches_are_reported_together() {
    let check = |folder: &Path, linears: &[LinearSpec], needed: &[&str]| {
        let error = read(folder, linears).unwrap_err();
        for part in needed {
            assert!(error.contains(part), "{error:?} should say {part:?}");
        }
        assert!(!error.contains('\n'));
    };
    // Another base: wider, with one layer fewer.
    let mut other = linears();
    other.retain(|l| !l.name.contains("layers.1.") && !l.name.contains("0.mlp"));
    other.iter_mut().for_each(|l| l.in_features = 32);
    let named =
        changed(|config| config["base_model_name_or_path"] = "a/tiny".into(), |bytes| bytes);
    check(
        named.path(),
        &other,
        &[
            "adapter_model.safetensors: the adapter (made for a/tiny) does not fit this base",
            "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is unexpected",
            "more",
        ],
    );
    let one = |from: &'static str, to: &'static str| {
        move |bytes: Vec<u8>| {
            rewrite(&bytes, Dtype::F32, |n| n.replace(from, to), |v| v.to_le_bytes().to_vec())
        }
    };
    let renamed = changed(|_| {}, one("0.mlp.up_proj.lora_A", "0.mlp.up_proj.lora_magnitude"));
    check(
        renamed.path(),
        &linears(),
        &[
            "layers.0.mlp.up_proj.lora_magnitude.weight is unexpected",
            "0.mlp.up_proj.lora_A.weight is missing",
        ],
    );
    let rank = changed(|config| config["rank_pattern"]["k_proj"] = 3.into(), |bytes| bytes);
    check(
        rank.path(),
        &linears(),
        &[
            "layers.0.self_attn.k_proj.lora_A.weight is [2, 8], needed [3, 8]",
            "1.self_attn.k_proj.lora_B.weight is [4, 2], needed [4, 3]",
        ],
    );
    let nan = changed(
        |_| {},
        |bytes| rewrite(&bytes, Dtype::F32, |n| n.into(), |_| f32::NAN.to_le_bytes().to_vec()),
    );
    check(nan.path(), &linears(), &["lora_A.weight holds values that are not finite"]);
    let wide = changed(
        |_| {},
        |bytes| rewrite(&bytes, Dtype::F64, |n| n.into(), |v| f64::from(v).to_le_bytes().to_vec()),
    );
    check(wide.path(), &linears(), &["is F64, needed F32, F16 or BF16"]);
    let dora = changed(|config| config["use_dora"] = true.into(), |bytes| bytes);
    check(dora.path(), &linears(), &["q_proj.lora_magnitude_vector is missing"]);
    for (init, needed) in [("pissa_niter_4", "never changed here"), ("loftq", "quantized anew")] {
        let changes_base =
            changed(|config| config["init_lora_weights"] = init.into(), |bytes| bytes);
        let found = format!("adapter_config.json: init_lora_weights: found \"{init}\"");
        check(changes_base.path(), &linears(), &[&found, needed]);
    }
    let tokens =
        changed(|config| config["trainable_token_indices"] = vec![1].into(), |bytes| bytes);
    check(tokens.path(), &linears(), &["needs model.embed_tokens, which this base does not have"]);
    let gpt2 = changed(|config| config["target_modules"] = vec!["c_attn"].into(), |bytes| bytes);
    check(
        gpt2.path(),
        &linears(),
        &["adapter_config.json: target_modules [\"c_attn\"] matches no"],
    );

    let pickle = tempfile::tempdir().unwrap();
    check(pickle.path(), &linears(), &["adapter_config.json: No such file"]);
    fs::copy(
        golden("saved_by_peft").join(format::CONFIG_FILE),
        pickle.path().join(format::CONFIG_FILE),
    )
    .unwrap();
    check(pickle.path(), &linears(), &["adapter_model.safetensors: No such file"]);
    fs::write(pickle.path().join("adapter_model.bin"), "").unwrap();
    check(pickle.path(), &linears(), &["adapter_model.bin is a pickle"]);
}

#[test]
fn broken_files_are_errors_without_panic() {
    let whole = fs::read(golden("saved_by_peft").join(format::TENSORS_FILE)).unwrap();
    let config = format::read_config(&golden("saved_by_peft")).unwrap();
    let resolved = resolve(&config, &linears(), Some("lm_head")).unwrap();
    let read = |bytes: &[u8]| {
        format::from_bytes(bytes, Path::new("f"), "test", config.clone(), &resolved, &Device::Cpu)
    };
    assert!(read(&whole).is_ok());
    for length in (0..whole.len()).step_by(7) {
        assert!(read(&whole[..length]).is_err(), "{length} bytes of {}", whole.len());
    }
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut stream = Stream::new(1, "flips", &[]);
    let mut refused = 0;
    for _ in 0..2000 {
        let mut bytes = whole.clone();
        for _ in 0..=stream.below(3) {
            bytes[stream.below(header as u64) as usize] = stream.next_u64() as u8;
        }
        refused += usize::from(read(&bytes).is_err());
    }
    assert!(refused > 1900, "{refused} of 2000");
    for shape in ["[18446744073709551615,2]", "[4294967296,4294967296]", "[]", "[-1]", "[1.5]"] {
        let name = "base_model.model.lm_head.lora_A.weight";
        let header =
            format!(r#"{{"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,4]}}}}"#);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes().chain([0; 4]));
        assert!(read(&bytes).is_err(), "{shape}");
    }
}
