//! Tokens added to a vocabulary, compared with transformers and PEFT: ids, ten training steps, files; and the
//! command line, from a base without them to a merged model with them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use candle_core::Tensor;
use quantune::data::Example;
use quantune::model::adapter_files::open_adapter;
use quantune::model::{ActiveAdapter, Adapters, Decoder, Rows};
use quantune::ops::Compute;
use quantune::text::{AddedTokenSpec, Special, Tokenizer, convert};
use quantune::weights::{Checkpoint, Gguf, OwnedValue, stream_gguf};
use quantune_adapters::LoraConfig;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;
use tempfile::TempDir;

use crate::binary::{Lab, base, error, last_json, quantune, strings};
use crate::lora_variants::{apart, read, same_adapter, small_linears, take_steps, tensors};
use crate::support::{golden, golden_json, ids, load, model_path};
use crate::train::rows;

fn texts(value: &Value) -> Vec<String> {
    value.as_array().unwrap().iter().map(|text| text.as_str().unwrap().to_string()).collect()
}

#[test]
fn added_token_ids_match_transformers() {
    let theirs = golden_json("added_tokens/tokens.json");
    let named = (texts(&theirs["add_tokens"]), texts(&theirs["add_special_tokens"]));
    let added = AddedTokenSpec::list(&named.0, &named.1).unwrap();
    let check = |tokenizer: &Tokenizer| {
        assert_eq!(tokenizer.len() as u64, theirs["length"].as_u64().unwrap());
        for (token, id) in theirs["ids"].as_object().unwrap() {
            assert_eq!(tokenizer.id_of(token).map(u64::from), id.as_u64(), "{token:?}");
        }
        for row in theirs["texts"].as_array().unwrap() {
            let text = row["text"].as_str().unwrap();
            let found = tokenizer.encode(text, Special::Parse).unwrap();
            assert_eq!(found, ids(&row["ids"]), "{text:?}");
            assert_eq!(tokenizer.decode(&found, false).unwrap(), text);
            assert_eq!(tokenizer.decode(&found, true).unwrap(), row["plain"].as_str().unwrap());
        }
    };
    let base = Checkpoint::open(model_path("llama-tiny")).unwrap();
    let grown = Tokenizer::open(&base).unwrap().with_added(&base, &added).unwrap();
    check(&grown);
    // The files written beside an adapter are read as a folder.
    let folder = tempfile::tempdir().unwrap();
    let files = convert::files_for_adapter(&base, &grown).unwrap();
    assert!(!files.iter().any(|(_, text)| text.contains("_decoder\": null")));
    write(&files, folder.path());
    check(&Tokenizer::from_folder(folder.path()).unwrap());
    check(&Tokenizer::open_with_adapters(&base, &[folder.path()]).unwrap());
    assert!(grown.missing(folder.path()).unwrap().is_empty());
}

fn write(files: &[(&str, String)], folder: &Path) {
    for (name, text) in files {
        fs::write(folder.join(name), text).unwrap();
    }
}

/// For every kind of tokenizer in a GGUF, the files beside an adapter tokenize the same, and add the same
/// tokens to the base again.
#[test]
fn adapter_folder_adds_its_tokens() {
    let added = AddedTokenSpec::list(
        &["ferry".into(), "lo wo".into()],
        &["<|tool|>".into(), "<|im_end|>".into(), "<|tool|><".into()],
    );
    let added = added.unwrap();
    let files = ["model/llama-q8_0.gguf", "model/qwen2-mix.gguf"];
    let sentencepiece = ["plain", "prefixed"].map(|name| format!("text/sentencepiece/{name}.gguf"));
    for name in files.map(String::from).into_iter().chain(sentencepiece) {
        let base = Checkpoint::open(golden(&name)).unwrap();
        let own = Tokenizer::open(&base).unwrap();
        let (before, grown) = (own.len(), own.with_added(&base, &added).unwrap());
        let new = grown.len() - before;
        assert!((4..=5).contains(&new), "{name}: {new}");
        assert_eq!(grown.id_of("ferry"), Some(before as u32), "{name}");
        let folder = tempfile::tempdir().unwrap();
        write(&convert::files_for_adapter(&base, &grown).unwrap(), folder.path());
        let again = Tokenizer::open_with_adapters(&base, &[folder.path()]).unwrap();
        let read = Tokenizer::from_folder(folder.path()).unwrap();
        for text in ["ferry<|tool|>x lo world hello", "<|im_end|>ferryman", "hello world"] {
            for special in [Special::Parse, Special::AsText] {
                let needed = grown.encode(text, special).unwrap();
                assert_eq!(again.encode(text, special).unwrap(), needed, "{name} {text:?}");
                assert_eq!(read.encode(text, special).unwrap(), needed, "{name} {text:?}");
            }
        }
        // A GGUF that has these tokens already, followed by padding entries.
        let gguf = Gguf::open(golden(&name)).unwrap();
        let rows = grown.len() + 2;
        let keys = convert::keys_with_added_tokens(&gguf, rows, &added).unwrap();
        let own = gguf.metadata().map(|(key, value)| (key.to_string(), value.to_owned()));
        let own = own.filter(|(key, _)| !keys.iter().any(|(other, _)| other == key));
        let new = keys.iter().map(|(key, value)| (key.to_string(), value.clone()));
        let metadata: Vec<(String, OwnedValue)> = own.chain(new).collect();
        let path = folder.path().join("grown.gguf");
        stream_gguf(&path, &metadata, &[], |_, _| Ok(())).unwrap();
        let written = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
        assert_eq!((written.len(), written.vocab_size()), (grown.len(), rows), "{name}");
        for text in ["ferry<|tool|>x lo world", "<|im_end|>ferryman"] {
            let needed = grown.encode(text, Special::Parse).unwrap();
            assert_eq!(written.encode(text, Special::Parse).unwrap(), needed, "{name} {text:?}");
        }
        let about = |t: &Tokenizer| {
            let ends: Vec<u32> =
                (0..t.len() as u32).filter(|id| t.is_end_of_generation(*id)).collect();
            (t.len(), t.bos(), t.eos(), t.adds_bos(), ends)
        };
        assert_eq!(about(&again), about(&grown), "{name}");
    }
}

/// With a normalizer that adds a space in front of texts, a plain token is matched anywhere, in a folder and in
/// a GGUF. One that was added by transformers is matched only after spaces; converting it to a GGUF is an
/// error.
#[test]
fn added_tokens_match_after_any_character() {
    let lab = Lab::new();
    let folder = lab.copied_base("spaced");
    let own = Gguf::open(golden("text/sentencepiece/prefixed.gguf")).unwrap();
    write(&convert::to_folder(&own, &[]).unwrap(), &folder);
    let base = Checkpoint::open(&folder).unwrap();
    let named = AddedTokenSpec::list(&["ferry".into()], &["<|tool|>".into()]).unwrap();
    let grown = Tokenizer::open(&base).unwrap().with_added(&base, &named).unwrap();
    let id = grown.id_of("ferry").unwrap();
    let found = |tokenizer: &Tokenizer, text: &str| {
        tokenizer.encode(text, Special::Parse).unwrap().contains(&id)
    };
    let texts = ["ferry", "a ferry", "aferryb", "<|tool|>ferry <|tool|>a"];
    assert!(texts.iter().all(|text| found(&grown, text)));
    let beside = tempfile::tempdir().unwrap();
    write(&convert::files_for_adapter(&base, &grown).unwrap(), beside.path());
    let again = Tokenizer::open_with_adapters(&base, &[beside.path()]).unwrap();
    let keys = convert::to_gguf(&folder, grown.vocab_size(), again.added()).unwrap();
    let path = beside.path().join("grown.gguf");
    stream_gguf(&path, &keys, &[], |_, _| Ok(())).unwrap();
    let written = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
    for text in texts {
        let needed = grown.encode(text, Special::Parse).unwrap();
        assert_eq!(again.encode(text, Special::Parse).unwrap(), needed, "{text:?}");
        assert_eq!(written.encode(text, Special::Parse).unwrap(), needed, "{text:?}");
    }

    let path = beside.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let tokens = json["added_tokens"].as_array_mut().unwrap();
    let token = tokens.iter_mut().find(|token| token["content"] == "ferry").unwrap();
    token["normalized"] = true.into();
    fs::write(&path, json.to_string()).unwrap();
    let theirs = Tokenizer::open_with_adapters(&base, &[beside.path()]).unwrap();
    assert!(found(&theirs, "a ferry") && !found(&theirs, "aferryb"));
    let error = convert::to_gguf(&folder, grown.vocab_size(), theirs.added()).unwrap_err();
    let error = error.to_string();
    let needed = "the added token \"ferry\" is looked for as";
    assert!(error.contains(needed), "{error}");
    // The same with the GGUF itself; and beside an adapter that matches it differently.
    let gguf = Checkpoint::Gguf(own);
    let error = open_with_adapters(&gguf, &[&beside]).unwrap_err();
    assert!(error.contains(needed), "{error}");
    let other = beside_of(&base, &named, &[]);
    for (folders, words) in
        [([&beside, &other], "is false, needed true"), ([&other, &beside], "is true, needed false")]
    {
        let error = open_with_adapters(&base, &folders).unwrap_err();
        let needed = format!("normalized of the token \"ferry\" {words}");
        assert!(error.contains(&needed), "{error}");
    }
    // A special token is used for both.
    let mark = beside_of(&base, &AddedTokenSpec::list(&[], &["ferry".into()]).unwrap(), &[]);
    for folders in [[&beside, &mark], [&mark, &beside]] {
        let both = open_with_adapters(&base, &folders).unwrap();
        assert!(both.is_special(id) && found(&both, "aferryb"));
    }
}

/// The files beside an adapter that added tokens to a base, with changes to its vocabulary.
fn beside_of(base: &Checkpoint, added: &[AddedTokenSpec], changes: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let grown = Tokenizer::open(base).unwrap().with_added(base, added).unwrap();
    write(&convert::files_for_adapter(base, &grown).unwrap(), folder.path());
    let path = folder.path().join("tokenizer.json");
    let mut text = fs::read_to_string(&path).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{from}");
        text = text.replace(from, to);
    }
    fs::write(&path, text).unwrap();
    folder
}

fn open_with_adapters(base: &Checkpoint, folders: &[&TempDir]) -> Result<Tokenizer, String> {
    let folders: Vec<&Path> = folders.iter().map(|folder| folder.path()).collect();
    Tokenizer::open_with_adapters(base, &folders).map_err(|error| error.to_string())
}

/// Whichever adapter comes first, and whichever brings more.
#[test]
fn adapter_of_another_base_is_an_error_in_any_order() {
    let base = Checkpoint::open(model_path("llama-tiny")).unwrap();
    let named = |tokens: &[&str]| AddedTokenSpec::list(&strings(tokens), &[]).unwrap();
    let ours = beside_of(&base, &named(&["ferry", "other", "third"]), &[]);
    let theirs = beside_of(&base, &named(&["ferry"]), &[("\"<|endoftext|>\"", "\"<|begin|>\"")]);
    for folders in [[&ours, &theirs], [&theirs, &ours]] {
        let error = open_with_adapters(&base, &folders).unwrap_err();
        let needed = "token 0 is \"<|begin|>\", needed the base's \"<|endoftext|>\"";
        assert!(error.contains(needed), "{error}");
    }
    // The base's last token stays the base's, also where an adapter made it a special token.
    let last = Tokenizer::open(&base).unwrap().token(511).unwrap();
    let marked =
        beside_of(&base, &AddedTokenSpec::list(&[], std::slice::from_ref(&last)).unwrap(), &[]);
    let theirs = beside_of(&base, &named(&["ferry"]), &[]);
    let path = theirs.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    json["model"]["merges"].as_array_mut().unwrap().pop(); // what made it
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.remove(&last).unwrap();
    vocab.insert("another".into(), 511.into());
    fs::write(&path, json.to_string()).unwrap();
    for folders in [&[&theirs][..], &[&marked, &theirs]] {
        let error = open_with_adapters(&base, folders).unwrap_err();
        let needed = format!("token 511 is \"another\", needed the base's {last:?}");
        assert!(error.contains(&needed), "{error}");
    }
}

#[test]
fn invalid_added_tokens_are_errors() {
    let list = |tokens: &[&str], special: &[&str]| {
        AddedTokenSpec::list(&strings(tokens), &strings(special)).unwrap_err().to_string()
    };
    assert!(list(&["a", ""], &[]).contains("is empty"));
    assert!(list(&["a"], &["b", "a"]).contains("\"a\" is named twice"));
}

/// The rows of a run with every fifth token one that was added.
fn rows_with_added() -> Vec<Example> {
    let mut rows = rows("llama-tiny");
    for token in rows.iter_mut().flat_map(|row| &mut row.tokens) {
        if *token > 2 && *token % 5 == 0 {
            *token = 512 + *token / 5 % 2;
        }
    }
    rows
}

#[test]
fn ten_training_steps_with_added_tokens_match_peft() {
    for run in ["tied", "untied", "embedding-and-head", "head-tied"] {
        let theirs = golden_json(&format!("added_tokens/{run}/run.json"));
        let decoder = load(theirs["base"].as_str().unwrap(), Compute::F32);
        let decoder = decoder.with_vocabulary(514).unwrap();
        let folder = |name: &str| golden(&format!("added_tokens/{run}/{name}"));
        let adapter = Arc::new(read(&folder("initial"), &decoder.linears()));
        take_steps(run, &theirs, &decoder, &adapter, &rows_with_added());
        let last = read(&folder("final"), &decoder.linears());
        same_adapter(run, &adapter, &last);
        assert_eq!(adapter.head_tokens.is_some(), run == "untied");
        // Writing it gives the same files.
        let config = LoraConfig::from_json(&last.config.to_json()).unwrap();
        assert_eq!(config, last.config);
    }
}

/// PEFT's folders over a resized vocabulary, whole matrices and copies included.
#[test]
fn peft_files_of_resized_vocabularies_match_peft() {
    let cases = [
        ("tokens", false),
        ("tokens-tied", true),
        ("both", false),
        ("both-tied", true),
        ("whole", false),
    ];
    for (name, tied) in cases {
        let folder = golden(&format!("added_tokens/files/{name}"));
        let adapter = read(&folder, &small_linears(18));
        let ends = tensors(&folder.join("ends.safetensors"));
        assert_eq!(adapter.head_tokens.is_some(), name == "both", "{name}");
        for (module, needed) in &ends {
            let rows = match module.as_str() {
                "lm_head" => adapter.head_rows(tied).map(|(rows, _)| rows),
                _ => adapter.tokens.as_ref(),
            };
            let (ours, needed): (Tensor, Tensor) = match (adapter.saved.get(module), rows) {
                (Some(whole), _) => (whole.as_detached_tensor(), needed.clone()),
                (None, Some(own)) => {
                    let places = Tensor::new(&own.indices[..], needed.device()).unwrap();
                    let needed = needed.index_select(&places, 0).unwrap();
                    (own.rows.as_detached_tensor(), needed)
                }
                (None, None) => panic!("{name}: nothing of {module}"),
            };
            let distance = apart(&ours, &needed);
            assert!(distance < 1e-6, "{name} {module}: {distance:e} from PEFT's");
        }
    }
}

const NAMED: [&str; 4] = ["--add-tokens", "ferry,question", "--add-special-tokens", "<|tool|>"];

fn sft(lab: &Lab, base: &str, out: &str, more: &[&str]) -> Vec<String> {
    let (rows, out) = (lab.path("rows.jsonl"), lab.path(out));
    let mut args = strings(&["sft", "--base", base, "--data", &rows, "--out", &out, "--json"]);
    args.extend(strings(&["--learning-rate", "1e-2", "--compute", "f32"]));
    if !more.contains(&"--adapter") {
        args.extend(strings(&["--r", "2"]));
    }
    args.extend(strings(&["--max-steps", "2", "--lr-scheduler-type", "constant"]));
    args.extend(strings(more));
    args
}

/// A run on a base without the tokens, then every command that reads its adapter: held-out losses are the
/// same.
#[test]
fn adapter_with_added_tokens_works_end_to_end() {
    let lab = Lab::new();
    for name in ["llama-tiny", "llama-untied", "llama-q8_0"] {
        let base = model_path(name).display().to_string();
        last_json(&quantune(&sft(&lab, &base, name, &NAMED)));
        let adapter = lab.path(&format!("{name}/adapter"));
        let config = fs::read_to_string(format!("{adapter}/adapter_config.json")).unwrap();
        let config = LoraConfig::from_json(&config).unwrap();
        assert_eq!(config.trainable_token_indices, [512, 513, 514]);
        let of_head: &[u32] = if name == "llama-untied" { &[512, 513, 514] } else { &[] };
        assert_eq!(config.head_token_indices, of_head);
        assert!(Path::new(&adapter).join("tokenizer.json").exists());

        let loss = |base: &str, more: &[&str]| -> f64 {
            let data = lab.path("held_out.jsonl");
            let mut args = strings(&["eval", "--base", base, "--data", &data, "--json"]);
            args.extend(strings(&["--compute", "f32"]));
            args.extend(strings(more));
            last_json(&quantune(&args))["loss"].as_f64().unwrap()
        };
        let beside = loss(&base, &["--adapter", &adapter]);
        let export = |command: &str, out: &str, more: &[&str]| {
            let out = lab.path(out);
            let mut args = strings(&[command, "--base", &base, "--adapter", &adapter]);
            args.extend(strings(&["--out", &out, "--json"]));
            args.extend(strings(more));
            (quantune(&args), out)
        };
        let again = format!("{name}-again");
        last_json(&export("export", &again, &[]).0);
        let again = loss(&base, &["--adapter", &lab.path(&again)]);
        assert_eq!(again, beside, "{name} exported");
        for form in [format!("{name}.gguf"), format!("{name}-merged")] {
            if form == "llama-q8_0-merged" {
                continue;
            }
            let (output, out) = export("merge", &form, &["--type", "F32"]);
            last_json(&output);
            let merged = loss(&out, &[]);
            assert!((merged - beside).abs() < 1e-5, "{form}: {merged}, beside the base {beside}");
            let checkpoint = Checkpoint::open(&out).unwrap();
            let tokenizer = Tokenizer::open(&checkpoint).unwrap();
            assert_eq!(tokenizer.encode("<|tool|>ferry", Special::Parse).unwrap(), [514, 512]);
            assert!(tokenizer.is_special(514) && !tokenizer.is_special(512), "{form}");
            let decoder = Decoder::load(&checkpoint, Compute::F32).unwrap();
            assert_eq!(decoder.config.vocab_size, 515, "{form}");
        }
        let (output, _) = export("export", "lora.gguf", &[]);
        assert!(error(&output).contains("token rows of its own: merge it instead"));
        let prompt = ["generate", "--base", &base, "--adapter", &adapter, "--prompt", "<|tool|>"];
        let mut args = strings(&prompt);
        args.extend(strings(&["--raw", "--max-tokens", "3", "--json"]));
        last_json(&quantune(&args));
        // The adapter with a decoder that was loaded without its tokens.
        let error = open_adapter(Path::new(&adapter), "hot", &load(name, Compute::F32));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("needed less than 512") && error.contains("tokenizer.json"),
            "{error}"
        );
    }
}

/// An end-of-turn token of the adapter is a stop token in the Modelfile; the report measures a text with added
/// tokens like `eval`.
#[test]
fn modelfile_and_report_use_added_tokens() {
    let lab = Lab::new();
    let base = lab.copied_base("turns");
    let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|eot_id|>\n\
                    {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    fs::write(base.join("chat_template.jinja"), template).unwrap();
    let base = base.display().to_string();
    let named = ["--add-tokens", "several,again", "--add-special-tokens", "<|eot_id|>"];
    last_json(&quantune(&sft(&lab, &base, "run", &named)));
    let adapter = lab.path("run/adapter");
    let (out, modelfile) = (lab.path("exported"), lab.path("Modelfile"));
    let common = ["--base", &base, "--adapter", &adapter, "--json"];
    let args = [&["export"], &common[..], &["--out", &out, "--modelfile", &modelfile]].concat();
    last_json(&quantune(&strings(&args)));
    let text = fs::read_to_string(modelfile).unwrap();
    assert!(text.contains("PARAMETER stop \"<|eot_id|>\""), "{text}");

    let text = ["--n-ctx", "32", "--threads", "1"];
    let (out, words) = (lab.path("merged.gguf"), lab.path("text.txt"));
    let of_merge = ["--type", "F32", "--out", &out, "--report", &words];
    let merge = [&["merge"], &common[..], &text, &of_merge].concat();
    let lines = last_json(&quantune(&strings(&merge)))["report"].clone();
    let eval = [&["eval"], &common[..], &text, &["--text", &words, "--compute", "f32"]].concat();
    let needed = last_json(&quantune(&strings(&eval)))["perplexity"].as_f64().unwrap();
    for line in lines.as_array().unwrap().iter().filter(|line| line["name"] != "merged, F16") {
        let found = line["perplexity"].as_f64().unwrap();
        assert!((found / needed - 1.0).abs() < 1e-4, "{line}: eval has {needed}");
    }
}

#[test]
fn run_with_added_tokens_resumes_to_the_same_bytes() {
    let lab = Lab::new();
    let more = ["--max-steps", "3", "--save-steps", "1", "--save-total-limit", "0"];
    let named = [&NAMED[..], &more[2..]].concat();
    let mut args = sft(&lab, &base(), "run", &named);
    let steps = args.iter().position(|arg| arg == "--max-steps").unwrap();
    args[steps + 1] = more[1].into();
    last_json(&quantune(&args));
    let run = lab.folder.path().join("run");
    let files = ["adapter_model.safetensors", "tokenizer.json"];
    let bytes = || files.map(|file| fs::read(run.join("adapter").join(file)).unwrap());
    let before = bytes();
    for gone in ["adapter", "checkpoints/step-3", "checkpoints/step-2"] {
        fs::remove_dir_all(run.join(gone)).unwrap();
    }
    let out = run.display().to_string();
    let resume = |more: &[&str]| {
        let mut args = strings(&["sft", "--out", &out, "--resume", "--json"]);
        args.extend(strings(more));
        quantune(&args)
    };
    let other = error(&resume(&["--add-tokens", "ferry"]));
    assert!(other.contains("add_tokens was [\"ferry\", \"question\"], is [\"ferry\"]"), "{other}");
    assert_eq!(last_json(&resume(&[]))["resumed_at"], 1);
    assert!(bytes() == before);
}

#[test]
fn conflicting_added_tokens_are_errors() {
    let lab = Lab::new();
    let check = |more: &[&str], needed: &str| {
        let found = error(&quantune(&sft(&lab, &base(), "none", more)));
        assert!(found.contains(needed), "{more:?}: {found:?} should say {needed:?}");
    };
    check(&["--add-tokens", "a,,b"], "an added token is empty");
    check(&["--add-tokens", "a", "--add-special-tokens", "a"], "\"a\" is named twice");
    last_json(&quantune(&sft(&lab, &base(), "run", &NAMED)));
    let adapter = lab.path("run/adapter");
    check(
        &["--adapter", &adapter, "--add-tokens", "new"],
        "has no rows for, needed a fresh adapter",
    );
    // Adding tokens that it has already changes nothing; more may be added.
    last_json(&quantune(&sft(
        &lab,
        &base(),
        "on",
        &["--add-tokens", "ferry", "--frozen-adapter", &adapter],
    )));
    last_json(&quantune(&sft(
        &lab,
        &base(),
        "top",
        &["--add-tokens", "new", "--frozen-adapter", &adapter],
    )));
    let top = fs::read_to_string(lab.path("top/adapter/adapter_config.json")).unwrap();
    assert_eq!(LoraConfig::from_json(&top).unwrap().trainable_token_indices, [515]);
    // Two adapters with other tokens under the same ids, whichever has more.
    for (out, tokens) in [("fewer", "other"), ("same", "a1,b1,c1"), ("more", "a1,b1,c1,d1")] {
        last_json(&quantune(&sft(&lab, &base(), out, &["--add-tokens", tokens])));
        let other = lab.path(&format!("{out}/adapter"));
        check(
            &["--frozen-adapter", &adapter, "--frozen-adapter", &other],
            "needed \"ferry\", which was added already",
        );
    }
    // An adapter of another base.
    let path = format!("{adapter}/tokenizer.json");
    let text = fs::read_to_string(&path).unwrap();
    let changed = text.replace("\"<|endoftext|>\"", "\"<|begin|>\"");
    assert_ne!(text, changed);
    fs::write(&path, changed).unwrap();
    check(
        &["--adapter", &adapter],
        "token 0 is \"<|begin|>\", needed the base's \"<|endoftext|>\"",
    );
}

/// Updates of embedding and head from before tokens were added give the same results as before, and do not
/// change the new tokens; in a PEFT folder and in a GGUF LoRA.
#[test]
fn older_embedding_and_head_updates_do_not_change_added_tokens() {
    let lab = Lab::new();
    let base = model_path("llama-untied").display().to_string();
    let train = |out: &str, more: &[&str]| quantune(&sft(&lab, &base, out, more));
    last_json(&train("ends", &["--target-modules", "q_proj", "embed_tokens", "lm_head"]));
    last_json(&train("head", &["--target-modules", "q_proj", "lm_head"]));
    let (ends, head) = (lab.path("ends/adapter"), lab.path("head/adapter"));
    let gguf = lab.path("head.gguf");
    let export = ["export", "--base", &base, "--adapter", &head, "--out", &gguf, "--json"];
    last_json(&quantune(&strings(&export)));
    let row: Vec<u32> = vec![5, 9, 30, 7, 11];
    for path in [&ends, &head, &gguf] {
        let says = |vocabulary: usize, uses_adapter: bool, row: &[u32]| {
            let decoder = load("llama-untied", Compute::F32).with_vocabulary(vocabulary).unwrap();
            let adapter = open_adapter(Path::new(path), "older", &decoder).unwrap().0;
            let active = [ActiveAdapter::frozen(Arc::new(adapter))];
            let adapters = Adapters::Same(if uses_adapter { &active } else { &[] });
            let hidden = decoder.hidden(&Rows::new(&[row]), adapters).unwrap();
            let logits = decoder.logits(&hidden, adapters).unwrap().to_vec2::<f32>().unwrap();
            let mut embedded = Vec::new();
            let rows = Rows::new(&[&[512u32, 513]]);
            if vocabulary == 514 {
                let pass = decoder.pass(&rows, adapters, None);
                decoder.embed_into(&rows.tokens, &pass, &mut embedded).unwrap();
            }
            (logits, embedded)
        };
        let (before, _) = says(512, true, &row);
        let (after, embedded) = says(514, true, &row);
        for (before, after) in before.iter().zip(&after) {
            assert_eq!(after[..512], before[..], "{path}");
        }
        assert_eq!(embedded, says(514, false, &row).1, "{path}");
    }
    // In training too; an adapter with a whole head is an error.
    last_json(&train("top", &["--frozen-adapter", &ends, "--add-tokens", "new"]));
    last_json(&train("whole", &["--modules-to-save", "lm_head"]));
    let whole = lab.path("whole/adapter");
    let told = error(&train("none", &["--frozen-adapter", &whole, "--add-tokens", "new"]));
    let needed = "lm_head.weight is [512, 64], needed [513, 64]: tokens were added";
    assert!(told.contains(needed), "{told}");
}

/// Beside updates of embedding and head PEFT writes the rows that added tokens had in its base. Different rows
/// are an error: the adapter would give another model here.
#[test]
fn differing_rows_of_added_tokens_are_errors() {
    let lab = Lab::new();
    let base = model_path("llama-untied").display().to_string();
    let more = ["--target-modules", "embed_tokens", "lm_head", "--add-tokens", "ferry"];
    last_json(&quantune(&sft(&lab, &base, "run", &more)));
    let decoder = load("llama-untied", Compute::F32).with_vocabulary(513).unwrap();
    let folder = lab.folder.path().join("run/adapter");
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    let open = |change: &dyn Fn(&mut f32)| with_head_rows(&folder, &bytes, &decoder, change);
    assert_eq!(open(&|_| ()), Ok(()));
    assert_eq!(open(&|v| *v += 1e-5), Ok(()), "the noise of transformers' mean_resizing");
    for change in [|v: &mut f32| *v += 0.1, |v: &mut f32| *v = f32::NAN] {
        let error = open(&change).unwrap_err();
        let needed = "the row of token 512, which was added, is not the mean";
        assert!(error.contains(needed), "{error}");
    }

    // Rows that the adapter replaces are not compared.
    let base = model_path("llama-tiny").display().to_string();
    let more = ["--target-modules", "q_proj", "lm_head", "--add-tokens", "ferry"];
    last_json(&quantune(&sft(&lab, &base, "tied", &more)));
    let decoder = load("llama-tiny", Compute::F32).with_vocabulary(513).unwrap();
    let folder = lab.folder.path().join("tied/adapter");
    let adapter = read(&folder, &decoder.linears());
    assert!(adapter.modules.contains_key("lm_head"));
    assert_eq!(adapter.tokens.unwrap().indices, [512]);
    let bytes = fs::read(folder.join("adapter_model.safetensors")).unwrap();
    assert_eq!(with_head_rows(&folder, &bytes, &decoder, &|v| *v += 0.1), Ok(()));
}

/// Opens an adapter whose file has a head of its base with a changed row of an added token.
fn with_head_rows(
    folder: &Path,
    bytes: &[u8],
    decoder: &Decoder,
    change: &dyn Fn(&mut f32),
) -> Result<(), String> {
    let weight = decoder.linear_weight("lm_head").unwrap();
    let cols = weight.cols();
    let mut rows = vec![0.0; 513 * cols];
    weight.read_tile(0..513, 0..cols, &mut rows);
    rows[512 * cols..].iter_mut().for_each(change);
    let rows: Vec<u8> = rows.iter().flat_map(|v| v.to_le_bytes()).collect();
    let file = SafeTensors::deserialize(bytes).unwrap();
    let mut tensors = file.tensors();
    let view = TensorView::new(Dtype::F32, vec![513, cols], &rows).unwrap();
    tensors.push(("base_model.model.lm_head.base_layer.weight".into(), view));
    let path = folder.join("adapter_model.safetensors");
    fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    open_adapter(folder, "theirs", decoder).map(|_| ()).map_err(|error| error.to_string())
}

/// A base with a row without a token: the first added token takes this row and its values, and the second
/// gets a new row, the mean of all; in a folder, and in a GGUF with a padding entry.
#[test]
fn added_tokens_reuse_padding_rows() {
    let lab = Lab::new();
    let folder = lab.folder.path().join("idle");
    fs::create_dir_all(&folder).unwrap();
    for file in fs::read_dir(model_path("llama-untied")).unwrap() {
        let file = file.unwrap().path();
        fs::copy(&file, folder.join(file.file_name().unwrap())).unwrap();
    }
    let path = folder.join("tokenizer.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    let vocab = json["model"]["vocab"].as_object_mut().unwrap();
    vocab.retain(|_, id| *id != 511);
    json["model"]["merges"].as_array_mut().unwrap().pop(); // what made it
    fs::write(&path, json.to_string()).unwrap();
    let (base, gguf) = (folder.display().to_string(), lab.path("idle.gguf"));
    let quantize = ["quantize", "--base", &base, "--out", &gguf, "--type", "Q8_0", "--json"];
    last_json(&quantune(&strings(&quantize)));

    for (name, base) in [("folder", &base), ("gguf", &gguf)] {
        let more = ["--add-special-tokens", "<|a|>,<|b|>", "--weight-decay", "0"];
        let mut args = sft(&lab, base, name, &more);
        let rate = args.iter().position(|arg| arg == "--learning-rate").unwrap();
        args[rate + 1] = "0".into();
        last_json(&quantune(&args));
        let decoder = Decoder::load(&Checkpoint::open(base).unwrap(), Compute::F32).unwrap();
        let decoder = decoder.with_vocabulary(513).unwrap();
        let adapter = read(&lab.folder.path().join(name).join("adapter"), &decoder.linears());
        let ends = [("model.embed_tokens", adapter.tokens), ("lm_head", adapter.head_tokens)];
        for (module, own) in ends {
            let (own, base) = (own.unwrap(), decoder.linear_weight(module).unwrap());
            let mut idle = vec![0.0; base.cols()];
            base.read_row(511, &mut idle);
            assert_eq!(own.indices, [511, 512], "{name} {module}");
            assert_eq!(
                own.rows.to_vec2::<f32>().unwrap(),
                [idle, base.mean_row()],
                "{name} {module}"
            );
        }
        // With updates of both matrices no row is trained by itself; unused and new rows are the base's.
        let name = &format!("{name}-ends");
        let ends = ["--target-modules", "q_proj", "embed_tokens", "lm_head"];
        last_json(&quantune(&sft(&lab, base, name, &[&more[..2], &ends].concat())));
        let adapter = read(&lab.folder.path().join(name).join("adapter"), &decoder.linears());
        assert!(adapter.tokens.is_none() && adapter.head_tokens.is_none(), "{name}");
        assert_eq!(adapter.modules["lm_head"].out_features(), 513, "{name}");
        assert_eq!(adapter.modules["model.embed_tokens"].in_features(), 513, "{name}");
        for run in [name.trim_end_matches("-ends"), name] {
            let adapter = lab.path(&format!("{run}/adapter"));
            for form in [format!("{run}.merged.gguf"), format!("{run}-merged")] {
                let out = lab.path(&form);
                let args =
                    ["merge", "--base", base, "--adapter", &adapter, "--out", &out, "--json"];
                last_json(&quantune(&strings(&args)));
                let merged = Checkpoint::open(&out).unwrap();
                let tokenizer = Tokenizer::open(&merged).unwrap();
                assert_eq!((tokenizer.len(), tokenizer.id_of("<|b|>")), (513, Some(512)), "{form}");
                assert_eq!(tokenizer.encode("a<|a|>", Special::Parse).unwrap()[1], 511, "{form}");
            }
        }
    }
}
