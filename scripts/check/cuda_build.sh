#!/usr/bin/env bash
# Compiles and links the cuda feature on a machine without GPU, driver or toolkit: nvcc and the libraries
# come from pip's wheels (1.2 GB), the driver's library is a stand-in whose every function answers "no
# device". Where a toolkit is installed, `cargo build --release --features cuda` is all there is to do.
#
#     scripts/check/cuda_build.sh            # cargo build --release --features cuda
#     scripts/check/cuda_build.sh check      # cargo check --features cuda, with the real nvcc
#
# CUDA_COMPUTE_CAP names the GPU's generation (80: A100 and later; 8.0 is the least with bf16).
set -euo pipefail
cd "$(dirname "$0")/../.."

if [[ "$(uname -sm)" != "Linux x86_64" ]]; then
    echo "the wheels are for Linux x86_64, this is $(uname -sm)" >&2
    exit 1
fi

case "${1:-build}" in
build) command=(cargo build --release --features cuda) ;;
check) command=(cargo check --features cuda) ;;
*)
    echo "usage: scripts/check/cuda_build.sh [build|check]" >&2
    exit 2
    ;;
esac

venv="${CUDA_VENV:-target/cuda-venv}"
[[ -x "$venv/bin/pip" ]] || python3 -m venv "$venv"
venv="$(cd "$venv" && pwd)"
"$venv/bin/pip" install --quiet --disable-pip-version-check \
    'nvidia-cuda-nvcc==13.0.88' 'nvidia-cuda-crt==13.0.88' 'nvidia-nvvm==13.0.88' \
    'nvidia-cuda-runtime==13.0.96' 'nvidia-cuda-nvrtc==13.0.88' 'nvidia-cuda-cccl==13.0.85' \
    'nvidia-cublas==13.0.2.14' 'nvidia-curand==10.4.0.35'

# The wheels' folders, laid out as an installed toolkit: lib64, and names without version for the linker.
toolkit="$(cd "$venv"/lib/python3*/site-packages/nvidia/cu13 && pwd)"
ln -sfn lib "$toolkit/lib64"
for name in cudart cublas cublasLt curand nvrtc; do
    versions=("$toolkit/lib/lib$name".so.*)
    ln -sfn "$(basename "${versions[0]}")" "$toolkit/lib/lib$name.so"
done

# The driver's stand-in: every function of cuda.h answers 100, CUDA_ERROR_NO_DEVICE.
driver="$venv/driver"
mkdir -p "$driver"
cpp -P -I"$toolkit/include" "$toolkit/include/cuda.h" |
    grep -oE '\bcu[A-Z][A-Za-z0-9_]*\s*\(' | tr -d ' (' | sort -u |
    sed 's/.*/int &(void) { return 100; }/' >"$driver/driver.c"
cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$driver/libcuda.so.1" "$driver/driver.c"
ln -sfn libcuda.so.1 "$driver/libcuda.so"

export CUDA_HOME="$toolkit" CUDA_PATH="$toolkit" CUDA_ROOT="$toolkit" NVCC="$toolkit/bin/nvcc"
export PATH="$toolkit/bin:$PATH" LIBRARY_PATH="$driver${LIBRARY_PATH:+:$LIBRARY_PATH}"
export CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-80}"
"$NVCC" --version | tail -n 2
echo "+ ${command[*]}"
"${command[@]}"
if [[ "${command[1]}" == build ]]; then
    echo "Without a driver, run it with LD_LIBRARY_PATH=$driver:$toolkit/lib"
fi
