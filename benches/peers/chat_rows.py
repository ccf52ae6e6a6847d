"""Conversations as rows of token ids and labels, of which only the assistant's words are learned.

    python3 chat_rows.py FOLDER CHATS.jsonl ROWS.jsonl

FOLDER holds the tokenizer. The rows are shuffled by a fixed seed: neighbours in a corpus are alike in
length, which would hide what padding costs.
"""

import json
import random
import sys

import transformers

from common import ROOT

sys.path.insert(0, str(ROOT / "scripts/check"))
from smollm2 import encode_chat  # noqa: E402


def main(folder, chats, out):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [encode_chat(tokenizer, json.loads(line)["messages"]) for line in open(chats)]
    random.Random(1234).shuffle(rows)
    with open(out, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
