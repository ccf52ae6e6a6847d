#!/usr/bin/env bash
# A task whose answers can be counted, from data to report: sums in words ("What is seven plus twelve?"), learned a little by
# fine-tuning and then by GRPO from right and wrong answers alone.
#
#   scripts/pipelines/sums.sh [RUN_DIRECTORY]     [default: runs/sums]
#
# Needs Rust, and Python 3 with pip for the model's download.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
out="${1:-$root/runs/sums}"
[[ "$out" == /* ]] || out="$PWD/$out"
cd "$root"
quantune="${CARGO_TARGET_DIR:-$root/target}/release/quantune"
base=models/SmolLM2-135M-Instruct.Q4_1.gguf
data=data/sums
updates="${UPDATES:-40}"

stage() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }

# Right answers to the 200 held-out questions, greedy and sampled; arguments are the adapter.
count() {
    for temperature in 0 1; do
        "$quantune" eval --base "$base" --prompts "$data/prompts.heldout.jsonl" --reward numeric:answer --max-tokens 12 \
            --temperature "$temperature" "$@" --json |
            python3 -c "import json, sys; r = json.loads(sys.stdin.read().splitlines()[-1]); print('temperature $temperature:', \
'{:.1f} ± {:.1f} % right, {:.1f} tokens'.format(100 * r['reward'], 100 * r['reward_error'], r['length']))"
    done
}

[[ -n "${NO_BUILD:-}" ]] || cargo build --release --bin quantune
python3 scripts/fetch/smollm2.py
[[ -f "$data/sft.jsonl" ]] || python3 scripts/pipelines/make_sums.py
stage "The base"
count
stage "Fine-tuned on 400 sums"
[[ -d "$out/sft/adapter" ]] ||
    "$quantune" sft --base "$base" --data "$data/sft.jsonl" --out "$out/sft" --num-train-epochs 2 --learning-rate 5e-4 \
        --packing false --per-device-train-batch-size 8 --gradient-accumulation-steps 1
count --adapter "$out/sft/adapter"
stage "GRPO: 16 questions an update, 8 answers each"
[[ -d "$out/grpo/adapter" ]] || "$quantune" grpo --base "$base" --adapter "$out/sft/adapter" --data "$data/prompts.train.jsonl" --reward numeric:answer \
    --out "$out/grpo" --max-steps "$updates" --batch-size 16 --num-generations 8 --max-completion-length 12 \
    --per-device-train-batch-size 64 --learning-rate 3e-4 --rollout-slots 32
count --adapter "$out/grpo/adapter"
