#!/usr/bin/env bash
# The memory that a Hugging Face folder takes while it is quantized on load.
#
#   scripts/check/load_type.sh FOLDER...
#
# Each folder is loaded to Q8_0, Q4_K and Q4_0 and scores a few words. Prints the peaks of private memory (RssAnon of
# /proc/PID/status) and of all memory (RssAnon + RssFile), above those of the same command on the folder as it is stored, and ends with 1 where either is more than the quantized matrices, a tenth of them and the largest matrix in F32.
# TYPES and QUANTUNE (the binary) may be set.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
[[ $# -gt 0 ]] || { echo "usage: scripts/check/load_type.sh FOLDER..." >&2; exit 2; }
quantune="${QUANTUNE:-${CARGO_TARGET_DIR:-$root/target}/release/quantune}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 - "$work" "$quantune" "${TYPES:-Q8_0 Q4_K Q4_0}" "$@" <<'PY'
import json, pathlib, re, struct, subprocess, sys, time

work, quantune, types, *folders = sys.argv[1:]
pathlib.Path(f"{work}/rows.jsonl").write_text('{"text": "a few words"}\n')


def peaks(folder, *more):
    """The most private memory and the most of all, in bytes. What is mapped counts only as far as it is resident."""
    command = [quantune, "eval", "--base", folder, "--data", f"{work}/rows.jsonl", *more]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    private = whole = 0
    while process.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", status)}
        private = max(private, found.get("RssAnon", 0))
        whole = max(whole, found.get("RssAnon", 0) + found.get("RssFile", 0))
        time.sleep(0.002)
    if process.wait():
        sys.exit(process.stderr.read().decode())
    return private, whole


def matrices(folder):
    """Numbers of each matrix."""
    for path in pathlib.Path(folder).glob("*.safetensors"):
        with open(path, "rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for name, tensor in header.items():
            if name != "__metadata__" and len(tensor["shape"]) == 2:
                yield tensor["shape"][0] * tensor["shape"][1]


failed = False
for folder in folders:
    stored, _ = peaks(folder)
    largest = 4 * max(matrices(folder))
    print(f"{folder}: as it is stored {stored / 1e6:.1f} MB private, its largest matrix {largest / 1e6:.1f} MB in F32")
    for of in types.split():
        command = [quantune, "sft", "--base", folder, "--load-type", of, "--data", f"{work}/rows.jsonl", "--out",
                   f"{work}/run", "--dry-run", "--r", "1", "--json"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if result.returncode:
            sys.exit(result.stderr.decode())
        quantized = json.loads(result.stdout.decode().splitlines()[-1])["memory"]["frozen_weights"]
        private, whole = (peak - stored for peak in peaks(folder, "--load-type", of))
        most = 1.1 * quantized + largest
        failed |= max(private, whole) > most
        print(f"  {of}: quantized {quantized / 1e6:.1f} MB; private memory {private / 1e6:.1f} MB "
              f"({private / quantized:.2f} times that), with mapped pages {whole / 1e6:.1f} MB; allowed {most / 1e6:.1f} MB")
sys.exit(failed)
PY
