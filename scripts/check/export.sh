#!/usr/bin/env bash
# Compares what merge, quantize and export write with llama.cpp and transformers; see scripts/check/export.py.
#
#   scripts/check/export.sh LLAMA_CPP [gguf] [folder] [lora] [errors] [report]
#
# LLAMA_CPP is a checkout of llama.cpp with llama-quantize in build/bin. Builds, fetches the model, and makes a
# Python environment in target/check-venv unless PYTHON names one with scripts/golden/requirements.txt and
# llama-cpp-python installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [[ -z "${QUANTUNE:-}" ]]; then
    cargo build --release --bin quantune
    QUANTUNE="${CARGO_TARGET_DIR:-$PWD/target}/release/quantune"
fi
[[ -n "${BASE:-}" ]] || python3 scripts/fetch/smollm2.py
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=target/check-venv/bin/python
    [[ -x "$PYTHON" ]] || python3 -m venv target/check-venv
    "$PYTHON" -m pip install -q -r scripts/golden/requirements.txt llama-cpp-python
fi
QUANTUNE="$QUANTUNE" "$PYTHON" scripts/check/export.py "$@"
