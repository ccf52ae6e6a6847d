#!/usr/bin/env bash
# What --dry-run says of a run's memory and time, against what the run takes.
#
#   scripts/check_dry_run.sh MODEL...     GGUF files or Hugging Face folders
#
# Each configuration below is predicted and then really run for a few steps, on the models in turn. Ends with 1 where the
# predicted peak is more than a tenth off. THREADS, STEPS and QUANTUNE (the binary) may be set.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
[[ $# -gt 0 ]] || { echo "usage: scripts/check_dry_run.sh MODEL..." >&2; exit 2; }
models=("$@")
quantune="${QUANTUNE:-${CARGO_TARGET_DIR:-$root/target}/release/quantune}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Texts long enough that every bin is full.
python3 - "$work" <<'PY'
import json, random, sys

words = "the a river stone house light walks slowly under over small old story begins again when morning came they went".split()
random.seed(1)
with open(f"{sys.argv[1]}/texts.jsonl", "w") as file:
    for _ in range(8):
        file.write(json.dumps({"text": " ".join(random.choice(words) for _ in range(6000))}) + "\n")
PY

configurations=(
    "--max-length 256 --gradient-checkpointing false"
    "--max-length 1024 --gradient-checkpointing true --gradient-accumulation-steps 1"
    "--max-length 256 --per-device-train-batch-size 2 --compute f32 --gradient-checkpointing false --gradient-accumulation-steps 2"
    "--max-length 512 --use-dora true --r 8 --gradient-checkpointing false --gradient-accumulation-steps 1"
    "--max-length 512 --compute f32 --gradient-checkpointing true --lora-dropout 0.1 --gradient-accumulation-steps 1"
    "--max-length 512 --memory-budget 600MB --gradient-accumulation-steps 1"
)
worst=0
for i in "${!configurations[@]}"; do
    model="${models[$((i % ${#models[@]}))]}"
    read -ra flags <<<"${configurations[$i]}"
    run=("$quantune" sft --base "$model" --data "$work/texts.jsonl" --out "$work/run-$i" --max-steps "${STEPS:-3}"
        --threads "${THREADS:-2}" "${flags[@]}" --json)
    "${run[@]}" --dry-run 2>/dev/null | tail -n 1 >"$work/predicted.json"
    [[ ! -e "$work/run-$i" ]] || { echo "a dry run wrote $work/run-$i" >&2; exit 1; }
    "${run[@]}" 2>/dev/null | tail -n 1 >"$work/measured.json"
    rm -rf "$work/run-$i"
    echo "$(basename "$model") ${configurations[$i]}"
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
