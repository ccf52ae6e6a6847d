#!/usr/bin/env python3
"""LoRA steps on real conversations: ours against TRL's SFTTrainer with PEFT, in alternation.

    python3 benches/peers/chats.py [--checkpointing] [--compute f32]

chatterbot's conversations (scripts/fetch/chatterbot.py), 8 a step, only the assistant's words learned: the same
rows with the same masks in the same order on both sides. A rate is the real tokens of the timed steps,
padding not counted, over their seconds; "s" and "cpu" are a step's mean. Environment variables are listed in
common.py, the models come from prepare.py.
"""

import argparse
import json

from common import DATA, MODEL_FILES, MODELS, PEERS, PYTHON, Side
from common import compare, fresh, our_training, peer_training, print_header, run, same_start


def side(training, warm, tokens):
    """`tokens` of each step."""
    seconds, cpu_seconds = sum(training.seconds[warm:]), sum(training.cpu_seconds[warm:])
    timed = len(tokens) - warm
    return Side(sum(tokens[warm:]) / seconds, seconds / timed, cpu_seconds / timed, training.peak_rss)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="another GGUF of the same model for us")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="timed ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true", help="layers recomputed on both sides")
    parser.add_argument("--compute", help="our kernels [default: the binary's own]")
    args = parser.parse_args()

    folder, gguf = MODEL_FILES["smollm2"]
    base, folder = args.base or MODELS / gguf, MODELS / folder
    steps, rows = args.warm + args.steps, fresh("chat_rows.jsonl")
    run([PYTHON, PEERS / "chat_rows.py", folder, DATA / "chatterbot.train.jsonl", rows])
    lengths = [len(json.loads(line)["input_ids"]) for line in open(rows)]
    batches = [lengths[i : i + args.batch] for i in range(0, steps * args.batch, args.batch)]
    tokens = [sum(batch) for batch in batches]
    padded = sum(len(batch) * max(batch) for batch in batches)
    first_losses = {}

    def ours():
        settings = {"checkpointing": args.checkpointing, "compute": args.compute}
        done = our_training(base, rows, batch=args.batch, steps=steps, max_length=1024, **settings)
        first_losses["ours"] = done.losses[0]
        return side(done, args.warm, tokens)

    flags = ["--checkpointing"] if args.checkpointing else []

    def peer():
        work = ["--model", folder, "--rows", rows, "--batch", args.batch, "--steps", steps]
        done = peer_training("trl_sft.py", *work, *flags)
        first_losses["peer"] = done.losses[0]
        return side(done, args.warm, tokens)

    print(f"{steps} steps of {sum(tokens) / steps:.0f} real tokens, {sum(tokens) / padded:.0%} of the padded")
    print_header()
    name = " ".join(["chats", args.compute or "", f"{args.batch} rows", *flags]).replace("  ", " ")
    compare(name, "tok/s", args.rounds, ours, peer)
    same_start(first_losses["ours"], first_losses["peer"])


if __name__ == "__main__":
    main()
