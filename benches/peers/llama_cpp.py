#!/usr/bin/env python3
"""Prefill of 512 tokens and decoding of 64 or 128, one stream: ours against llama-bench, in alternation.

    python3 benches/peers/llama_cpp.py [--decode 64] [GGUF ...]

Without names: the four GGUFs of SmolLM2-135M that prepare.py makes. LLAMA_BIN names the folder of llama-bench.
Both begin with an empty cache. llama-bench feeds random tokens, runs each test once before timing it and
samples nothing; we continue a prompt of real tokens, greedily, in a process that has just started. Seconds and
CPU seconds are the whole process's, starting and loading included.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

from common import MODELS, THREADS, Side, compare, print_header, quantune, run

FILES = [
    "smollm2-135m-q4_0.gguf",
    "smollm2-135m-q4_k_m.gguf",
    "smollm2-135m-q8_0.gguf",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
]
PREFILL = 512


def llama_bench(gguf, prefill, decode, repeats):
    """Either test: the other's length is 0."""
    program = Path(os.environ.get("LLAMA_BIN", "")) / "llama-bench"
    sizes = ["-p", prefill, "-n", decode, "-r", repeats]
    done = run([program, "-m", gguf, *sizes, "-t", THREADS, "-o", "json"])
    (test,) = json.loads(done.stdout)
    return Side(statistics.median(test["samples_ts"]), done.seconds, done.cpu_seconds, done.peak_rss)


def generate(gguf, prompt, tokens, key, compute):
    kernel = ["--compute", compute] if compute else []
    args = ["--raw", "--prompt", prompt, "--max-tokens", tokens, "--temperature", 0, *kernel]
    done = quantune("generate", "--base", gguf, *args)
    found = done.json()
    if key not in found:
        sys.exit(f"generate --json has no {key}; there are {', '.join(found)}")
    return found, Side(found[key], done.seconds, done.cpu_seconds, done.peak_rss)


def our_prefill(gguf, compute):
    """A word that is one token, 512 times."""
    found, side = generate(gguf, " the" * PREFILL, 1, "prompt_tokens_per_second", compute)
    if found["prompt_tokens"] != PREFILL:
        sys.exit(f"{gguf}: the prompt has {found['prompt_tokens']} tokens, needed {PREFILL}")
    return side


def our_decode(gguf, tokens, compute):
    """A count that a model does not end by itself."""
    found, side = generate(gguf, "1, 2, 3, 4, 5,", tokens, "tokens_per_second", compute)
    if found["tokens"] != tokens:
        sys.exit(f"{gguf}: ended after {found['tokens']} tokens, needed {tokens}")
    return side


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="*", default=[str(MODELS / name) for name in FILES])
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="llama-bench's own in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compute", help="our kernels [default: the binary's own]")
    args = parser.parse_args()

    print_header()
    for gguf in args.gguf:
        name = " ".join([Path(gguf).stem, args.compute or ""]).strip()
        compare(
            f"pp{PREFILL} {name}",
            "tok/s",
            args.rounds,
            lambda: our_prefill(gguf, args.compute),
            lambda: llama_bench(gguf, PREFILL, 0, args.repeats),
        )
        compare(
            f"tg{args.decode} {name}",
            "tok/s",
            args.rounds,
            lambda: our_decode(gguf, args.decode, args.compute),
            lambda: llama_bench(gguf, 0, args.decode, args.repeats),
        )


if __name__ == "__main__":
    main()
