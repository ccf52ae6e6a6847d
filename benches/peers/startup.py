#!/usr/bin/env python3
"""From the start of the process to the first training step: ours against a PEFT script, in alternation.

    python3 benches/peers/startup.py

Two lines a round: until the first step begins (both sides print it on stderr) and until it is done, on one row
of 64 tokens. Both have run once before, so that files are in the page cache. Environment variables are listed in
common.py, the models come from prepare.py.
"""

import argparse
import time

from common import MODEL_FILES, MODELS, PEERS, PYTHON, QUANTUNE, THREADS, Side
from common import alternate, cpu_seconds_of, fresh, median_side, print_header, print_line, run, sft_args
from sft import write_rows

LENGTH = 64


def start(command):
    """One run: (until the first step begins, the whole)."""
    began, reached = time.perf_counter(), []

    def line_read(pid, line):
        if line.startswith("training"):
            reached.append((time.perf_counter() - began, cpu_seconds_of(pid)))

    done = run(command, stderr_line=line_read)
    whole = Side(done.seconds, done.seconds, done.cpu_seconds, done.peak_rss)
    seconds, cpu_seconds = reached[0]
    return Side(seconds, seconds, cpu_seconds, done.peak_rss), whole


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_FILES, default="smollm2")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    folder, gguf = MODEL_FILES[args.model]
    rows = fresh("startup_rows.jsonl")
    write_rows(rows, 1, LENGTH, vocab_size=1000)

    def ours():
        flags = sft_args(MODELS / gguf, rows, fresh("startup"), batch=1, steps=1, max_length=LENGTH)
        return start([QUANTUNE, *flags, "--threads", THREADS])

    def peer():
        work = ["--model", MODELS / folder, "--rows", rows, "--batch", 1, "--steps", 1]
        return start([PYTHON, PEERS / "peft_sft.py", *work])

    ours(), peer()
    print_header()
    pairs = []
    stages = ["start to first step", f"start to end of one step of {LENGTH} tokens"]
    for pair in alternate(args.rounds, ours, peer):
        pairs.append(pair)
        for stage, our_side, peer_side in zip(stages, *pair):
            print_line(f"{stage} [{len(pairs)}]", "s", our_side, peer_side)
    for i, stage in enumerate(stages):
        print_line(stage, "s", median_side([o[i] for o, _ in pairs]), median_side([p[i] for _, p in pairs]))


if __name__ == "__main__":
    main()
