#!/usr/bin/env python3
"""Makes the golden files of tests/golden again, with the pinned packages of requirements.txt.

    python3 scripts/golden/make.py                                  # all but those that need llama.cpp
    python3 scripts/golden/make.py tiny_models rl                   # these
    python3 scripts/golden/make.py --llama-cpp DIR                  # all
    python3 scripts/golden/make.py --list

A name is that of a script in this folder. Scripts run in the order of --list, since some read what others wrote, in a
Python environment in target/golden-venv (some GB) unless PYTHON names an interpreter that has the packages. The same
packages give the same bytes, on the same kind of CPU: `git status tests/golden` must be clean afterwards.

--llama-cpp names a checkout of llama.cpp with llama-quantize and llama-tokenize built in build/bin.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
TARGET = ROOT / "target"
SDIST = "llama-cpp-python==0.3.36"  # carries llama.cpp's chat templates

# Script, the folders of tests/golden it writes (or the files in one), and its requirements other than packages.
SCRIPTS = {
    "tiny_models": ("model, train", None),
    "weights": ("weights", None),
    "adapters": ("adapters", None),
    "lora_variants": ("lora_variants", None),
    "added": ("added", None),
    "model_families": ("model_families", "llama.cpp"),
    "export": ("export", "llama.cpp"),
    "text": ("text: tokens.json, templates.json", None),
    "text_trained": ("text: trained.json", None),
    "text_templates": ("text: real_templates.json", "sdist"),
    "text_sentencepiece": ("text: sentencepiece/", "llama.cpp"),
    "data": ("data: the tokenizers and trl.json", None),
    "data_comparisons": ("data: comparisons.json", None),
    "data_parquet": ("data: rows.parquet, rows.jsonl", None),
    "generate": ("generate", None),
    "objectives": ("objectives", "PPO"),
    "rl": ("rl", "PPO"),
    "pretrain": ("pretrain", None),
}


def run(command, **environment):
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, check=True, env={**os.environ, **environment})


def python():
    """An interpreter with the pinned packages."""
    if "PYTHON" in os.environ:
        return os.environ["PYTHON"]
    venv = TARGET / "golden-venv"
    if not (venv / "bin/python").exists():
        run([sys.executable, "-m", "venv", venv])
    run([venv / "bin/python", "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"])
    return venv / "bin/python"


def trl_with_ppo(interpreter):
    """A folder with TRL 1.0.0, for PYTHONPATH."""
    folder = TARGET / "trl-1.0.0"
    if not folder.exists():
        run([interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "trl==1.0.0"])
    return str(folder)


def sdist(interpreter):
    folder = TARGET / "llama.cpp"
    if not (found := list(folder.glob("llama_cpp_python-*.tar.gz"))):
        pip = [interpreter, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        run([*pip, "--dest", folder, SDIST])
        found = list(folder.glob("llama_cpp_python-*.tar.gz"))
    return found[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="scripts of this folder, without .py")
    parser.add_argument("--llama-cpp", metavar="DIR", help="a checkout of llama.cpp, built")
    parser.add_argument("--list", action="store_true", help="print the scripts and the folders they write")
    args = parser.parse_args()
    if args.list:
        for name, (writes, needs) in SCRIPTS.items():
            print(f"{name:20}{writes}" + (f"  (needs {needs})" if needs == "llama.cpp" else ""))
        return
    if unknown := [name for name in args.names if name not in SCRIPTS]:
        sys.exit(f"no such script: {', '.join(unknown)}; there are {', '.join(SCRIPTS)}")
    wanted = [name for name in SCRIPTS if name in args.names or not args.names]
    lacking = [name for name in wanted if SCRIPTS[name][1] == "llama.cpp" and not args.llama_cpp]
    if lacking and args.names:
        sys.exit(f"--llama-cpp is needed for {', '.join(lacking)}")
    interpreter = python()
    for name in wanted:
        if name in lacking:
            print(f"skipped {name}: it needs --llama-cpp", flush=True)
            continue
        needs = SCRIPTS[name][1]
        command = [interpreter, HERE / f"{name}.py"]
        if needs == "llama.cpp":
            command.append(Path(args.llama_cpp).resolve())
        elif needs == "sdist":
            command.append(sdist(interpreter))
        run(command, PYTHONHASHSEED="0")
        if needs == "PPO":
            ppo = ["ppo"] if name == "objectives" else []
            run([*command, *ppo], PYTHONHASHSEED="0", PYTHONPATH=trl_with_ppo(interpreter))


if __name__ == "__main__":
    main()
