//! Tokenizers and chat templates against what Python's libraries make of the same files.

use quantune::text::{Special, Tokenizer};
use quantune::weights::Checkpoint;

use crate::support::model_path;

fn open(name: &str) -> Tokenizer {
    Tokenizer::open(&Checkpoint::open(model_path(name)).unwrap()).unwrap()
}

#[test]
fn a_gguf_and_its_folder_agree() {
    let text = "<|im_start|>user\nIt's 2026: naïve 1234 cafés, isn't it?\n\n  日本<|im_end|>";
    for (gguf, folder) in [("llama-q8_0", "llama-tiny"), ("qwen2-mix", "qwen2-tiny")] {
        let (gguf, folder) = (open(gguf), open(folder));
        for special in [Special::Parse, Special::AsText] {
            let ids = gguf.encode(text, special).unwrap();
            assert_eq!(ids, folder.encode(text, special).unwrap());
            assert_eq!(gguf.decode(&ids, false).unwrap(), text);
        }
        assert_eq!((gguf.bos(), gguf.eos()), (folder.bos(), folder.eos()));
    }
}
