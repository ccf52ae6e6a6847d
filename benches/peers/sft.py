#!/usr/bin/env python3
"""LoRA steps on full rows: ours against PyTorch + PEFT, in alternation.

    python3 benches/peers/sft.py [--model smollm2|qwen05] [--checkpointing] [--bnb | --bf16] [--compute f32]

4 x 512 random tokens a step, all of them learned, the same rows in the same order on both sides; r=16 on
every linear layer, AdamW, gradients clipped. A rate is the tokens of a step over the median of its seconds
after --warm steps. Environment variables are listed in common.py, the models come from prepare.py.
"""

import argparse
import json
import random
import statistics

from common import MODEL_FILES, MODELS, Side, compare, fresh, our_training, peer_training, print_header, same_start


def write_rows(path, rows, length, vocab_size):
    draw = random.Random(1234)
    with open(path, "w") as out:
        for _ in range(rows):
            ids = [draw.randrange(vocab_size) for _ in range(length)]
            out.write(json.dumps({"input_ids": ids, "labels": ids}) + "\n")


def side(training, warm, tokens):
    seconds = statistics.median(training.seconds[warm:])
    return Side(tokens / seconds, seconds, statistics.median(training.cpu_seconds[warm:]), training.peak_rss)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODEL_FILES, default="smollm2")
    parser.add_argument("--base", help="another GGUF of the same model for us")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="timed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="layers recomputed on both sides")
    peer_floats = parser.add_mutually_exclusive_group()
    peer_floats.add_argument("--bnb", action="store_true", help="the peer's weights in bitsandbytes' NF4")
    peer_floats.add_argument("--bf16", action="store_true", help="the peer in bfloat16")
    parser.add_argument("--compute", help="our kernels [default: the binary's own]")
    args = parser.parse_args()

    folder, gguf = MODEL_FILES[args.model]
    base, folder = args.base or MODELS / gguf, MODELS / folder
    steps, rows = args.warm + args.steps, fresh("rows.jsonl")
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    write_rows(rows, steps * args.batch, args.length, vocab_size)
    flags = [f"--{name}" for name in ("checkpointing", "bnb", "bf16") if getattr(args, name)]
    first_losses = {}

    def ours():
        settings = {"checkpointing": args.checkpointing, "compute": args.compute}
        done = our_training(base, rows, batch=args.batch, steps=steps, max_length=args.length, **settings)
        first_losses["ours"] = done.losses[0]
        return side(done, args.warm, args.batch * args.length)

    def peer():
        work = ["--model", folder, "--rows", rows, "--batch", args.batch, "--steps", steps]
        done = peer_training("peft_sft.py", *work, *flags)
        first_losses["peer"] = done.losses[0]
        return side(done, args.warm, args.batch * args.length)

    name = " ".join(["sft", args.model, args.compute or "", f"{args.batch}x{args.length}", *flags]).replace("  ", " ")
    print_header()
    compare(name, "tok/s", args.rounds, ours, peer)
    # NF4 are other weights: their loss on random tokens is near ours, not the same
    same_start(first_losses["ours"], first_losses["peer"], bound=0.1 if args.bnb else 0.01)


if __name__ == "__main__":
    main()
