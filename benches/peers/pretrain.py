#!/usr/bin/env python3
"""Full-parameter steps from random weights: ours against PyTorch with transformers, in alternation.

    python3 benches/peers/pretrain.py [--compile | --bf16] [--compute int16]

A Llama of 7 M parameters (288 wide, 6 layers, 6 heads, 768 inner, a tied vocabulary of 4096) on 16 x 256 tokens a step,
AdamW with weight decay, gradients clipped. Ours reads text of made-up words through a tokenizer it has learned from them,
the peer random token ids: which tokens they are costs nothing. A rate is the tokens of a step over the median of its
seconds after --warm steps. Environment variables are listed in common.py.
"""

import argparse
import json
import random
import statistics

from common import Side, compare, fresh, peer_training, print_header, quantune, same_start, watched

CONFIG = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 288,
    "intermediate_size": 768,
    "max_position_embeddings": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 6,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def write_text(path, words):
    """Enough different words that a vocabulary fills up."""
    draw = random.Random(1234)
    syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "n", "r", "s")]
    lexicon = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(8000)]
    with open(path, "w") as out:
        for _ in range(words // 100):
            out.write(" ".join(draw.choices(lexicon, k=100)) + ".\n<|endoftext|>\n")


def side(training, warm, tokens):
    seconds = statistics.median(training.seconds[warm:])
    return Side(tokens / seconds, seconds, statistics.median(training.cpu_seconds[warm:]), training.peak_rss)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed ones")
    parser.add_argument("--rounds", type=int, default=3)
    peer_form = parser.add_mutually_exclusive_group()
    peer_form.add_argument("--compile", action="store_true", help="the peer through torch.compile")
    peer_form.add_argument("--bf16", action="store_true", help="the peer's products in bfloat16, by autocast")
    parser.add_argument("--compute", default="f32", help="our kernels")
    args = parser.parse_args()

    steps, tokens = args.warm + args.steps, args.batch * args.length
    text, tokenizer, config = fresh("text.txt"), fresh("tokenizer"), fresh("config.json")
    write_text(text, max(200_000, steps * tokens))
    quantune("tokenizer", "train", "--data", text, "--vocab-size", args.vocabulary, "--out", tokenizer)
    vocab_size = {"vocab_size": args.vocabulary, "max_position_embeddings": args.length}
    config.write_text(json.dumps({**CONFIG, **vocab_size}))
    flags = [f"--{name}" for name in ("compile", "bf16") if getattr(args, name)]
    first_losses = {}

    def ours():
        out = fresh("pretrain")
        model = ["--model-config", config, "--tokenizer", tokenizer, "--compute", args.compute]
        rows = ["--source", f"words=1:{text}", "--max-length", args.length, "--max-steps", steps]
        batches = ["--per-device-train-batch-size", args.batch, "--gradient-accumulation-steps", 1]
        quiet = ["--eval-steps", 0, "--sample-steps", 0, "--save-steps", steps]
        done = watched(["pretrain", *model, *rows, *batches, *quiet, "--out", out], out)
        first_losses["ours"] = done.losses[0]
        return side(done, args.warm, tokens)

    def peer():
        work = ["--config", config, "--batch", args.batch, "--length", args.length, "--steps", steps]
        done = peer_training("hf_pretrain.py", *work, *flags)
        first_losses["peer"] = done.losses[0]
        return side(done, args.warm, tokens)

    print_header()
    compare(" ".join(["pretrain", args.compute, f"{args.batch}x{args.length}", *flags]), "tok/s", args.rounds, ours, peer)
    same_start(first_losses["ours"], first_losses["peer"], bound=0.02)


if __name__ == "__main__":
    main()
