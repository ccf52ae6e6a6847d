#!/usr/bin/env python3
"""Real human judgements as data for reward models and reinforcement learning: writes data/sentiment/.

    python3 scripts/fetch/sentiment.py [--margin]
    python3 scripts/fetch/sentiment.py --naive-bayes     # the baseline a reward model has to beat

The 10,605 movie-review snippets of vaderSentiment 3.3.2 (MIT; Hutto & Gilbert 2014, texts by their authors), each
rated from -4 to 4 by about 20 people. Python's standard library and pip; the same bytes everywhere.

A hash of the text puts each snippet into one part, and nothing crosses parts:

    A  (40 %)  pairs.train, prompts.train, sft     what the policy and its reward model learn from
    B  (40 %)  judge.train                         a second reward model, whose snippets nobody else has seen
    C  (20 %)  held out: two thirds for pairs.heldout and judge.heldout, a third for prompts.heldout

A pair is two whole snippets whose mean ratings are 1 or more apart; --margin writes how far. A prompt is the first
three to six words of a snippet.
"""

import argparse
import hashlib
import html
import io
import json
import math
import re
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from smollm2 import ROOT, download_sdist, write_whole

OUT = ROOT / "data/sentiment"
SDIST = ("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PAIRS = {"pairs.train": 2000, "pairs.heldout": 500, "judge.train": 2000, "judge.heldout": 500}
HELDOUT_PROMPTS = 128
LEAST_WORDS = 8  # of a snippet that lends its beginning to a prompt


# ------------------------------------------------------------------- snippets


def clean(text):
    """As a reviewer would have typed it: two apostrophes are a quotation mark, runs of spaces were dashes."""
    text = html.unescape(text).replace("''", '"')
    text = re.sub(r"(?<=\S)\s{3,}(?=\S)", " - ", text)
    return " ".join(text.split())


def read_snippets():
    """[(text, mean rating)], in the order of the file, each text once."""
    with tempfile.TemporaryDirectory() as tmp:
        with tarfile.open(download_sdist(*SDIST, tmp)) as sdist:
            inner = sdist.extractfile(INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        lines = archive.extractfile(RATINGS).read().decode("utf-8", errors="replace").splitlines()
    seen = {}
    for line in lines:
        _id, rating, text = line.split("\t")
        text = clean(text)
        if "\N{REPLACEMENT CHARACTER}" not in text:
            seen.setdefault(text.lower(), (text, float(rating)))
    return list(seen.values())


def order(key, text):
    """A number in [0, 1) that is the text's own under this key."""
    return int.from_bytes(hashlib.sha256(f"{key}\n{text.lower()}".encode()).digest()[:7]) / 256**7


def part_of(text):
    share = order("part", text)
    ends = {"A": 0.4, "B": 0.8, "C pairs": 0.8 + 0.2 * 2 / 3, "C prompts": 1.0}
    return next(part for part, end in ends.items() if share < end)


# ----------------------------------------------------------------------- rows


def make_pairs(snippets, name, margin):
    """Neighbours in a shuffled order are a pair if they are far enough apart; then another order, until there are
    enough. A snippet is in one pair of a round at most."""
    pairs, met, rounds = [], set(), 0
    while len(pairs) < PAIRS[name]:
        shuffled = sorted(snippets, key=lambda s: order(f"{name} {rounds}", s[0]))
        for first, second in zip(shuffled[::2], shuffled[1::2]):
            chosen, rejected = sorted((first, second), key=lambda s: -s[1])
            apart = chosen[1] - rejected[1]
            if apart >= 1 and (chosen[0], rejected[0]) not in met:
                met.add((chosen[0], rejected[0]))
                row = {"chosen": chosen[0], "rejected": rejected[0]}
                pairs.append({**row, "margin": round(apart, 4)} if margin else row)
        rounds += 1
    return pairs[: PAIRS[name]]


def make_prompts(snippets):
    """Beginnings that go on, each once, in a shuffled order."""
    prompts = {}
    for text, _rating in sorted(snippets, key=lambda s: order("prompts", s[0])):
        words = text.split()
        count = 3 + int(4 * order("words", text))
        beginning = " ".join(words[:count])
        if len(words) >= LEAST_WORDS and beginning[-1] not in ".!?":
            prompts.setdefault(beginning.lower(), beginning)
    return list(prompts.values())


def make_all(margin):
    """File name -> rows."""
    parts = {}
    for snippet in read_snippets():
        parts.setdefault(part_of(snippet[0]), []).append(snippet)
    sources = {"pairs.train": "A", "pairs.heldout": "C pairs", "judge.train": "B", "judge.heldout": "C pairs"}
    files = {name: make_pairs(parts[part], name, margin) for name, part in sources.items()}
    train = make_prompts(parts["A"])
    known = {prompt.lower() for prompt in train}
    heldout = [prompt for prompt in make_prompts(parts["C prompts"]) if prompt.lower() not in known]
    files["prompts.train"] = [{"prompt": prompt} for prompt in train]
    files["prompts.heldout"] = [{"prompt": prompt} for prompt in heldout[:HELDOUT_PROMPTS]]
    shuffled = sorted(parts["A"], key=lambda s: order("sft", s[0]))
    files["sft"] = [{"text": text} for text, _rating in shuffled]
    return files


# ---------------------------------------------------------------- naive Bayes


def features(text):
    """Its words; adding bigrams makes it worse on 2000 pairs."""
    return re.findall(r"[a-z0-9']+|[!?]", text.lower())


def fit(rows):
    """Feature -> by how many nats it speaks for `chosen`: multinomial naive Bayes, one count added everywhere."""
    counts = {side: Counter(f for row in rows for f in features(row[side])) for side in ("chosen", "rejected")}
    known = counts["chosen"].keys() | counts["rejected"].keys()
    totals = {side: sum(count.values()) + len(known) for side, count in counts.items()}

    def log_share(side, feature):
        return math.log((counts[side][feature] + 1) / totals[side])

    return {feature: log_share("chosen", feature) - log_share("rejected", feature) for feature in known}


def naive_bayes(train, heldout):
    """Share of held-out pairs whose chosen snippet is scored higher."""
    weights = fit(train)

    def score(text):
        return sum(weights.get(feature, 0.0) for feature in features(text))

    return sum(score(row["chosen"]) > score(row["rejected"]) for row in heldout) / len(heldout)


def read_rows(name):
    path = OUT / f"{name}.jsonl"
    if not path.exists():
        sys.exit(f"{path}: not there; run this script without --naive-bayes first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--margin", action="store_true", help="pairs say by how much the mean ratings differ")
    parser.add_argument("--naive-bayes", action="store_true", help="print the baseline's accuracy, write nothing")
    args = parser.parse_args()
    if args.naive_bayes:
        for kind in ("pairs", "judge"):
            accuracy = naive_bayes(read_rows(f"{kind}.train"), read_rows(f"{kind}.heldout"))
            print(f"{kind}: naive Bayes {accuracy:.1%} of {PAIRS[f'{kind}.heldout']} held-out pairs")
        return
    for name, rows in make_all(args.margin).items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_whole(OUT / f"{name}.jsonl", lines.encode())
        print(f"{OUT / name}.jsonl: {len(rows)} rows", file=sys.stderr)


if __name__ == "__main__":
    main()
