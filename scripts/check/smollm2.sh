#!/usr/bin/env bash
# Compares Quantune with transformers, PEFT and llama.cpp on a real model; see scripts/check/smollm2.py.
#
#   scripts/check/smollm2.sh [reference] [modes] [perplexity] [memory] [steps] [interop] [parity]
#
# Builds, fetches what is missing, and makes a Python environment (some GB) in target/check-venv unless PYTHON
# names one with scripts/golden/requirements.txt installed. All seven take about half an hour on two cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z "${QUANTUNE:-}" ]]; then
    cargo build --release --bin quantune
    QUANTUNE="${CARGO_TARGET_DIR:-$PWD/target}/release/quantune"
fi
python3 scripts/fetch/smollm2.py
python3 scripts/fetch/chatterbot.py
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=target/check-venv/bin/python
    [[ -x "$PYTHON" ]] || python3 -m venv target/check-venv
    "$PYTHON" -m pip install -q -r scripts/golden/requirements.txt
fi
QUANTUNE="$QUANTUNE" "$PYTHON" scripts/check/smollm2.py "$@"
