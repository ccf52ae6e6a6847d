#!/usr/bin/env python3
"""Reward models and DPO on pairs: ours against TRL's RewardTrainer and DPOTrainer with PEFT, in alternation.

    python3 benches/peers/pairs.py reward|dpo [--checkpointing] [--compute f32]

4 pairs a step: a prompt of 32 words, two responses of 64, random words of one token each; r=16 on every linear layer,
the same pairs in the same order on both sides. Our seconds are those of the whole process (DPO asks its reference before
the first step), TRL's those of its steps after --warm. Environment variables are listed in common.py, the models come from
prepare.py.
"""

import argparse
import json
import random

from common import MODEL_FILES, MODELS, compare, fresh, our_run, peer_side, peer_training, print_header
from common import same_start, some_words


def write_pairs(path, count, prompt, response):
    draw = random.Random(1234)
    with open(path, "w") as out:
        for _ in range(count):
            row = {"prompt": some_words(draw, prompt)}
            row.update({side: " " + some_words(draw, response) for side in ("chosen", "rejected")})
            out.write(json.dumps(row) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=["reward", "dpo"])
    parser.add_argument("--base", help="another GGUF of the same model for us")
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--prompt", type=int, default=32, help="words")
    parser.add_argument("--response", type=int, default=64, help="words")
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="timed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="layers recomputed on both sides")
    parser.add_argument("--compute", help="our kernels [default: the binary's own]")
    args = parser.parse_args()

    folder, gguf = MODEL_FILES["smollm2"]
    base, folder = args.base or MODELS / gguf, MODELS / folder
    steps, rows = args.warm + args.steps, fresh("pairs.jsonl")
    write_pairs(rows, steps * args.batch, args.prompt, args.response)
    first = {}

    def ours():
        batches = ["--per-device-train-batch-size", args.batch, "--gradient-accumulation-steps", 1, "--no-shuffle"]
        recompute = ["--gradient-checkpointing", "true" if args.checkpointing else "false"]
        kernel = ["--compute", args.compute] if args.compute else []
        work, flags = ["--base", base, "--data", rows], [*batches, *recompute, *kernel]
        out, side = our_run(args.objective, work, *flags, samples=args.batch, steps=steps)
        first["ours"] = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        return side

    flags = ["--checkpointing"] if args.checkpointing else []

    def peer():
        work = [args.objective, "--model", folder, "--rows", rows, "--batch", args.batch, "--steps", steps]
        done = peer_training("trl_pairs.py", *work, *flags)
        first["peer"] = done.losses[0]
        return peer_side(done, args.warm, args.batch)

    name = " ".join([args.objective, args.compute or "", f"{args.batch} pairs", *flags]).replace("  ", " ")
    print_header()
    compare(name, "pairs/s", args.rounds, ours, peer)
    if args.objective == "dpo":
        # The first loss is ln 2 whatever was read; what the policy says of the responses is not.
        same_start(first["ours"]["logps/chosen"], first["peer"]["logps/chosen"])


if __name__ == "__main__":
    main()
