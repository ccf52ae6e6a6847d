#!/usr/bin/env bash
# A small model from start to end on two cores: random weights, real text of three kinds, a base, an assistant, a reward
# model, PPO, one merged file.
#
#   scripts/pipelines/speedrun.sh [RUN_DIRECTORY]     [default: runs/speedrun]
#
#   tokenizer   byte-level BPE from the texts
#   pretrain    a Llama of 5 million parameters without its embedding, on Wikipedia, documentation and drama
#   quantize    the base in 8-bit blocks
#   sft         short conversations
#   reward      which of two film reviews people rate higher
#   ppo         reviews that the reward model rates higher
#   merge       base and adapter in one GGUF, in 8-bit blocks
#   export      the adapter of the conversations as a GGUF LoRA and a Modelfile
#   samples     three of each model
#
# TOKENS (pretraining's), PRESET and VOCAB are below. Needs Rust, and Python 3 with pip for the downloads (about 60 MB). A stage
# whose result exists is skipped; a run that was stopped continues.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
out="${1:-$root/runs/speedrun}"
[[ "$out" == /* ]] || out="$PWD/$out"
cd "$root"
tokens="${TOKENS:-3000000}"
preset="${PRESET:-tiny}"
vocab="${VOCAB:-4096}"

quantune="${CARGO_TARGET_DIR:-$root/target}/release/quantune"
mixture=data/mixture
reviews=data/sentiment

stage() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }

# A command whose last line is kept: NAME COMMAND ARGUMENTS...
keep() {
    local name="$1" began="$SECONDS"
    shift
    if [[ -s "$out/$name.json" ]]; then
        echo "$name is there already"
        return
    fi
    "$quantune" "$@" --json | tail -n 1 >"$out/$name.partial"
    mv "$out/$name.partial" "$out/$name.json"
    echo "$((SECONDS - began))" >"$out/$name.seconds"
}

# The same for a training run, which continues if it was stopped: NAME COMMAND FLAGS...
train() {
    local name="$1" command="$2"
    shift 2
    if [[ -f "$out/$name/config.toml" ]]; then
        keep "$name" "$command" --out "$out/$name" --resume
    else
        keep "$name" "$command" --out "$out/$name" "$@"
    fi
}

if [[ ! -x "$quantune" || -z "${NO_BUILD:-}" ]]; then
    stage "Build"
    cargo build --release --bin quantune
fi
mkdir -p "$out"
stage "Fetch the texts, the conversations and the ratings"
[[ -f "$mixture/drama.jsonl" ]] || python3 scripts/fetch/mixture.py
[[ -f data/chatterbot.train.jsonl ]] || python3 scripts/fetch/chatterbot.py
[[ -f "$reviews/pairs.train.jsonl" ]] || python3 scripts/fetch/sentiment.py

stage "Tokenizer of $vocab tokens"
[[ -s "$out/tokenizer.json" ]] || rm -rf "$out/tokenizer"
keep tokenizer tokenizer train --data "$mixture/*.jsonl" --vocab-size "$vocab" --out "$out/tokenizer"

stage "Pretrain on $tokens tokens"
train pretrain pretrain --tokenizer "$out/tokenizer" --preset "$preset" --max-tokens "$tokens" --max-length 256 \
    --source "wikipedia=0.6:$mixture/wikipedia.jsonl" "documentation=0.25:$mixture/documentation.jsonl" \
    "drama=0.15:$mixture/drama.jsonl" --learning-rate 2e-3 --eval-steps 500 --sample-steps 500 \
    --sample-prompt "The history of" "The function returns" "HAMLET"

stage "Quantize"
keep quantize quantize --base "$out/pretrain/model" --out "$out/base.gguf" --type Q8_0
base="$out/base.gguf"

stage "SFT on conversations, and on what reviews look like"
train sft sft --base "$base" --data data/chatterbot.train.jsonl --eval-data data/chatterbot.heldout.jsonl \
    --num-train-epochs 2 --max-length 256 --learning-rate 1e-3 --per-device-train-batch-size 8 --gradient-accumulation-steps 1
train reviewer sft --base "$base" --data "$reviews/sft.jsonl" --max-length 256 --max-steps 150 --learning-rate 1e-3 \
    --per-device-train-batch-size 4 --gradient-accumulation-steps 1

stage "Reward model on pairs of reviews"
train reward reward --base "$base" --data "$reviews/pairs.train.jsonl" --eval-data "$reviews/pairs.heldout.jsonl" \
    --learning-rate 1e-3 --max-length 256

stage "PPO"
train ppo ppo --base "$base" --adapter "$out/reviewer/adapter" --reward-adapter "$out/reward/adapter" \
    --data "$reviews/prompts.train.jsonl" --eval-data "$reviews/prompts.heldout.jsonl" --eval-strategy steps --eval-steps 10 \
    --eval-prompts 64 --sample-steps 10 --max-steps 20 --batch-size 32 --num-ppo-epochs 2 --num-mini-batches 2 \
    --response-length 24 --temperature 1 --kl-coef 0.05 --normalize-scores --learning-rate 1e-3 \
    --per-device-train-batch-size 32 --min-reward-accuracy 0.55

stage "Merge"
for name in sft ppo; do
    keep "merge-$name" merge --base "$base" --adapter "$out/$name/adapter" --out "$out/$name.gguf" --type Q8_0
done

stage "Export"
keep export export --base "$base" --adapter "$out/sft/adapter" --out "$out/sft-lora.gguf"

stage "Three samples of each"
say() {
    printf '%-6s > %s\n' "$1" "$2"
    "$quantune" generate --base "$3" --prompt "$2" --max-tokens 40 --temperature 0.7 "${@:4}" | tr '\n' ' '
    echo
}
{
    for prompt in "The history of" "The function returns" "HAMLET"; do
        say base "$prompt" "$base" --raw
    done
    for prompt in "Hello, how are you?" "What is your name?" "Tell me a joke."; do
        say sft "$prompt" "$out/sft.gguf"
    done
    for prompt in "The film is" "An interesting story" "The actors"; do
        say review "$prompt" "$base" --adapter "$out/reviewer/adapter" --raw
        say ppo "$prompt" "$out/ppo.gguf" --raw
    done
} 2>>"$out/generate.log" | tee "$out/samples.txt"

stage "Table"
python3 scripts/pipelines/report_speedrun.py "$out"
