"""Compares token ids with llama.cpp's on random texts, for every pre-tokenizer name we know.

    scripts/check/tokenizer_random.py MODELS LLAMA_TOKENIZE TOKENIZE [GGUF...] [--size N] [--seed N]

MODELS is models/ of llama.cpp's tree, as scripts/check/tokenizer.sh unpacks it; LLAMA_TOKENIZE is the
llama-tokenize built from that tree; TOKENIZE is our benches/tools/tokenize.rs, built. Further GGUFs are compared too.
"""

import argparse
import json
import random
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = """the quick brown fox I'm You'LL we've They'D it'S can't o'clock 'tis 's 'Re ''ll camelCaseWord
HTTPServer getURL2 naïve Ünïcödé straße ΑΒΓ αβγ Привет мир שלום مرحبا ١٢٣ हिन्दी ภาษาไทย 你好世界 こんにちは カタカナ
한국어 Ⅷ ½ ² 😀 👩‍👩‍👧 🇩🇪 … — “quoted” ‘x’ $100 €5,99 a+b=c <tag> </tag> {} [] \\n /path/to x_1 __init__ #!$%^&*
!!! ??? ... --- ~~~ === `code` |pipe| é e\u0301 ſ ß ǅ İ K \u200b \ufeff \xa0 \u3000 \u2028 \x85 \x1c \x0b \x0c
<|im_start|> <|im_end|> <|endoftext|> <|begin_of_text|> <|eot_id|> <s> </s> <fim_prefix> <|im_ <|endof"""


def random_text(rng, size):
    words = WORDS.split(" ") + WORDS.split()
    out = []
    while sum(map(len, out)) < size:
        match rng.randrange(9):
            case 0: out.append(str(rng.randrange(10 ** rng.randrange(1, 12))))
            case 1: out.append(rng.choice([" ", "\t", "\n", "\r\n", "\r", "\n\n"]) * rng.randrange(1, 6))
            case 2: out.append("".join(rng.choice(" \t\n\r\x0b\xa0\u3000") for _ in range(rng.randrange(1, 5))))
            case 3: out.append("".join(random_char(rng) for _ in range(rng.randrange(1, 6))))
            case 4: out.append("".join(rng.choice("!?.,;:'\"()-_/\\*&^%$#@~`+=<>|") for _ in range(rng.randrange(1, 5))))
            case 5: out.append("".join(rng.choice("aAbBzZ019 'sStT\n") for _ in range(rng.randrange(1, 9))))
            case _: out.append(rng.choice(words) + rng.choice(["", " ", " ", "  ", "\n"]))
    return "".join(out)


def random_char(rng):
    while True:
        c = rng.randrange(1, rng.choice([0x80, 0x250, 0x3000, 0x10000, 0x32000, 0x110000]))
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def with_pre(gguf: bytes, pre: str) -> bytes:
    """The same file, which has no tensors, under another tokenizer.ggml.pre."""
    key = b"tokenizer.ggml.pre"
    at = gguf.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    kind, length = struct.unpack_from("<IQ", gguf, at)
    assert kind == 8
    return gguf[: at + 4] + struct.pack("<Q", len(pre)) + pre.encode() + gguf[at + 12 + length :]


def known_names():
    source = (Path(__file__).resolve().parents[2] / "src/text/pre_tokenizer.rs").read_text()
    table = source[source.index("const TABLE") :]
    table = table[: table.index("\n];")]
    # What a pattern has and a name has not: backslashes, brackets, plus signs.
    return [name for name in re.findall(r'"([^"]+)"', table) if re.fullmatch(r"[a-z0-9._-]+", name)]


def last_list(text):
    return json.loads(re.findall(r"\[[\d, ]*\]", text)[-1])


def agree(args, gguf, rng, scratch):
    faults = 0
    for special in (True, False):
        file = scratch / "text"
        file.write_bytes(random_text(rng, args.size).replace("\x1e", "").encode())
        run = lambda *command: subprocess.run(command, capture_output=True, check=True).stdout.decode(errors="replace")
        needed = last_list(run(args.llama_tokenize, "-m", gguf, "-f", file, "--ids", "--no-bos", "--no-escape",
                               "--log-disable", *([] if special else ["--no-parse-special"])))
        found = last_list(run(args.tokenize, gguf, file, *(["--special"] if special else [])))
        if found != needed:
            faults += 1
            at = next((i for i, (a, b) in enumerate(zip(found, needed)) if a != b), min(len(found), len(needed)))
            print(f"{gguf.name}, special {special}: token {at} is {found[at : at + 3]}, llama.cpp has {needed[at : at + 3]}")
    return faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("llama_tokenize")
    parser.add_argument("tokenize")
    parser.add_argument("ggufs", type=Path, nargs="*")
    parser.add_argument("--size", type=int, default=4000, help="characters of each text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    names = known_names()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        faults = 0
        own = "command-r deepseek-coder deepseek-llm falcon gpt-2 llama-bpe qwen2 qwen35 refact starcoder".split()
        for gguf in [args.models / f"ggml-vocab-{name}.gguf" for name in own] + args.ggufs:
            faults += agree(args, gguf, rng, scratch)
        for base in ("gpt-2", "qwen2"):
            gguf = (args.models / f"ggml-vocab-{base}.gguf").read_bytes()
            for name in names:
                variant = scratch / f"{base}-as-{name}.gguf"
                variant.write_bytes(with_pre(gguf, name))
                faults += agree(args, variant, rng, scratch)
                variant.unlink()
    print(f"{len(names)} names, {faults} texts with other ids than llama.cpp's")
    sys.exit(faults > 0)


main()
