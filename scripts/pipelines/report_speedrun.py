#!/usr/bin/env python3
"""The table of scripts/pipelines/speedrun.sh: each stage's time and its main figures before and after.

    python3 scripts/pipelines/report_speedrun.py RUN_DIRECTORY
"""

import json
import sys
from pathlib import Path


def number(value, form="{:.3f}"):
    return form.format(value) if value is not None else "-"


def both(result, key, form="{:.3f}"):
    return f"{number(result.get(key + '_first'), form)} -> {number(result.get(key + '_last'), form)}"


def headline(name, result):
    if name == "tokenizer":
        return f"{result['vocab_size']} tokens, {result['bytes_per_token']:.2f} bytes per token"
    if name == "pretrain":
        bits, rate = both(result, "eval_bits_per_byte"), result["tokens_per_second"]
        return f"held-out bits per byte {bits} (bigram {number(result.get('bigram_bits_per_byte'))}), {rate:.0f} tokens/s"
    if name in ("sft", "reviewer"):
        held_out = f", held out {both(result, 'eval_loss')}" if "eval_loss_first" in result else ""
        return f"loss {both(result, 'loss')}{held_out}"
    if name == "reward":
        return f"accuracy {100 * result['eval_accuracy']:.1f} % on held-out pairs, calibration error {result['eval_calibration_error']:.3f}"
    if name == "ppo":
        return f"held-out reward {both(result, 'eval_reward', '{:.2f}')}, KL {both(result, 'objective/kl', '{:.2f}')}"
    size = result.get("bytes")
    return f"{size / 1e6:.1f} MB" if size else ""


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    stages = ["tokenizer", "pretrain", "quantize", "sft", "reviewer", "reward", "ppo", "merge-sft", "merge-ppo"]
    total = 0
    print(f"{'stage':<12} {'seconds':>8}")
    for name in stages:
        result = json.loads((out / f"{name}.json").read_text())
        seconds = int((out / f"{name}.seconds").read_text())
        total += seconds
        print(f"{name:<12} {seconds:>8}   {headline(name, result)}")
    print(f"{'all':<12} {total:>8}")
    sources = json.loads((out / "pretrain.json").read_text())["sources"]
    print(f"\n{'source':<14} {'share':>6} {'documents':>10} {'MB':>6} {'tokens':>10} {'epochs':>7}")
    for source in sources:
        share, documents, size = 100 * source["weight"], source["documents"], source["bytes"] / 1e6
        tokens, epochs = source["tokens"], source["epochs"]
        print(f"{source['name']:<14} {share:>5.1f}% {documents:>10} {size:>6.1f} {tokens:>10} {epochs:>7.2f}")


if __name__ == "__main__":
    main()
