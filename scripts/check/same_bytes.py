#!/usr/bin/env python3
"""Runs two binaries on the same tiny models and data and compares their output files byte for byte.

    python3 scripts/check/same_bytes.py OLD NEW        binaries; scripts/check/same_bytes.sh builds them from commits

Compared are all files of each run directory (adapters, checkpoints, pretrained weights, metrics.jsonl without times,
samples) and the JSON on stdout, without what depends on time or place: times, memory, TensorBoard events, config.toml
and fingerprints.json. Both binaries write to the same path, one after the other, so that paths are equal too. Models are
those of tests/golden. ONLY, THREADS and KEEP as in same_bytes.sh. Ends with 1 where anything differs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden"
MODELS = GOLDEN / "model"
FAMILIES = GOLDEN / "model_families"
THREADS = os.environ.get("THREADS", "2")
PRECISIONS = ["f32", "int16"]
SKIPPED = ("tensorboard", "config.toml", "fingerprints.json", "lock")
# Of the JSON on stdout and of the lines of metrics.jsonl.
VOLATILE_KEYS = ("seconds", "peak_rss_bytes", "kernels", "share_", "predicted_", "per_second")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_data(data):
    """Rows of every kind, some words long; the same on every call."""
    turn = lambda role, content: {"role": role, "content": content}
    question = lambda i: [turn("user", f"question {i} about {'words ' * (i % 7)}")]
    answer = lambda text: [turn("assistant", text)]
    files = {
        "chats": [{"messages": question(i) + answer(f"answer {i * i}")} for i in range(40)],
        "held_out": [{"messages": question(i) + answer(f"answer {i * i}")} for i in range(50, 56)],
        "texts": [{"text": f"A story of {i} birds that sat on a wall and sang. They sang {7 * i} songs."} for i in range(60)],
        "pairs": [
            {"prompt": question(i), "chosen": answer(f"good {i * i}"), "rejected": answer(f"bad {i} of all")} for i in range(40)
        ],
        "held_out_pairs": [
            {"prompt": question(i), "chosen": answer(f"good {i * i}"), "rejected": answer(f"bad {i} of all")}
            for i in range(50, 58)
        ],
        "margins": [
            {"prompt": question(i), "chosen": answer(f"good {i}"), "rejected": answer(f"bad {i}"), "margin": i % 3 / 2}
            for i in range(40)
        ],
        "ranked": [{"prompt": question(i), "responses": [answer(f"{w} {i}") for w in ("best", "good", "bad")]} for i in range(24)],
        "labels": [
            {"prompt": question(i), "completion": answer(f"answer {i}"), "label": i % 3 != 0} for i in range(40)
        ],
        "prompts": [{"prompt": question(i), "answer": i} for i in range(40)],
        # Token ids for the models of all families, whose vocabularies have 64 tokens.
        "ids": [
            {"input_ids": ids, "labels": [-100] + ids[1:]}
            for ids in ([(7 * i + 3 * j * j) % 58 + 3 for j in range(9 + i % 11)] for i in range(32))
        ],
    }
    for name, rows in files.items():
        (data / f"{name}.jsonl").write_text(lines(rows))
    notes = "".join(f"Note {i}: {'to be kept in mind. ' * (i % 5)}\n<|endoftext|>\n" for i in range(60))
    (data / "notes.txt").write_text(notes)


def write_families(data):
    """The golden models of all families, each with a small tokenizer, which their folders lack."""
    names = ["<unk>", "<s>", "</s>", *map(chr, range(ord("A"), ord("z") + 1))]
    special = [
        {"id": i, "content": names[i], "special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        for i in range(3)
    ]
    model = {"type": "BPE", "vocab": {name: i for i, name in enumerate(names)}, "merges": [], "unk_token": "<unk>"}
    tokenizer = {"version": "1.0", "added_tokens": special, "normalizer": None, "pre_tokenizer": None, "post_processor": None,
                 "decoder": None, "truncation": None, "padding": None, "model": model}  # fmt: skip
    for source in sorted(path for path in FAMILIES.iterdir() if (path / "config.json").exists()):
        folder = data / "families" / source.name
        folder.mkdir(parents=True)
        for file in source.iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


def runs(data):
    """Name -> arguments; `OUT` is the run's folder. Each runs once per precision."""
    base = ["--base", MODELS / "llama-tiny"]
    file = lambda name: data / f"{name}.jsonl"
    train = lambda name, steps=4: ["--data", file(name), "--max-steps", steps, "--out", "OUT", "--learning-rate", 0.005, "--r", 4]
    sft = ["sft", *base, *train("chats")]
    reward_adapter = GOLDEN / "rl/reward/final"
    adapter = GOLDEN / "train/llama-tiny/final"
    yield "sft", [*sft, "--lora-dropout", 0.1, "--eval-data", file("held_out"), "--eval-strategy", "steps", "--eval-steps", 2,
                  "--save-steps", 2, "--gradient-accumulation-steps", 2]  # fmt: skip
    yield "sft texts", ["sft", *base, *train("texts"), "--weight-decay", 0.1, "--neftune-noise-alpha", 5]
    yield "sft unpacked", [*sft, "--packing", "false", "--max-grad-norm", 0.1]
    yield "sft recomputed", [*sft, "--gradient-checkpointing", "true"]
    yield "sft continued", [*sft[:-2], "--adapter", adapter]  # without --r, which the adapter defines
    yield "sft on frozen", [*sft, "--frozen-adapter", adapter]
    yield "sft dora", [*sft, "--use-dora", "true"]
    yield "sft rslora+", [*sft, "--use-rslora", "true", "--loraplus-lr-ratio", 8]
    yield "sft pissa", [*sft, "--init-lora-weights", "pissa"]
    yield "sft olora", [*sft, "--init-lora-weights", "olora"]
    yield "sft loftq", ["sft", "--base", MODELS / "llama-tiny", "--load-type", "Q4_0", *train("chats"), "--init-lora-weights",
                        "loftq", "--loftq-base", MODELS / "llama-tiny"]  # fmt: skip
    yield "sft head+embedding", [*sft, "--target-modules", "q_proj,v_proj,lm_head,embed_tokens"]
    yield "sft whole head", [*sft, "--modules-to-save", "lm_head"]
    yield "sft token rows", [*sft, "--trainable-token-indices", "5,300"]
    yield "sft added tokens", [*sft, "--add-tokens", "ferry,question", "--add-special-tokens", "<|tool|>"]
    for name in ["llama-q4_0.gguf", "llama-q8_0.gguf", "llama-k.gguf", "qwen2-mix.gguf", "qwen2-tiny", "llama-untied"]:
        yield f"sft {name}", ["sft", "--base", MODELS / name, *train("texts", 3)]
    for folder in sorted((data / "families").iterdir()):
        yield f"sft {folder.name}", ["sft", "--base", folder, *train("ids", 3)]
    for loss in ["sigmoid", "ipo", "hinge", "orpo", "simpo"]:
        yield f"dpo {loss}", ["dpo", *base, *train("pairs"), "--loss-type", loss, "--eval-data", file("held_out_pairs")]
    yield "dpo kto", ["dpo", *base, *train("labels"), "--loss-type", "kto"]
    yield "dpo reference", ["dpo", *base, *train("pairs"), "--ref-adapter", adapter, "--gradient-accumulation-steps", 3]
    yield "reward", ["reward", *base, *train("pairs"), "--eval-data", file("held_out_pairs"), "--save-steps", 2]
    yield "reward margins", ["reward", *base, *train("margins"), "--center-rewards-coefficient", 0.1]
    yield "reward ranked", ["reward", *base, *train("ranked")]
    ppo = ["ppo", *base, *train("prompts", 3), "--reward-adapter", reward_adapter, "--batch-size", 8, "--response-length", 8,
           "--num-ppo-epochs", 2]  # fmt: skip
    yield "ppo", [*ppo, "--num-mini-batches", 2, "--whiten-rewards", "true", "--save-steps", 2, "--sample-steps", 1]
    yield "ppo shared value", [*ppo, "--value-model", "policy"]
    yield "ppo pretraining mix", [*ppo, "--ptx-data", file("chats"), "--target-kl", 0.01]
    grpo = ["grpo", *base, *train("prompts", 3), "--reward", "length:20:characters", "--batch-size", 2, "--num-generations", 4,
            "--max-completion-length", 8]  # fmt: skip
    yield "grpo", [*grpo, "--num-iterations", 2, "--beta", 0.1, "--save-steps", 2]
    yield "grpo dr", [*grpo, "--scale-rewards", "none", "--loss-type", "dr_grpo"]
    yield "grpo rloo", [*grpo, "--advantage", "rloo"]
    yield "grpo reward model", [*grpo, "--reward-adapter", reward_adapter]
    fresh = ["--preset", "micro", "--hidden-size", 32, "--num-hidden-layers", 2, "--num-attention-heads", 4, "--intermediate-size",
             48, "--tokenizer", MODELS / "llama-tiny"]  # fmt: skip
    pretrain = ["pretrain", "--source", f"texts=1:{file('texts')}", f"notes=2:{data / 'notes.txt'}", "--max-length", 24,
                "--per-device-train-batch-size", 3, "--max-steps", 4, "--validation-split", 0.2, "--out", "OUT",
                "--sample-tokens", 4, "--learning-rate", 0.01]  # fmt: skip
    yield "pretrain", [*pretrain, *fresh, "--save-steps", 2, "--eval-steps", 2, "--export", "OUT/model.gguf"]
    yield "pretrain documents", [*pretrain, *fresh, "--reset-attention", "--num-key-value-heads", 2]
    yield "pretrain recomputed", [*pretrain, *fresh, "--gradient-checkpointing", "--tie-word-embeddings", "false"]
    yield "pretrain continued", [*pretrain, "--base", MODELS / "llama-tiny", "--gradient-accumulation-steps", 2]
    yield "pretrain qwen2", [*pretrain, "--base", MODELS / "qwen2-tiny"]
    yield "pretrain qwen3", [*pretrain, "--base", data / "families/qwen3"]
    for name in ["llama-tiny", "llama-q4_0.gguf", "llama-k.gguf", "qwen2-mix.gguf"]:
        generate = ["generate", "--base", MODELS / name, "--prompt", "Which road leads to the mountain?", "--max-tokens", 24]
        yield f"generate {name}", [*generate, "--temperature", 0, "--logprobs", 5]
        yield f"sample {name}", [*generate, "--temperature", 1, "--seed", 3, "--top-p", 0.95]
        yield f"eval {name}", ["eval", "--base", MODELS / name, "--data", file("texts")]
    answer = ["generate", *base, "--prompt", "Which road?", "--max-tokens", 16, "--adapter", adapter]
    yield "generate adapter", [*answer, "--temperature", 0, "--logprobs", 5]
    yield "best of adapter", [*answer, "--best-of", 4, "--reward-adapter", reward_adapter, "--seed", 5]
    yield "generate q8 cache", [*answer, "--temperature", 0, "--logprobs", 5, "--cache-type", "q8"]
    yield "eval adapter", ["eval", *base, "--data", file("held_out"), "--adapter", adapter]
    yield "eval reward", ["eval", *base, "--data", file("held_out_pairs"), "--reward", reward_adapter]


PORTABLE = ("sft", "dpo sigmoid", "dpo kto", "reward", "ppo", "grpo", "pretrain", "generate adapter", "eval reward", "sft gemma2")
ONCE = {
    "merge Q4_0": ["merge", "--base", MODELS / "llama-tiny", "--adapter", GOLDEN / "train/llama-tiny/final", "--out",
                   "OUT/merged.gguf", "--type", "Q4_0"],  # fmt: skip
    "merge folder": ["merge", "--base", MODELS / "llama-q8_0.gguf", "--adapter", GOLDEN / "train/llama-q8_0/final", "--out",
                     "OUT/merged", "--type", "F16"],  # fmt: skip
    "export lora": ["export", "--base", MODELS / "llama-tiny", "--adapter", GOLDEN / "train/llama-tiny/final", "--out",
                    "OUT/adapter.gguf"],  # fmt: skip
    "quantize": ["quantize", "--base", MODELS / "llama-k.gguf", "--out", "OUT/model.gguf", "--type", "Q4_K_M"],
}


def without_volatile(value):
    if isinstance(value, dict):
        return {
            key: without_volatile(item) for key, item in value.items() if not any(word in key for word in VOLATILE_KEYS)
        }
    return [without_volatile(item) for item in value] if isinstance(value, list) else value


def result(output):
    """The last line of stdout, or the error."""
    if output.returncode:
        errors = [line for line in output.stderr.splitlines() if line.startswith("error: ")]
        return "\n".join(errors or output.stderr.splitlines()[-3:])
    return json.dumps(without_volatile(json.loads(output.stdout.splitlines()[-1])), sort_keys=True)


def kept(path):
    """The bytes of a file that are compared."""
    content = path.read_bytes()
    if path.name in ("metrics.jsonl", "trainer_state.json") or path.suffix == ".jsonl" and path.name.startswith("metrics"):
        return b"\n".join(json.dumps(without_volatile(json.loads(line)), sort_keys=True).encode() for line in content.splitlines() if line)
    return content


def traces(binary, args, out):
    """The output of a run: file name -> bytes, and its result under an empty name. Paths below `out` are equal for both."""
    shutil.rmtree(out, ignore_errors=True)
    if args[0] in ("merge", "export", "quantize"):
        out.mkdir()
    command = [str(binary), *(str(arg).replace("OUT", str(out)) for arg in args)]
    output = subprocess.run(command, capture_output=True, text=True)
    found = {"": result(output).encode()}
    for path in sorted(out.rglob("*")) if out.exists() else ():
        name = str(path.relative_to(out))
        if path.is_file() and not name.startswith(SKIPPED) and path.name not in SKIPPED:
            found[name] = kept(path)
    return output.returncode, found


def main():
    old, new = sys.argv[1:]
    only = os.environ.get("ONLY", "")
    work = Path(tempfile.mkdtemp(prefix="same-bytes-"))
    data = work / "data"
    data.mkdir()
    write_data(data)
    write_families(data)
    table = [
        (name, compute, [*args, "--compute", compute])
        for name, args in runs(data)
        for compute in PRECISIONS + ["portable"] * (name in PORTABLE)
    ]
    table += [(name, "", args) for name, args in ONCE.items()]
    differing, failed, done, files = [], [], 0, 0
    began = time.time()
    for name, compute, args in table:
        title = f"{name} {compute}".strip()
        if only not in title:
            continue
        args = [*args, "--threads", THREADS, "--json"]
        code, before = traces(old, args, work / "out")
        new_code, after = traces(new, args, work / "out")
        done += 1
        files += len(before)
        differences = [key or "result" for key in sorted({*before, *after}) if before.get(key) != after.get(key)]
        size = sum(map(len, before.values()))
        if differences:
            differing.append(title)
            print(f"DIFFER  {title:34} {', '.join(differences)}", flush=True)
            for code_of, side, found in ((code, "old", before), (new_code, "new", after)):
                if "result" in differences:
                    print(f"        {side}: {found[''].decode()[:300]}")
        elif code:
            failed.append(title)
            print(f"FAILED  {title:34} {before[''].decode()[:200]}", flush=True)
        else:
            print(f"same    {title:34} {len(before):4} files {size:9} bytes", flush=True)
    if not os.environ.get("KEEP"):
        shutil.rmtree(work)
    print(f"{done} runs, {files} files: {len(differing)} differ, {len(failed)} failed in both, {time.time() - began:.0f} s")
    if failed:
        print(f"failed: {', '.join(failed)}")
    sys.exit(1 if differing or failed or not done else 0)


if __name__ == "__main__":
    main()
