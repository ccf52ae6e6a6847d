#!/usr/bin/env bash
# Compares the tokenizer with llama.cpp's own tests: vocabularies, texts and ids from its tree, fetched
# as the pinned sdist of llama-cpp-python (about 80 MB; nothing of it is built).
#
#   scripts/check/tokenizer.sh [FOLDER]     FOLDER keeps what was fetched [default: target/llama.cpp]
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-target/llama.cpp}
version=0.3.36
sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

mkdir -p "$folder"
sdist=$folder/llama_cpp_python-$version.tar.gz
if [ ! -f "$sdist" ]; then
    python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$folder" "llama-cpp-python==$version"
fi
echo "$sha256  $sdist" | sha256sum --check --quiet
models=$folder/llama_cpp_python-$version/vendor/llama.cpp/models
[ -d "$models" ] || tar -xzf "$sdist" -C "$folder" "llama_cpp_python-$version/vendor/llama.cpp/models"

cargo build --workspace --example tokenize
tokenize=${CARGO_TARGET_DIR:-target}/debug/examples/tokenize

python3 - "$tokenize" "$models" <<'PYTHON'
import json, subprocess, sys, tempfile
tokenize, models = sys.argv[1:]
names = "command-r deepseek-coder deepseek-llm falcon gpt-2 llama-bpe mpt qwen2 qwen35 refact starcoder"
wrong = 0
for name in names.split():
    vocabulary = f"{models}/ggml-vocab-{name}.gguf"
    with open(vocabulary + ".inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    with open(vocabulary + ".out") as file:
        needed = [[int(id) for id in line.split()] for line in file.read().split("\n")]
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="") as file:
        file.write("\x1e".join(texts))
        file.flush()
        lines = subprocess.run([tokenize, vocabulary, file.name], check=True, capture_output=True, text=True).stdout
    found = [json.loads(line) for line in lines.splitlines()]
    bad = [text for text, ids, want in zip(texts, found, needed) if ids != want]
    wrong += len(bad)
    print(f"{name}: {len(texts) - len(bad)} of {len(texts)} texts agree")
    for text in bad:
        print(f"  {text!r} does not")
for name, text in (("llama-spm", "is"), ("bert-bge", "is"), ("gpt-neox", "tokenizer.ggml.pre")):
    refused = subprocess.run([tokenize, f"{models}/ggml-vocab-{name}.gguf", "/dev/null"], capture_output=True, text=True)
    if refused.returncode == 0 or text not in refused.stderr:
        print(f"{name}: not refused: {refused.stderr}")
        wrong += 1
sys.exit(wrong > 0)
PYTHON
echo "the tokenizer agrees with llama.cpp"
