#!/usr/bin/env python3
"""PPO: ours against TRL 1.0.0's PPOTrainer with PEFT, in alternation.

    pip install --no-deps --target DIR trl==1.0.0
    TRL_PPO=DIR python3 benches/peers/ppo.py [--compute f32]

An update: 8 prompts of 32 tokens (random words), 32 new tokens each at temperature 0.7, 4 epochs of one minibatch. Ours has
one base with adapters for policy, reward and value; TRL has a model for each of the three, an adapter on the first, and
trains the third whole, as its scripts do, or with --lora-value an adapter on it. Our seconds are those of the whole
process, TRL's those of its updates after --warm. Environment variables are listed in common.py, the models come from prepare.py.
"""

import argparse
import json
import os
import random
import sys

from common import MODEL_FILES, MODELS, compare, fresh, our_run, peer_side, peer_training, print_header, some_words
from pairs import write_pairs

EPOCHS, LEARNING_RATE = 4, 1e-5


def write_prompts(path, count, length):
    draw = random.Random(1234)
    with open(path, "w") as out:
        out.writelines(json.dumps({"prompt": some_words(draw, length)}) + "\n" for _ in range(count))


def make_reward_adapter(base):
    """A reward model; the cost does not depend on its scores."""
    rows = fresh("reward_rows.jsonl")
    write_pairs(rows, 1, prompt=32, response=32)
    out, _ = our_run("reward", ["--base", base, "--data", rows], samples=1, steps=1)
    kept = fresh("reward_adapter")
    os.rename(out, kept)
    return next(folder.parent for folder in sorted(kept.rglob("adapter_config.json")))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="another GGUF of the same model for us")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--response", type=int, default=32, help="tokens")
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="timed updates")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--value-model", help="where our value head sits [default: the binary's own]")
    parser.add_argument("--lora-value", action="store_true", help="the peer's value model with an adapter too")
    parser.add_argument("--compute", help="our kernels [default: the binary's own]")
    args = parser.parse_args()
    if "TRL_PPO" not in os.environ:
        sys.exit("TRL_PPO is not set; the head of this script says how to get TRL 1.0.0")

    folder, gguf = MODEL_FILES["smollm2"]
    base, folder = args.base or MODELS / gguf, MODELS / folder
    steps, rows = args.warm + args.steps, fresh("prompts.jsonl")
    write_prompts(rows, steps * args.batch, args.prompt)
    reward = make_reward_adapter(base)

    def ours():
        work = ["--base", base, "--data", rows, "--reward-adapter", reward, "--min-reward-accuracy", 0]
        update = ["--batch-size", args.batch, "--num-ppo-epochs", EPOCHS, "--num-mini-batches", 1]
        reply = ["--response-length", args.response, "--temperature", 0.7, "--missing-eos-penalty", 1]
        head = ["--value-model", args.value_model] if args.value_model else []
        kernel = ["--compute", args.compute] if args.compute else []
        flags = [*update, *reply, *head, *kernel]
        return our_run("ppo", work, *flags, samples=args.batch, steps=steps, rate=LEARNING_RATE)[1]

    flags = ["--lora-value"] if args.lora_value else []

    def peer():
        work = ["--model", folder, "--rows", rows, "--batch", args.batch, "--updates", steps]
        update = ["--epochs", EPOCHS, "--response", args.response, "--learning-rate", LEARNING_RATE]
        done = peer_training("trl_ppo.py", *work, *update, *flags)
        return peer_side(done, args.warm, args.batch)

    print_header()
    name = " ".join(["ppo", args.compute or "", f"{args.batch} x {args.prompt}+{args.response}", *flags]).replace("  ", " ")
    compare(name, "rows/s", args.rounds, ours, peer)


if __name__ == "__main__":
    main()
