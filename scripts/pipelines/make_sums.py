#!/usr/bin/env python3
"""A task whose answers can be checked: sums in words, "seven plus twelve" -> 19. Writes data/sums/.

    python3 scripts/pipelines/make_sums.py [--largest 50] [--shots 0] [--seed 0]

prompts.train, prompts.heldout   {"prompt", "answer"}: for reinforcement learning and for counting right answers
sft                              {"prompt", "completion"}: so that a small base knows the form before it is rewarded

Two numbers are in training or held out, in whatever order and words they are asked for. Python's standard library;
the same options give the same bytes.
"""

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fetch"))
from smollm2 import ROOT, write_whole  # noqa: E402

OUT = ROOT / "data/sums"
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
QUESTIONS = [
    "What is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "How much is {a} and {b} together?",
    "Add {b} to {a}. What do you get?",
]
ROWS = {"prompts.train": 2000, "prompts.heldout": 200, "sft": 400}


def words(n):
    """0 to 99."""
    if n < 20:
        return ONES[n]
    return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")


def ask(a, b, draw):
    question = draw.choice(QUESTIONS).format(a=words(a), b=words(b))
    return f"Question: {question}\nAnswer:"


def sums(pairs, count, draw):
    """`count` of (prompt, answer): pairs in a shuffled order, again and again, each time asked anew."""
    rows = []
    while len(rows) < count:
        for a, b in draw.sample(pairs, len(pairs)):
            rows.append((ask(*draw.sample((a, b), 2), draw), str(a + b)))
    return rows[:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--largest", type=int, default=50, help="number that is added, at most 99")
    parser.add_argument("--shots", type=int, default=0, help="answered questions before each prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not 1 <= args.largest <= 99:
        parser.error(f"--largest: found {args.largest}, needed 1 to 99")

    draw = random.Random(args.seed)
    pairs = [(a, b) for a in range(args.largest + 1) for b in range(a, args.largest + 1)]
    draw.shuffle(pairs)
    heldout, train = pairs[: len(pairs) // 5], pairs[len(pairs) // 5 :]
    shots = "".join(f"{prompt} {answer}\n\n" for prompt, answer in sums(train, args.shots, draw))

    parts = {"prompts.train": train, "prompts.heldout": heldout, "sft": train}
    for name, source in parts.items():
        rows = [(shots + prompt, answer) for prompt, answer in sums(source, ROWS[name], draw)]
        if name == "sft":
            rows = [{"prompt": prompt, "completion": f" {answer}"} for prompt, answer in rows]
        else:
            rows = [{"prompt": prompt, "answer": answer} for prompt, answer in rows]
        write_whole(OUT / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        print(f"{OUT / name}.jsonl: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
