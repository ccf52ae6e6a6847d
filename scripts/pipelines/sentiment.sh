#!/usr/bin/env bash
# Human judgements into a model, from fetch to report: continuations of film reviews that people rate higher (the task of
# Ziegler et al. 2019, on the human ratings of vaderSentiment's snippets).
#
#   scripts/pipelines/sentiment.sh [RUN_DIRECTORY]     [default: runs/sentiment]
#
#   reward   a reward model from pairs of snippets, and a second one, the judge, from others
#   sft      the base learns what snippets look like
#   ppo      the policy learns from the reward model, held to sft by KL
#   dpo      the same from the pairs themselves, without a reward model
#   grpo     the same from the reward model, responses of a prompt compared with each other
#   report   held-out prompts: reward, judge, wins against sft and base, variety, entropy
#
# SEEDS="1 2 3" trains reward model and ppo once each; UPDATES, and RL's other sizes, are below. Needs Rust, and Python 3 with
# pip for the two downloads. Existing results are not made again: a run that was stopped continues.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
out="${1:-$root/runs/sentiment}"
[[ "$out" == /* ]] || out="$PWD/$out"
cd "$root"
seeds="${SEEDS:-1}"
updates="${UPDATES:-20}"
length="${LENGTH:-24}"

quantune="${CARGO_TARGET_DIR:-$root/target}/release/quantune"
base=models/SmolLM2-135M-Instruct.Q4_1.gguf
data=data/sentiment

stage() { printf '\n== %s (at %d s)\n' "$*" "$SECONDS"; }

# A training run: COMMAND NAME FLAGS...
train() {
    local command="$1" folder="$out/$2"
    shift 2
    if [[ -s "$folder.json" ]]; then
        echo "$folder is there already"
    elif [[ -f "$folder/config.toml" ]]; then
        "$quantune" "$command" --out "$folder" --resume --json | tee "$folder.json"
    else
        mkdir -p "$out"
        "$quantune" "$command" --base "$base" --out "$folder" "$@" --json | tee "$folder.json"
    fi
}

if [[ ! -x "$quantune" || -z "${NO_BUILD:-}" ]]; then
    stage "Build"
    cargo build --release --bin quantune
fi
stage "Fetch the model and the ratings"
python3 scripts/fetch/smollm2.py
[[ -f "$data/pairs.train.jsonl" ]] || python3 scripts/fetch/sentiment.py
python3 scripts/fetch/sentiment.py --naive-bayes

reward() {
    stage "Reward model, seed $1"
    train reward "reward-$1" --data "$data/pairs.train.jsonl" --eval-data "$data/pairs.heldout.jsonl" --seed "$1"
}
first="${seeds%% *}"
reward "$first"
stage "The judge: a reward model from other snippets"
train reward judge --data "$data/judge.train.jsonl" --eval-data "$data/judge.heldout.jsonl"

stage "SFT on snippets"
train sft sft --data "$data/sft.jsonl" --max-steps 40 --per-device-train-batch-size 1 --max-length 256

rl=(--data "$data/prompts.train.jsonl" --eval-data "$data/prompts.heldout.jsonl" --adapter "$out/sft/adapter"
    --eval-strategy steps --eval-steps 10 --eval-prompts 64 --sample-steps 10 --per-device-train-batch-size 32)
for seed in $seeds; do
    stage "PPO, seed $seed"
    train ppo "ppo-$seed" "${rl[@]}" --reward-adapter "$out/reward-$first/adapter" --judge-adapter "$out/judge/adapter" \
        --max-steps "$updates" --batch-size 32 --num-ppo-epochs 2 --num-mini-batches 2 --response-length "$length" \
        --temperature 1 --kl-coef 0.05 --normalize-scores --learning-rate 4e-4 --seed "$seed"
done

stage "DPO on the pairs of people"
train dpo dpo --data "$data/pairs.train.jsonl" --eval-data "$data/pairs.heldout.jsonl" --adapter "$out/sft/adapter" \
    --max-steps 80 --learning-rate 1e-4

stage "GRPO on the reward model"
train grpo grpo "${rl[@]}" --reward-adapter "$out/reward-$first/adapter" --max-steps "$updates" --batch-size 4 \
    --num-generations 8 --max-completion-length "$length" --temperature 1 --beta 0.05 --learning-rate 2e-4

for seed in $seeds; do
    [[ "$seed" == "$first" ]] || reward "$seed"
done

stage "Report: replies to 128 held-out prompts, by the judge"
report() {
    local name="$1" against="$2"
    shift 2
    "$quantune" eval --base "$base" --prompts "$data/prompts.heldout.jsonl" --reward "$out/judge/adapter" \
        --temperature 1 --max-tokens "$length" "$@" --against "$against" --replies "$out/$name.replies.jsonl" --json |
        tee "$out/$name.report.json" >/dev/null
}
report sft base --adapter "$out/sft/adapter"
names=(dpo grpo)
for seed in $seeds; do names+=("ppo-$seed"); done
for name in "${names[@]}"; do
    report "$name" "$out/sft/adapter" --adapter "$out/$name/adapter"
    report "$name-base" base --adapter "$out/$name/adapter"
done
python3 scripts/pipelines/report_sentiment.py "$out"
