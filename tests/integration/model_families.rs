//! Every model family compared with transformers and PEFT on tiny random models, from the folder and from
//! the GGUF of llama.cpp's converter.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use quantune::data::{Batch, Example};
use quantune::generate::engine::{Engine, Event, Job};
use quantune::model::{ActiveAdapter, Adapters, CacheType, Decoder, KvCache, Rows};
use quantune::objectives::Objective;
use quantune::ops::Compute;
use quantune::optim::Gradients;
use quantune::quant::BlockType;
use quantune::train::step::StepSettings;
use quantune::weights::Checkpoint;
use quantune_adapters::delta::Adapter;
use quantune_adapters::format;

use crate::support::{golden, golden_json, ids, log_softmax, new_state};

pub const MODELS: &[&str] =
    &["llama-yarn", "mistral", "qwen3", "gemma2", "gemma3", "phi3", "smollm3", "olmo2", "granite"];

/// The same weights under other settings.
pub const VARIANTS: &[&str] = &[
    "llama-linear",
    "llama-yarn-all",
    "qwen3-window",
    "gemma2-scalar",
    "smollm3-window",
    "phi3-long",
];

/// Additional adapters with their models: DoRA on fused modules, and parts of a head with a softcap.
const ADAPTERS: &[(&str, &str)] =
    &[("phi3-dora", "phi3"), ("gemma2-head", "gemma2"), ("gemma2-tokens", "gemma2")];

fn load(file: &str, compute: Compute) -> Decoder {
    let checkpoint = Checkpoint::open(golden(&format!("model_families/{file}"))).unwrap();
    Decoder::load(&checkpoint, compute).unwrap()
}

pub fn rows(name: &str) -> Vec<Vec<u32>> {
    let golden = golden_json(&format!("model_families/{name}.json"));
    golden["input_ids"].as_array().unwrap().iter().map(ids).collect()
}

fn theirs(name: &str) -> HashMap<String, Tensor> {
    let path = golden(&format!("model_families/{name}.safetensors"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

pub fn adapter(name: &str, decoder: &Decoder) -> Adapter {
    let folder = golden(&format!("model_families/{name}-adapter"));
    let linears = decoder.linears();
    format::read_folder(&folder, "default", &linears, Some("lm_head"), &Device::Cpu).unwrap().0
}

/// The largest difference to transformers' log-probs, over the first `positions` of both rows, which
/// run packed in one pass.
pub fn worst(name: &str, decoder: &Decoder, positions: usize) -> f64 {
    let (rows, theirs) = (rows(name), theirs(name));
    let hidden = decoder.hidden(&Rows::new(&rows), Adapters::NONE).unwrap();
    let mut ours = log_softmax(&decoder.logits(&hidden, Adapters::NONE).unwrap()).into_iter();
    let mut worst = 0f64;
    for (i, row) in rows.iter().enumerate() {
        let theirs = theirs[&format!("log_probs.{i}")].to_vec2::<f32>().unwrap();
        let ours: Vec<Vec<f64>> = ours.by_ref().take(row.len()).collect();
        assert_eq!((ours.len(), ours[0].len()), (theirs.len(), theirs[0].len()));
        for (ours, theirs) in ours.iter().zip(&theirs).take(positions) {
            for (ours, theirs) in ours.iter().zip(theirs) {
                worst = worst.max((ours - f64::from(*theirs)).abs());
            }
        }
    }
    worst
}

#[test]
fn log_probs_match_transformers() {
    for name in MODELS {
        let positions =
            golden_json(&format!("model_families/{name}.json"))["gguf_positions"].as_u64();
        let positions = positions.map_or(usize::MAX, |positions| positions as usize);
        for (file, positions) in
            [(name.to_string(), usize::MAX), (format!("{name}.gguf"), positions)]
        {
            for compute in [Compute::F32, Compute::REFERENCE] {
                let worst = worst(name, &load(&file, compute), positions);
                assert!(worst < 1e-3, "{file} {compute:?}: off by {worst}");
            }
            let uploaded = load(&file, Compute::REFERENCE).on(&Device::Cpu).unwrap();
            let of_uploaded = worst(name, &uploaded, positions);
            assert!(of_uploaded < 1e-3, "{file}, brought to a device: off by {of_uploaded}");
            let int16 = worst(name, &load(&file, Compute::INT16), positions);
            assert!(int16 < 3e-2, "{file}: int16 is off by {int16}");
        }
    }
}

/// The folder of a variant.
pub fn variant(name: &str) -> (tempfile::TempDir, Checkpoint) {
    let golden_run = golden_json(&format!("model_families/{name}.json"));
    let base = golden(&format!("model_families/{}", golden_run["base"].as_str().unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let weights = "model.safetensors";
    std::fs::copy(base.join(weights), folder.path().join(weights)).unwrap();
    let config = golden_run["config"].to_string();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    (folder, checkpoint)
}

#[test]
fn config_variants_match_transformers() {
    for name in VARIANTS {
        let (_folder, checkpoint) = variant(name);
        for compute in [Compute::F32, Compute::REFERENCE] {
            let decoder = Decoder::load(&checkpoint, compute).unwrap();
            let worst = worst(name, &decoder, usize::MAX);
            assert!(worst < 1e-3, "{name} {compute:?}: off by {worst}");
        }
    }
}

/// Loss and gradients of both rows, the adapter trainable.
fn step(
    decoder: &Decoder,
    adapter: Adapter,
    rows: &[Vec<u32>],
    (kept_layers, temperature): (usize, f64),
) -> (f64, Vec<String>, Gradients) {
    let example = |(index, tokens): (usize, &Vec<u32>)| Example {
        tokens: tokens.clone(),
        learned: vec![true; tokens.len()],
        row: index as u64,
        line: index as u64 + 1,
        start: 0,
    };
    let examples: Vec<Example> = rows.iter().enumerate().map(example).collect();
    let batch = Batch::new(&examples, &[(0..rows.len()).collect()]);
    let adapter = Arc::new(adapter);
    let (names, parameters): (Vec<String>, Vec<_>) = adapter.parameters().into_iter().unzip();
    let mut state = new_state(decoder, &parameters);
    let count = batch.count() as f64;
    let settings = StepSettings {
        objective: &Objective::LanguageModeling,
        temperature,
        scale: 1.0 / count,
        kept_layers,
        active: &[ActiveAdapter::trainable(adapter.clone())],
        parameters: &parameters,
        dropout: None,
        noise: None,
    };
    let judged = state.accumulate(decoder, &batch, &settings, 0..parameters.len()).unwrap();
    (judged.loss / count, names, state.gradients().unwrap())
}

/// `|a - b| / |b|` in Frobenius norms.
fn relative(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    difference / norm(&mut b.iter().map(|&b| f64::from(b)))
}

#[test]
fn gradients_match_peft() {
    let mut wrong: Vec<String> = Vec::new();
    for (name, base) in
        MODELS.iter().map(|name| (name, name)).chain(ADAPTERS.iter().map(|(a, b)| (a, b)))
    {
        let golden_run = golden_json(&format!("model_families/{name}.json"));
        let theirs = theirs(name);
        let mut files = vec![base.to_string(), format!("{base}.gguf")];
        if golden_run["gguf_positions"].is_u64() {
            files.pop(); // its keys do not say all
        }
        for file in files {
            for (compute, bound) in
                [(Compute::F32, 1e-4f64), (Compute::REFERENCE, 1e-4), (Compute::INT16, 2e-2)]
            {
                for kept in [0, 99] {
                    let decoder = load(&file, compute);
                    let adapter = adapter(name, &decoder);
                    let kept = kept.min(decoder.config.num_hidden_layers);
                    let (loss, names, ours) = step(&decoder, adapter, &rows(name), (kept, 1.0));
                    let error = (loss - golden_run["loss"].as_f64().unwrap()).abs();
                    assert!(error < bound.max(2e-5), "{file} {compute:?}: loss {error:e} off");
                    let gradients = theirs.keys().filter(|name| !name.starts_with("log_probs."));
                    assert_eq!(names.len(), gradients.count());
                    for (name, ours) in names.iter().zip(&ours) {
                        let theirs = theirs[name].flatten_all().unwrap().to_vec1().unwrap();
                        let error = relative(ours, &theirs);
                        if error >= bound {
                            wrong.push(format!(
                                "{file} {compute:?} kept {kept} {name}: {error:e} off; {:?} {:?}",
                                &ours[..4],
                                &theirs[..4]
                            ));
                        }
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Log-probs at a temperature, and their gradients: the softcap is applied first.
#[test]
fn temperatures_agree_in_both_forms() {
    for (name, base) in [
        ("gemma2", "gemma2"),
        ("granite", "granite"),
        ("gemma2-head", "gemma2"),
        ("gemma2-tokens", "gemma2"),
    ] {
        let run = |compute| {
            let decoder = load(base, compute);
            let adapter = adapter(name, &decoder);
            step(&decoder, adapter, &rows(name), (99, 0.6))
        };
        let ((fast, _, ours), (exact, _, needed)) = (run(Compute::F32), run(Compute::REFERENCE));
        assert!((fast - exact).abs() < 1e-5, "{name}: {fast}, portable {exact}");
        for (ours, needed) in ours.iter().zip(&needed) {
            let error = relative(ours, needed);
            assert!(error < 1e-4, "{name}: gradient {error:e} off");
        }

        // And both are those of the logits that are sampled from.
        let (decoder, rows) = (load(base, Compute::F32), rows(name));
        let adapter = Arc::new(adapter(name, &decoder));
        let active = [ActiveAdapter { adapter, weight: 0.8, trainable: false }];
        let hidden = decoder.hidden(&Rows::new(&rows[..1]), Adapters::Same(&active)).unwrap();
        let logits = (decoder.logits(&hidden, Adapters::Same(&active)).unwrap() / 0.6).unwrap();
        let needed = log_softmax(&logits);
        let targets: Vec<u32> = (0..rows[0].len() as u32).collect();
        let found = decoder.log_probs_at_temperature(&hidden, &targets, 0.6, &active).unwrap();
        for ((row, &target), found) in needed.iter().zip(&targets).zip(found) {
            assert!((row[target as usize] - f64::from(found)).abs() < 1e-4, "{name}");
        }
    }
}

/// A row in one pass, and the same through the cache: a prompt in two pieces, then step by step.
#[test]
fn cached_pass_matches_single_pass() {
    for name in MODELS {
        for (compute, bound) in [(Compute::F32, 1e-4), (Compute::REFERENCE, 1e-4)] {
            let decoder = load(name, compute);
            let row = &rows(name)[0];
            let flat = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let logits = |hidden: &Tensor| flat(decoder.logits(hidden, Adapters::NONE).unwrap());
            let whole = logits(&decoder.hidden(&Rows::new(&[row]), Adapters::NONE).unwrap());
            let mut cache = KvCache::with_type(&decoder, 1, CacheType::F32);
            let (mut found, mut seen) = (Vec::new(), 0);
            for piece in [11, 6].into_iter().chain(std::iter::repeat_n(1, row.len() - 17)) {
                let next = Rows::after([(&row[seen..seen + piece], seen)].into_iter());
                let hidden = match piece {
                    1 => decoder.hidden_step(&next, Adapters::NONE, &mut cache).unwrap(),
                    _ => decoder.hidden_cached(&next, Adapters::NONE, &mut cache).unwrap(),
                };
                found.extend(logits(&hidden));
                seen += piece;
            }
            let pairs = found.iter().zip(&whole);
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
            assert!(found.len() == whole.len() && worst < bound, "{name} {compute:?}: {worst}");

            // Some tokens of it alone.
            let chosen = [39, 3, 20];
            let rows = Rows::new(&[row]);
            let some = decoder.hidden_of(&rows, Adapters::NONE, &chosen).unwrap();
            let (some, width) = (logits(&some), whole.len() / row.len());
            for (i, &token) in chosen.iter().enumerate() {
                let needed = &whole[token as usize * width..][..width];
                assert!(relative(&some[i * width..][..width], needed) < 1e-5, "{name} {token}");
            }
        }
    }
}

/// A row that grows beyond the LongRoPE threshold is recomputed, and so is one that continues from a shorter
/// one.
#[test]
fn rows_grow_across_longrope_threshold() {
    let (_folder, checkpoint) = variant("phi3-long");
    for compute in [Compute::F32, Compute::REFERENCE] {
        let decoder = Decoder::load(&checkpoint, compute).unwrap();
        let row = &rows("phi3-long")[0];
        let likeliest = |tokens: &[u32]| -> u32 {
            let last = tokens.len() as u32 - 1;
            let rows = Rows::new(&[tokens]);
            let hidden = decoder.hidden_of(&rows, Adapters::NONE, &[last]).unwrap();
            let logits = decoder.logits(&hidden, Adapters::NONE).unwrap().to_vec2::<f32>().unwrap();
            (0..64u32)
                .max_by(|a, b| logits[0][*a as usize].total_cmp(&logits[0][*b as usize]))
                .unwrap()
        };
        // Prompts before, at and beyond the threshold of 24, with one engine.
        let mut engine = Engine::new(&decoder, CacheType::F32, 2);
        let prompts = [&row[..18], &row[..24], &row[..25], &row[..38]];
        for prompt in prompts {
            engine.submit(Job::new(prompt.to_vec(), 12)).unwrap();
        }
        let mut found = vec![Vec::new(); prompts.len()];
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                if let Event::Finished { id, output } = event {
                    found[id] = output.generated.token_ids;
                }
            }
        }
        // Two rows were recomputed, each when it had a token beyond the threshold.
        let usage = engine.usage();
        let all = prompts.iter().map(|prompt| prompt.len()).sum();
        assert_eq!((usage.prompt_tokens, usage.recomputed_tokens), (all, 2 * 25));
        assert_eq!(usage.tokens, 4 * 12);
        for (prompt, found) in prompts.iter().zip(found) {
            let mut tokens = prompt.to_vec();
            for _ in 0..12 {
                tokens.push(likeliest(&tokens));
            }
            assert_eq!(found, tokens[prompt.len()..], "{compute:?}, a prompt of {}", prompt.len());
        }

        let mut cache = KvCache::with_type(&decoder, 1, CacheType::F32);
        let next = |from: usize, to: usize| Rows::after([(&row[from..to], from)].into_iter());
        decoder.hidden_cached(&next(0, 20), Adapters::NONE, &mut cache).unwrap();
        let error = decoder.hidden_cached(&next(20, 30), Adapters::NONE, &mut cache);
        assert!(error.unwrap_err().to_string().contains("must be computed again"));

        // Packed rows rotate by their own length, whatever else is in the batch.
        let of = |rows: &[&[u32]]| {
            let hidden = decoder.hidden(&Rows::new(rows), Adapters::NONE).unwrap();
            hidden.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let (long, short) = (&row[..30], &row[..20]);
        let both = of(&[short, long, short]);
        assert!(relative(&both, &[of(&[short]), of(&[long]), of(&[short])].concat()) < 1e-5);
    }
}

/// A split model equals the single file bit for bit; opening a later file, or a missing one, is an error.
#[test]
fn split_gguf_matches_single_file() {
    let first = "split-00001-of-00003.gguf";
    let hidden = |file: &str| {
        let decoder = load(file, Compute::F32);
        let hidden = decoder.hidden(&Rows::new(&rows("llama-yarn")), Adapters::NONE).unwrap();
        decoder.logits(&hidden, Adapters::NONE).unwrap().to_vec2::<f32>().unwrap()
    };
    assert_eq!(hidden(first), hidden("llama-yarn.gguf"));

    let open = |path: std::path::PathBuf| Checkpoint::open(path).unwrap_err().to_string();
    let later = open(golden("model_families/split-00002-of-00003.gguf"));
    assert!(later.contains("file 2 of 3 of a split model, needed the first"), "{later}");
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        std::fs::copy(golden(&format!("model_families/{first}")), folder.path().join(name))
            .unwrap();
        folder.path().join(name)
    };
    let renamed = open(copy("model.gguf"));
    assert!(renamed.contains("must end in \"-00001-of-00003.gguf\""), "{renamed}");
    let alone = open(copy(first));
    assert!(alone.contains("split-00002-of-00003.gguf"), "{alone}");
    copy("split-00002-of-00003.gguf");
    let twice = open(folder.path().join(first));
    assert!(twice.contains("its keys do not name it file 2 of 3"), "{twice}");
}

/// A folder quantized on load: the head has at least 6 bits, and rows that are not whole blocks of a type get
/// another type.
#[test]
fn a_folder_is_quantized_on_load() {
    let checkpoint = Checkpoint::open(golden("model_families/qwen3")).unwrap();
    for (of, types, bound) in [
        (BlockType::Q8_0, &["F16", "Q8_0"][..], 1.0),
        (BlockType::Q4_K, &["F16", "Q5_0", "Q8_0"][..], 10.0),
        (BlockType::F16, &["F16"][..], 1e-3),
    ] {
        let decoder = Decoder::load_as(&checkpoint, Compute::F32, Some(of)).unwrap();
        let found: Vec<String> = decoder.kernels().into_keys().collect();
        assert_eq!(found, types);
        let off = worst("qwen3", &decoder, usize::MAX);
        assert!(off < bound, "{of}: off by {off}");
        assert!((off > 1e-3) == (of != BlockType::F16), "{of} changed nothing");
    }
    let gguf = Checkpoint::open(golden("model_families/qwen3.gguf")).unwrap();
    let error = Decoder::load_as(&gguf, Compute::F32, Some(BlockType::Q8_0)).unwrap_err();
    assert!(error.to_string().contains("a GGUF keeps its types"), "{error}");
}
