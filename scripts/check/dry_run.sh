#!/usr/bin/env bash
# Memory and time that --dry-run predicts, against what the run takes.
#
#   scripts/check/dry_run.sh MODEL...     GGUF files or Hugging Face folders
#
# Each configuration below is predicted and then really run for a few steps, on the models in turn; those that quantize a
# folder on load on the first folder among them, if there is one. Ends with 1 where the predicted peak is more than a tenth
# off. THREADS, STEPS, ONLY (a word in the names of the configurations to run) and QUANTUNE (the binary) may be set.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
[[ $# -gt 0 ]] || { echo "usage: scripts/check/dry_run.sh MODEL..." >&2; exit 2; }
models=("$@")
quantune="${QUANTUNE:-${CARGO_TARGET_DIR:-$root/target}/release/quantune}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Texts long enough that every bin is full, and pairs and prompts of about one length, so that every micro-batch is nearly the
# largest; of many words, or little of an embedding would ever be read from its map.
python3 - "$work" "$root" <<'PY'
import json, pathlib, random, re, sys

texts = [path.read_text() for path in sorted(pathlib.Path(sys.argv[2]).glob("src/**/*.rs"))]
words = sorted(set(re.findall(r"[A-Za-z]{2,9}", " ".join(texts))))
random.seed(1)
said = lambda count: " ".join(random.choice(words) for _ in range(count))
rows = {
    "texts": [{"text": said(6000)} for _ in range(8)],
    "pairs": [{"prompt": said(60), "chosen": " " + said(80), "rejected": " " + said(80)} for _ in range(32)],
    "prompts": [{"prompt": said(60)} for _ in range(32)],
}
for name, values in rows.items():
    with open(f"{sys.argv[1]}/{name}.jsonl", "w") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
PY

configurations=(
    "sft --max-length 256 --gradient-checkpointing false"
    "sft --max-length 1024 --gradient-checkpointing true --gradient-accumulation-steps 1"
    "sft --max-length 256 --per-device-train-batch-size 2 --compute f32 --gradient-checkpointing false --gradient-accumulation-steps 2"
    "sft --max-length 512 --use-dora true --r 8 --gradient-checkpointing false --gradient-accumulation-steps 1"
    "sft --max-length 512 --compute f32 --gradient-checkpointing true --lora-dropout 0.1 --gradient-accumulation-steps 1"
    "sft --max-length 512 --memory-budget 600MB --gradient-accumulation-steps 1"
    "sft --max-length 256 --load-type Q8_0 --gradient-accumulation-steps 1"
    "reward --max-length 256 --per-device-train-batch-size 4"
    "dpo --max-length 256 --per-device-train-batch-size 4 --gradient-checkpointing true"
    "dpo --max-length 256 --per-device-train-batch-size 2 --load-type Q4_0"
    "ppo --batch-size 8 --per-device-train-batch-size 4 --response-length 48"
    "ppo --value-model policy --batch-size 8 --per-device-train-batch-size 4 --response-length 48"
    "grpo --reward length:400 --batch-size 4 --num-generations 4 --per-device-train-batch-size 8 --max-completion-length 48"
    "grpo --reward length:400 --beta 0.1 --batch-size 2 --num-generations 4 --per-device-train-batch-size 4 --max-completion-length 48"
)
declare -A rows=([sft]=texts [reward]=pairs [dpo]=pairs [ppo]=prompts [grpo]=prompts)
folder=""
for model in "${models[@]}"; do
    [[ -d "$model" && -z "$folder" ]] && folder="$model"
done
# What a policy is judged by: a reward model of one step, of the same base.
reward_of() {
    local out="$work/reward-$(basename "$1")"
    [[ -d "$out" ]] || "$quantune" reward --base "$1" --data "$work/pairs.jsonl" --out "$out" --max-steps 1 --r 8 \
        --per-device-train-batch-size 1 --threads "${THREADS:-2}" >"$work/reward.log" 2>&1 || { cat "$work/reward.log" >&2; exit 1; }
    echo "$out/adapter"
}
worst=0
for i in "${!configurations[@]}"; do
    [[ "${configurations[$i]}" == *"${ONLY:-}"* ]] || continue
    model="${models[$((i % ${#models[@]}))]}"
    read -ra flags <<<"${configurations[$i]}"
    command="${flags[0]}"
    if [[ "${configurations[$i]}" == *--load-type* ]]; then
        [[ -n "$folder" ]] || { echo "left out, no folder is given: ${configurations[$i]}"; continue; }
        model="$folder"
    fi
    [[ "$command" != ppo ]] || flags+=(--reward-adapter "$(reward_of "$model")")
    run=("$quantune" "${flags[@]}" --base "$model" --data "$work/${rows[$command]}.jsonl" --out "$work/run-$i"
        --max-steps "${STEPS:-3}" --threads "${THREADS:-2}" --json)
    "${run[@]}" --dry-run 2>"$work/log" | tail -n 1 >"$work/predicted.json" || { cat "$work/log" >&2; exit 1; }
    [[ ! -e "$work/run-$i" ]] || { echo "a dry run wrote $work/run-$i" >&2; exit 1; }
    "${run[@]}" 2>"$work/log" | tail -n 1 >"$work/measured.json" || { cat "$work/log" >&2; exit 1; }
    rm -rf "$work/run-$i"
    echo "${configurations[$i]} ($(basename "$model"))"
    python3 - "$work" <<'PY' || worst=1
import json, sys

predicted, measured = (json.load(open(f"{sys.argv[1]}/{name}.json")) for name in ("predicted", "measured"))
said, taken = predicted["predicted_peak_rss_bytes"], measured["peak_rss_bytes"]
off = said / taken - 1
print(f"  memory: predicted {said / 1e6:.0f} MB, measured {taken / 1e6:.0f} MB: {100 * off:+.1f} %")
said, taken = predicted["predicted_seconds"], measured["seconds"]
print(f"  time: predicted {said:.1f} s, measured {taken:.1f} s: {100 * (said / taken - 1):+.1f} %")
print("  " + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in predicted["memory"].items() if size))
sys.exit(abs(off) > 0.1)
PY
done
exit "$worst"
