#!/usr/bin/env python3
"""The effect of inexact kernels on training: the same run under each --compute, compared with f32.

    python3 benches/peers/curves.py [--steps 200] [--modes f32 int16 int8]

chatterbot's conversations (scripts/fetch/chatterbot.py), 8 a step, in the order of the file, from the same adapter;
held-out loss before and after. Differences are to the first mode's. Every run is evaluated by its own
kernels, so that the loss is what a user of that mode would see.
"""

import argparse
import json

from common import DATA, MODEL_FILES, MODELS, fresh, quantune, sft_args


def train(mode, base, steps, batch):
    out = fresh(f"curve-{mode}")
    args = sft_args(base, DATA / "chatterbot.train.jsonl", out, batch=batch, steps=steps, max_length=1024, compute=mode)
    done = quantune(*args, "--eval-data", DATA / "chatterbot.heldout.jsonl").json()
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return done, [line["loss"] for line in lines if "loss" in line]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(MODELS / MODEL_FILES["smollm2"][1]))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--modes", nargs="+", default=["f32", "int16", "int8"])
    args = parser.parse_args()

    print(f"{'compute':<9} {'before':>9} {'after':>9} {'difference':>11} {'largest of a step':>18} {'tok/s':>7}")
    reference = None
    for mode in args.modes:
        done, losses = train(mode, args.base, args.steps, args.batch)
        after = done["eval_loss_last"]
        reference = reference or (after, losses)
        step = max(abs(a / b - 1) for a, b in zip(losses, reference[1]))
        print(
            f"{mode:<9} {done['eval_loss_first']:9.5f} {after:9.5f} {after / reference[0] - 1:+11.4%} {step:18.4%}"
            f" {done['tokens_per_second']:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
