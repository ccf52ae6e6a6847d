#!/usr/bin/env python3
"""Two builds of quantune in alternation: training steps, prefill and decoding.

    python3 benches/peers/builds.py OLD NEW [--model smollm2|qwen05] [--compute int16] [--rounds 5]

OLD and NEW are binaries. The work is that of sft.py (4 x 512 random tokens a step, r=16 on every linear layer)
and of llama_cpp.py (512 tokens of prefill, 64 of greedy decoding). The columns "ours" and "peer" are NEW and OLD;
a ratio above 1 means that NEW is faster. With --decode-example OLD_EXAMPLE NEW_EXAMPLE, binaries of
adapters_at_decode, what an adapter costs at decode is printed for both as well.
"""

import argparse
import re
import subprocess

import common
from common import MODEL_FILES, MODELS, Side, compare, fresh, our_training, print_header
from llama_cpp import our_decode, our_prefill
from sft import side, write_rows


def with_binary(binary, work):
    def run():
        common.QUANTUNE = binary
        return work()

    return run


def adapters_at_decode(example, gguf, rounds):
    """Milliseconds a token without and with an adapter."""
    command = [example, gguf, "--rounds", str(rounds)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=common.child_environment()).stdout
    found = re.findall(r"one row, .*?: ([0-9.]+) ms", out)
    return [float(ms) for ms in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--model", choices=MODEL_FILES, default="smollm2")
    parser.add_argument("--vocab-size", type=int, default=49152)
    parser.add_argument("--compute", default="int16")
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one of warm-up")
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["sft", "prefill", "decode"], help="these alone")
    parser.add_argument("--decode-example", nargs=2, metavar=("OLD_EXAMPLE", "NEW_EXAMPLE"))
    args = parser.parse_args()

    gguf = MODELS / MODEL_FILES[args.model][1]
    rows = fresh("rows.jsonl")
    write_rows(rows, (1 + args.steps) * 4, 512, args.vocab_size)

    def sft():
        settings = {"batch": 4, "steps": 1 + args.steps, "max_length": 512, "compute": args.compute}
        return side(our_training(gguf, rows, **settings), 1, 4 * 512)

    works = [
        (f"sft {args.model} 4x512 {args.compute}", sft),
        (f"prefill {args.model} 512 {args.compute}", lambda: our_prefill(gguf, args.compute)),
        (f"decode {args.model} {args.decode} {args.compute}", lambda: our_decode(gguf, args.decode, args.compute)),
    ]
    print_header()
    for name, work in works:
        if args.only and name.split()[0] not in args.only:
            continue
        compare(name, "tok/s", args.rounds, with_binary(args.new, work), with_binary(args.old, work))
    if args.decode_example:
        old, new = args.decode_example

        def decode(example):
            def measured():
                bare, adapted = adapters_at_decode(example, gguf, 5)
                return Side(adapted, bare / 1e3, adapted / 1e3, 0)

            return measured

        compare("adapter at decode, ms a token", "s", args.rounds, decode(new), decode(old))


if __name__ == "__main__":
    main()
