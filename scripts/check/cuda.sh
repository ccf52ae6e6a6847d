#!/usr/bin/env bash
# Type-checks the cuda feature where there is neither a GPU nor a CUDA toolkit: candle's build scripts get
# a stand-in for nvcc that answers their questions and writes empty files. What they make must never be
# linked: it uses a separate target directory unless CUDA_CHECK_TARGET names one. Arguments are cargo's.
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
    echo "the cuda feature is not checked: that is done on Linux x86_64, this is $(uname -sm)"
    exit 0
fi

target="${CUDA_CHECK_TARGET:-${CARGO_TARGET_DIR:-target}/check-cuda}"
mkdir -p "$target/bin"
target="$(cd "$target" && pwd)"

cat >"$target/bin/nvcc" <<'NVCC'
#!/bin/sh
# A stand-in for nvcc: every requested output exists, and is empty.
output="" folder="" source=""
while [ $# -gt 0 ]; do
    case "$1" in
    --version)
        printf 'nvcc: a stand-in\n\n\nCuda compilation tools, release 13.0, V13.0.88\n'
        exit 0
        ;;
    --list-gpu-code)
        echo sm_80
        exit 0
        ;;
    -o)
        output="$2"
        shift
        ;;
    --output-directory)
        folder="$2"
        shift
        ;;
    *.cu) source="$1" ;;
    esac
    shift
done
if [ -n "$output" ]; then : >"$output"; fi
if [ -n "$folder" ] && [ -n "$source" ]; then : >"$folder/$(basename "$source" .cu).ptx"; fi
NVCC
chmod +x "$target/bin/nvcc"

# 8.0 is the least that has candle's bf16 kernels.
echo "+ cargo check --features cuda (stand-in nvcc)"
NVCC="$target/bin/nvcc" PATH="$target/bin:$PATH" CUDA_COMPUTE_CAP=80 CARGO_TARGET_DIR="$target" \
    cargo check --quiet --features cuda "$@"
