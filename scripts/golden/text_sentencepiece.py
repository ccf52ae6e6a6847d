#!/usr/bin/env python3
"""Writes tests/golden/text/sentencepiece: two SentencePiece vocabularies as GGUFs, and the ids that llama.cpp
gives 500 mixed texts under each.

    python3 scripts/golden/text_sentencepiece.py LLAMA_CPP

LLAMA_CPP is a checkout of llama.cpp with llama-tokenize built in build/bin. Texts without special tokens must have the
ids that the sentencepiece package itself gives them.
"""

import io
import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import sentencepiece as spm

from tiny_models import TEXT, write_json

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/text/sentencepiece"
TOKENIZE = Path(sys.argv[1]).resolve() / "build/bin/llama-tokenize"
MARKS = ["<|user|>", "<|end|>"]
ALPHABETS = ["abcdefghij ", "  \t\n", "0123456789.,", "äöüßéèñ", "Паромчерез", "渡し船は川を", "\N{GRINNING FACE}\N{ROCKET}\u200d", "<>|/s"]


def train(vocab_size, in_front):
    made = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=made,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=in_front,
        user_defined_symbols=MARKS[:1],
        control_symbols=MARKS[1:],
        num_threads=1,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=made.getvalue())


def write(path, sp, in_front):
    def kind(i):
        tests = [(sp.IsUnknown, "UNKNOWN"), (sp.IsControl, "CONTROL"), (sp.IsUnused, "UNUSED"), (sp.IsByte, "BYTE")]
        for test, name in tests:
            if test(i):
                return int(gguf.TokenType[name])
        return int(gguf.TokenType.USER_DEFINED if sp.IdToPiece(i) in MARKS else gguf.TokenType.NORMAL)

    ids = range(sp.GetPieceSize())
    w = gguf.GGUFWriter(path, "llama")
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([sp.IdToPiece(i).encode() for i in ids])
    w.add_token_scores([sp.GetScore(i) for i in ids])
    w.add_token_types([kind(i) for i in ids])
    w.add_bos_token_id(sp.bos_id())
    w.add_eos_token_id(sp.eos_id())
    w.add_unk_token_id(sp.unk_id())
    w.add_add_space_prefix(in_front)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()


def texts():
    rng = random.Random(7)
    lines = TEXT.splitlines()
    found = ["", " ", "a", " a", "a ", "  a  b", "\n\n", "▁", "a▁b"]
    while len(found) < 500:
        parts = []
        for _ in range(rng.randint(1, 4)):
            line = rng.choice(lines)
            start = rng.randrange(len(line))
            noise = rng.choice(ALPHABETS)
            parts += [line[start : start + rng.randint(1, 30)], "".join(rng.choice(noise) for _ in range(rng.randint(0, 6)))]
            if rng.random() < 0.15:
                parts.append(rng.choice([*MARKS, "<s>", "</s>", "<unk>", "<0x41>"]))
        found.append("".join(parts))
    return found


def by_llama_cpp(path, text, flags):
    command = [TOKENIZE, "-m", path, "--ids", "--no-bos", "--no-escape", "--log-disable", "--stdin", *flags]
    done = subprocess.run(list(map(str, command)), input=text.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    OUT.mkdir(exist_ok=True)
    all_texts = texts()
    for name, vocab_size, in_front in [("prefixed", 700, True), ("plain", 560, False)]:
        sp = train(vocab_size, in_front)
        path = OUT / f"{name}.gguf"
        write(path, sp, in_front)
        ids, as_text, differ = [], [], 0
        for text in all_texts:
            ids.append(by_llama_cpp(path, text, []))
            as_text.append(by_llama_cpp(path, text, ["--no-parse-special"]))
            if "<" not in text:
                differ += sp.EncodeAsIds(text) != ids[-1]
        print(name, f"{differ} texts have other ids by sentencepiece")
        assert differ == 0
        compact = {"texts": all_texts} if name == "prefixed" else {}
        text = json.dumps({**compact, "ids": ids, "as_text": [a if a != i else None for a, i in zip(as_text, ids)]}, ensure_ascii=False)
        (OUT / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
