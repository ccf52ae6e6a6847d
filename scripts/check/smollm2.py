#!/usr/bin/env python3
"""Compares Quantune with transformers, PEFT and llama.cpp on SmolLM2-135M-Instruct. Run it by scripts/check/smollm2.sh.

    python3 scripts/check/smollm2.py [reference] [modes] [perplexity] [memory] [steps] [interop] [parity]

reference   top-10 log-probs and greedy tokens against tests/golden/model/smollm2.json
modes       the same log-probs in --compute int16 (within 2e-2) and int8, and their perplexity
perplexity  GPL-3 in llama.cpp's chunks of 512 against the stored 18.30; token ids against llama.cpp's if
            LLAMA_TOKENIZE names its llama-tokenize
steps       ten LoRA steps against PEFT from one adapter, the same rows in the same order
memory      anonymous memory of one forward pass, time from start to the first training step
interop     each side reads the other's adapter folder and gives the same log-probs
parity      one epoch over the conversations in both: held-out loss, memory, speed

QUANTUNE names the binary, GPL3 the licence text (Debian's place by default). Works in runs/check_smollm2.
Prints a line per finding; exit 1 if one is out of bounds.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Threads that wait asleep: spinning ones make PEFT many times slower on a machine with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts/golden"))  # tiny_models
BASE = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
WORK = ROOT / "runs/check_smollm2"
HF = WORK / "hf"
STORED = ROOT / "tests/golden/model/smollm2.json"
QUANTUNE = os.environ.get("QUANTUNE", str(ROOT / "target/release/quantune"))
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
failed = []


def finding(what, ok, text):
    print(f"{'ok  ' if ok else 'FAIL'} {what}: {text}", flush=True)
    if not ok:
        failed.append(what)


def quantune(*args):
    """The JSON of one command of ours, in f32 unless given otherwise."""
    if "--compute" not in args and args[0] in ("eval", "generate", "sft"):
        args = (*args, "--compute", "f32")
    args = [QUANTUNE, *map(str, args), "--json"]
    done = subprocess.run(args, stdout=subprocess.PIPE, text=True, stderr=open(WORK / "stderr.txt", "w"))
    if done.returncode != 0:
        sys.exit(f"{' '.join(args)}: exit {done.returncode}\n{(WORK / 'stderr.txt').read_text()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def tokenizer():
    import transformers

    return transformers.AutoTokenizer.from_pretrained(HF)


def hf_model():
    import torch
    import transformers

    torch.set_num_threads(int(os.environ.get("THREADS", os.cpu_count())))
    return transformers.AutoModelForCausalLM.from_pretrained(HF, dtype=torch.float32, attn_implementation="eager")


def fresh(name):
    """A path in WORK where nothing is yet."""
    path = WORK / name
    shutil.rmtree(path, ignore_errors=True)
    return path


# ------------------------------------------------------- against stored numbers


def next_logprobs(prompt, tokens=1, adapter=None, compute="f32"):
    """Our output after `prompt` without a template: its JSON with the 10 most likely of each token."""
    adapter = ["--adapter", adapter] if adapter else []
    sampling = ["--raw", "--max-tokens", tokens, "--temperature", 0, "--logprobs", 10, "--compute", compute]
    return quantune("generate", "--base", BASE, *adapter, "--prompt", prompt, *sampling)


def compare_top10(ours, ids, logprobs, needed=9):
    """Largest difference over the 10; infinite if fewer than `needed` of the stored tokens are among ours. The
    tenth may trade places with an eleventh within the tolerance, so nine must be there."""
    found = {t["token_id"]: t["logprob"] for t in ours}
    shared = [abs(found[i] - p) for i, p in zip(ids, logprobs) if i in found]
    return max(shared) if len(shared) >= needed else float("inf")


def check_reference():
    stored = json.loads(STORED.read_text())
    for i, p in enumerate(stored["prompts"]):
        ours = next_logprobs(p["prompt"], 24)
        same = ours["token_ids"] == p["greedy24_ids"]
        finding(f"reference, greedy {i}", same, repr(ours["text"]) if same else f"{ours['text']!r}, needed {p['greedy24_text']!r}")
    worst, checked, skipped = worst_top10(stored, "f32")
    ok = worst < 1e-3 and checked >= 20
    finding("reference, top-10 log-probs", ok, f"largest difference {worst:.1e} at {checked} positions ({skipped} skipped)")


def check_modes():
    """The integer modes by their own bounds; that they differ shows that they ran."""
    stored, text = json.loads(STORED.read_text()), os.environ.get("GPL3", "/usr/share/common-licenses/GPL-3")
    found = {mode: worst_top10(stored, mode)[0] for mode in ("f32", "int16", "int8")}
    finding("modes, int16 top-10 log-probs", found["f32"] < found["int16"] < 2e-2, f"largest difference {found['int16']:.1e}, bound 2e-2")
    finding("modes, int8 top-10 log-probs", found["int16"] < found["int8"], f"largest difference {found['int8']:.1e}")
    for mode in found:
        ours = quantune("eval", "--base", BASE, "--text", text, "--n-ctx", 512, "--compute", mode)
        print(f"     modes, perplexity in {mode}: {ours['perplexity']:.4f}, kernels {ours['kernels']}")


def worst_top10(stored, compute):
    """The largest difference to the stored log-probs over all positions that text can ask for. int8 is too rough
    for the last of the ten to stay among them."""
    tok = tokenizer()
    worst, checked, skipped = 0.0, 0, 0
    for p in stored["prompts"]:
        for point in p["positions"]:
            prefix = p["input_ids"][: point["pos"] + 1]
            text = tok.decode(prefix)
            if tok(text, add_special_tokens=False).input_ids != prefix:
                skipped += 1  # this prefix's text has other tokens: it cannot be requested by text
                continue
            first = next_logprobs(text, compute=compute)["logprobs"][0]
            difference = compare_top10(first, point["top_ids"], point["top_logprobs"], 1 if compute == "int8" else 9)
            worst, checked = max(worst, difference), checked + 1
    return worst, checked, skipped


def check_perplexity():
    stored = json.loads(STORED.read_text())
    text = Path(os.environ.get("GPL3", "/usr/share/common-licenses/GPL-3"))
    found = hashlib.sha256(text.read_bytes()).hexdigest()
    assert found == stored["text"]["sha256"], f"{text}: sha256 is {found}, needed {stored['text']['sha256']}"
    ids = our_token_ids(text)
    finding("tokens, stored", len(ids) == stored["text"]["tokens"], f"{len(ids)} of GPL-3, needed {stored['text']['tokens']}")
    if witness := os.environ.get("LLAMA_TOKENIZE"):
        args = [witness, "-m", BASE, "-f", text, "--ids", "--no-bos", "--log-disable"]
        theirs = json.loads(subprocess.run(args, check=True, capture_output=True, text=True).stdout)
        finding("tokens, llama.cpp", ids == theirs, f"{sum(a == b for a, b in zip(ids, theirs))} of {len(theirs)} ids the same")
    else:
        print("     tokens, llama.cpp: not asked, LLAMA_TOKENIZE is not set")
    ours = quantune("eval", "--base", BASE, "--text", text, "--n-ctx", 512)["perplexity"]
    finding("perplexity", abs(ours - 18.30) < 0.01, f"{ours:.4f}, needed {stored['ppl_llamacpp_style']['ppl']:.4f} within 0.01")


def our_token_ids(text):
    return quantune("tokenizer", "encode", "--base", BASE, "--text", text)["token_ids"]


# ------------------------------------------------------------- prepared rows


def encode_chat(tok, messages):
    """A conversation as token ids and labels: learned are the assistant's words and their end-of-turn token."""
    text = tok.apply_chat_template(messages, tokenize=False)
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    ids = encoded.input_ids
    inside = [any(a <= start and end <= b for a, b in spans) for start, end in encoded.offset_mapping]
    return {"input_ids": ids, "labels": [i if learned else -100 for i, learned in zip(ids, inside)]}


def prepare_rows(part):
    """data/chatterbot.<part>.jsonl as rows of ids and labels; their path."""
    tok, path = tokenizer(), WORK / f"{part}.jsonl"
    with open(path, "w") as out:
        for line in open(ROOT / f"data/chatterbot.{part}.jsonl"):
            out.write(json.dumps(encode_chat(tok, json.loads(line)["messages"])) + "\n")
    return path


def read_rows(path):
    return [json.loads(line) for line in open(path)]


# ------------------------------------------------------------------ training


def adapter_tensors(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "adapter_model.safetensors")


def compare_adapters(what, ours, theirs, bound):
    a, b = adapter_tensors(ours), adapter_tensors(theirs)
    if a.keys() != b.keys():
        return finding(what, False, f"names differ: {sorted(a.keys() ^ b.keys())[:3]}")
    worst = max((((a[n] - b[n]).norm() / b[n].norm()).item(), n) for n in b)
    finding(what, worst[0] < bound, f"largest relative difference {worst[0]:.1e} ({worst[1]}) of {len(b)} tensors, bound {bound:.0e}")


def train_args(args):
    """The golden run's settings as our flags."""
    flags = {"adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay"}
    flags |= {"max_grad_norm", "max_steps", "per_device_train_batch_size"}
    return [x for k in sorted(flags & args.keys()) for x in ("--" + k.replace("_", "-"), args[k])]


def our_training(rows, initial, out, args):
    """Trains on prepared rows in their order; the adapter's folder, the lines of metrics.jsonl, the summary."""
    order = ["--no-shuffle", "--packing", "false", "--num-train-epochs", 1, "--gradient-accumulation-steps", 1, "--gradient-checkpointing", "false"]
    result = quantune("sft", "--base", BASE, "--adapter", initial, "--data", rows, "--out", out, *order, *train_args(args))
    return Path(result["adapter"]), read_rows(out / "metrics.jsonl"), result


def check_steps():
    import numpy as np
    import peft
    import torch

    from tiny_models import TRAIN_ARGS, train, write_adapter

    rows = read_rows(prepare_rows("train"))[::40][:40]
    (WORK / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    conf = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
    model = peft.get_peft_model(hf_model(), conf)
    rng = np.random.default_rng(21)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy((rng.standard_normal(p.shape) * 0.02).astype(np.float32)))
    write_adapter(fresh("steps-initial"), model, "SmolLM2-135M-Instruct")
    theirs = train(model.eval(), rows, TRAIN_ARGS)
    write_adapter(fresh("steps-peft"), model, "SmolLM2-135M-Instruct")

    adapter, ours, _ = our_training(WORK / "steps.jsonl", WORK / "steps-initial", fresh("steps-quantune"), TRAIN_ARGS)
    finding("steps, number", len(ours) == len(theirs), f"{len(ours)}")
    loss = max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs))
    norm = max(abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in zip(ours, theirs))
    path = f"{theirs[0]['loss']:.4f} -> {theirs[-1]['loss']:.4f}"
    finding("steps, loss", loss < 2e-3, f"largest difference {loss:.1e} (PEFT's {path}), bound 2e-03")
    finding("steps, grad_norm", norm < 1e-3, f"largest relative difference {norm:.1e}, bound 1e-03")
    compare_adapters("steps, adapter", adapter, WORK / "steps-peft", 1e-3)


def check_interop():
    """Greedy decoding with an adapter: PEFT scores the tokens that ours generates."""
    import peft
    import torch

    tok, prompt = tokenizer(), "The capital of France is"
    for name in ("steps-peft", "steps-quantune"):
        folder = WORK / name
        if name == "steps-quantune":
            folder = next(p.parent for p in sorted(folder.rglob("adapter_config.json"), key=lambda p: len(p.parts)))
        ours = next_logprobs(prompt, 16, folder)
        model = peft.PeftModel.from_pretrained(hf_model(), folder).eval()
        ids = tok(prompt, add_special_tokens=False).input_ids
        with torch.inference_mode():
            both = torch.tensor([ids + ours["token_ids"]])
            theirs = torch.log_softmax(model(both).logits[0].double(), -1)[len(ids) - 1 : -1]
            bare = torch.log_softmax(model.unload()(both).logits[0].double(), -1)[len(ids) - 1 : -1]
        top = [row.topk(10) for row in theirs]
        worst = max(compare_top10(o, t.indices.tolist(), t.values.tolist()) for o, t in zip(ours["logprobs"], top))
        moved = (theirs - bare).abs().max().item()
        ok = worst < 1e-3 and moved > 0.1
        finding(f"interop, {name}", ok, f"largest difference {worst:.1e} over 16 tokens; the adapter moves them by {moved:.1f}")


# -------------------------------------------------------------- parity epoch

EPOCH = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8,
}


def batch_loss(model, rows):
    """Summed loss of a padded batch, and its counted tokens: as anyone runs PEFT."""
    import torch

    width = max(len(row["input_ids"]) for row in rows)

    def padded(key, fill):
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = padded("labels", -100)[:, 1:]
    logits = model(input_ids=padded("input_ids", 0), attention_mask=mask).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


def peft_epoch(train_rows, heldout_rows, initial, final):
    """One epoch in a separate process, to measure its memory; prints JSON."""
    import peft
    import torch
    import transformers

    from tiny_models import write_adapter

    train, heldout = read_rows(train_rows), read_rows(heldout_rows)
    model = hf_model()
    model.set_attn_implementation("sdpa")
    model = peft.PeftModel.from_pretrained(model, initial, is_trainable=True).eval()
    n = EPOCH["per_device_train_batch_size"]

    @torch.no_grad()
    def heldout_loss():
        sums = [batch_loss(model, heldout[i : i + n]) for i in range(0, len(heldout), n)]
        return sum(s.item() for s, _ in sums) / sum(c for _, c in sums)

    before = heldout_loss()
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=EPOCH["learning_rate"], weight_decay=EPOCH["weight_decay"])
    total = -(-len(train) // n)
    schedule = transformers.get_scheduler(EPOCH["lr_scheduler_type"], opt, warmup_steps(total), total)
    start, tokens, losses = time.perf_counter(), 0, []
    for i in range(0, len(train), n):
        loss, count = batch_loss(model, train[i : i + n])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(params, EPOCH["max_grad_norm"])
        opt.step()
        schedule.step()
        opt.zero_grad()
        tokens += sum(len(row["input_ids"]) for row in train[i : i + n])
        losses.append(loss.item() / count)
        if i // n % 20 == 0:
            print(f"step {i // n + 1}/{total} loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    write_adapter(Path(final), model, "SmolLM2-135M-Instruct")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result = {"before": before, "after": heldout_loss(), "tokens_per_second": tokens / seconds, "peak_rss_bytes": rss, "losses": losses}
    print(json.dumps(result))


def warmup_steps(total):
    return -(-total * 3 // 100)


def check_parity():
    import peft
    import torch

    from tiny_models import write_adapter

    train, heldout = prepare_rows("train"), prepare_rows("heldout")
    ours_before = quantune("eval", "--base", BASE, "--data", heldout)
    chats = quantune("eval", "--base", BASE, "--data", ROOT / "data/chatterbot.heldout.jsonl")
    same = abs(chats["loss"] - ours_before["loss"]) < 1e-5 and chats["tokens"] == ours_before["tokens"]
    masks = f"{chats['tokens']} counted tokens at {chats['loss']:.5f} from chats, {ours_before['tokens']} at {ours_before['loss']:.5f} from ids"
    finding("parity, template and masks", same, masks)

    torch.manual_seed(0)
    conf = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
    write_adapter(fresh("parity-initial"), peft.get_peft_model(hf_model(), conf), "SmolLM2-135M-Instruct")
    total = -(-len(read_rows(train)) // EPOCH["per_device_train_batch_size"])
    args = {**EPOCH, "warmup_steps": warmup_steps(total)}
    adapter, steps, result = our_training(train, WORK / "parity-initial", fresh("parity-quantune"), args)
    ours_after = quantune("eval", "--base", BASE, "--adapter", adapter, "--data", heldout)

    cmd = [sys.executable, __file__, "peft-epoch", train, heldout, WORK / "parity-initial", fresh("parity-peft")]
    theirs = json.loads(subprocess.run(cmd, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
    for what, a, b in (("before", ours_before["loss"], theirs["before"]), ("after", ours_after["loss"], theirs["after"])):
        finding(f"parity, held-out loss {what}", abs(a / b - 1) < 0.01, f"{a:.4f}, PEFT {b:.4f} ({a / b - 1:+.3%}), bound 1 %")
    learned = ours_after["loss"] < ours_before["loss"]
    finding("parity, learned", learned, f"held-out loss {ours_before['loss']:.4f} -> {ours_after['loss']:.4f} in {len(steps)} steps")
    gap = max(abs(a["loss"] - b) for a, b in zip(steps, theirs["losses"]))
    print(f"     parity, training loss: largest difference in a step {gap:.1e}")
    for key, unit, scale in (("peak_rss_bytes", "MB peak", 1e6), ("tokens_per_second", "tokens/s", 1)):
        print(f"     parity, {unit}: {result[key] / scale:.0f}, PEFT {theirs[key] / scale:.0f}")


def check_memory():
    """Anonymous memory of loading and one forward pass, and the time from start to the first training step."""
    prompt = "The quick brown fox jumps over the lazy dog. " * 6
    args = [QUANTUNE, "generate", "--base", BASE, "--raw", "--prompt", prompt, "--max-tokens", "1", "--temperature", "0"]
    child, most = subprocess.Popen(list(map(str, args)), stdout=subprocess.DEVNULL), 0
    while child.poll() is None:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except OSError:
            break
        most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.001)
    child.wait()
    finding("memory, RssAnon", child.returncode == 0 and 0 < most < 80_000, f"{most / 1000:.1f} MB at most, bound 80 MB")

    out = fresh("memory-run")
    args = ["sft", "--base", BASE, "--data", ROOT / "data/chatterbot.train.jsonl", "--out", out, "--max-steps", 1]
    start, began = time.perf_counter(), None
    child = subprocess.Popen([QUANTUNE, *map(str, args)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for line in child.stderr:
        if line.startswith("training "):
            began = time.perf_counter() - start
    finding("memory, start", child.wait() == 0 and began is not None, f"{began:.2f} s from start to the first training step")


def main():
    if sys.argv[1:2] == ["peft-epoch"]:
        return peft_epoch(*sys.argv[2:])
    checks = {
        "reference": check_reference,
        "modes": check_modes,
        "perplexity": check_perplexity,
        "memory": check_memory,
        "steps": check_steps,
        "interop": check_interop,
        "parity": check_parity,
    }
    if unknown := set(sys.argv[1:]) - checks.keys():
        sys.exit(f"no check {', '.join(unknown)}; there are {', '.join(checks)}")
    WORK.mkdir(parents=True, exist_ok=True)
    if not (HF / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, ROOT / "scripts/check/dequantize_gguf.py", BASE, HF], check=True)
    for name in sys.argv[1:] or checks:
        checks[name]()
    if failed:
        sys.exit(f"out of bounds: {', '.join(failed)}")


if __name__ == "__main__":
    main()
