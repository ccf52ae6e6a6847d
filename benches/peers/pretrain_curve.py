#!/usr/bin/env python3
"""A run of pretraining of ours, repeated in PyTorch with transformers: the same first weights, rows, learning rates and
AdamW in float32; held-out bits per byte of both as they learn.

    cargo build --release --example pretrain_rows
    python3 benches/peers/pretrain_curve.py [--steps 100] [--mixture data/mixture] [--tokenizer TOKENIZER]

The model has 12 M parameters (384 wide, 6 layers, 6 heads, 1024 inner, a tied vocabulary of 4096), 16 x 256 tokens a step,
from the mixture of scripts/fetch/mixture.py. The first weights are those of a run of one step at learning rate 0. Ends in an error if
ours is worse by more than 1 % at the end. Environment variables are listed in common.py.
"""

import argparse
import json
import math
import subprocess
import sys
import time

from common import PYTHON, ROOT, TARGET, child_environment, fresh, quantune

SHAPE = ["--hidden-size", 384, "--num-hidden-layers", 6, "--num-attention-heads", 6, "--intermediate-size", 1024]
LENGTH, BATCH, EVERY, EVAL_ROWS = 256, 16, 50, 32


def torch_run(args):
    import numpy
    import torch
    import transformers

    from common import THREADS

    torch.set_num_threads(THREADS)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.initial, dtype=torch.float32).train()
    model.config.use_cache = False

    def rows(name):
        return torch.from_numpy(numpy.fromfile(f"{args.rows}/{name}.u32", dtype="<u4").astype("int64")).view(-1, LENGTH + 1)

    train, held_out = rows("train"), rows("validation")
    about = json.load(open(f"{args.rows}/validation.json"))
    plain = [p for p in model.parameters() if p.dim() < 2]
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)

    def loss_of(batch, reduction):
        logits = model(input_ids=batch[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction=reduction)

    def bits_per_byte():
        model.eval()
        with torch.no_grad():
            nats = sum(loss_of(batch, "sum").item() for batch in held_out.split(8))
        model.train()
        return nats / math.log(2) / about["bytes"]

    rates = [json.loads(line)["learning_rate"] for line in open(args.metrics) if '"loss"' in line]
    curve, seconds = {0: bits_per_byte()}, 0.0
    losses = []
    for step, rate in enumerate(rates):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(train[step * BATCH : (step + 1) * BATCH], "mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.perf_counter() - began
        if (step + 1) % EVERY == 0 or step + 1 == len(rates):
            curve[step + 1] = bits_per_byte()
    print(json.dumps({"curve": curve, "losses": losses, "tokens_per_second": len(rates) * BATCH * LENGTH / seconds}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--mixture", default=ROOT / "data/mixture")
    parser.add_argument("--tokenizer", help="a folder of `tokenizer train` [default: learned anew, 4096 tokens]")
    for name in ("initial", "rows", "metrics"):  # of the peer's own process
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.initial:
        return torch_run(args)

    sources = [f"{name}={weight}:{args.mixture}/{name}.jsonl" for name, weight in [("wikipedia", 0.6), ("documentation", 0.25), ("drama", 0.15)]]
    tokenizer = args.tokenizer
    if tokenizer is None:
        tokenizer = fresh("curve_tokenizer")
        quantune("tokenizer", "train", "--data", f"{args.mixture}/*.jsonl", "--vocab-size", 4096, "--out", tokenizer)
    cache, first, whole, rows = (fresh(name) for name in ("curve_cache", "curve_first", "curve_whole", "curve_rows"))
    common = ["pretrain", "--source", *sources, "--tokenizer", tokenizer, "--cache", cache, "--max-length", LENGTH, *SHAPE]
    common += ["--per-device-train-batch-size", BATCH, "--sample-steps", 0, "--eval-rows", EVAL_ROWS]
    quantune(*common, "--out", first, "--max-steps", 1, "--learning-rate", 0, "--warmup-ratio", 0, "--eval-steps", 0)
    done = quantune(*common, "--out", whole, "--max-steps", args.steps, "--eval-steps", EVERY).json()
    subprocess.run([f"{TARGET}/release/examples/pretrain_rows", whole, rows], check=True)
    work = ["--initial", first / "model", "--rows", rows, "--metrics", whole / "metrics.jsonl"]
    peer = subprocess.run([PYTHON, __file__, *map(str, work)], env=child_environment(), stdout=subprocess.PIPE, text=True)
    if peer.returncode != 0:
        sys.exit("the peer's process failed")
    peer = json.loads(peer.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in open(whole / "metrics.jsonl")]
    ours = {line["step"]: line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line}
    losses = [line["loss"] for line in lines if "loss" in line]
    print(f"{done['parameters']} parameters, {args.steps} steps of {BATCH} x {LENGTH} tokens")
    print(f"{'step':>6} {'ours':>8} {'PyTorch':>8} {'ours / PyTorch':>15}   held-out bits a byte")
    for step, bits in ours.items():
        peers = peer["curve"][str(step)]
        print(f"{step:>6} {bits:>8.4f} {peers:>8.4f} {bits / peers:>15.4f}")
    worst = max(abs(a - b) for a, b in zip(losses, peer["losses"]))
    print(f"largest difference of a step's loss {worst:.5f}")
    print(f"tokens a second: ours {done['tokens_per_second']:.0f}, PyTorch {peer['tokens_per_second']:.0f}")
    last = ours[args.steps] / peer["curve"][str(args.steps)]
    if last > 1.01:
        sys.exit(f"ours ends {100 * (last - 1):.2f} % above the peer's, needed at most 1 %")


if __name__ == "__main__":
    main()
