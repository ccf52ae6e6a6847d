#!/usr/bin/env python3
"""Compares what merge, quantize and export write with llama.cpp and transformers. Run it by scripts/check/export.sh.

    python3 scripts/check/export.py LLAMA_CPP [gguf] [folder] [lora] [errors] [report]

gguf    SmolLM2 and a tiny Qwen2, with adapters merged in, as GGUFs of several types: llama.cpp's log-probs
folder  the same as Hugging Face folders: transformers' log-probs
lora    adapters as GGUF LoRAs, rsLoRA and alpha_pattern among them: llama.cpp's log-probs
errors  the error of every type on real weights beside llama-quantize's, with and without an importance matrix
report  merge --report and quantize --report on a text

QUANTUNE names the binary, BASE the model, TEXT the text of the report. Works in runs/check_export. Prints a line per
finding; exit 1 if one is out of bounds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
import gguf
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
QUANTUNE = os.environ.get("QUANTUNE", str(ROOT / "target/release/quantune"))
BASE = Path(os.environ.get("BASE", ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"))
TEXT = Path(os.environ.get("TEXT", "/usr/share/common-licenses/GPL-3"))
QWEN = ROOT / "tests/golden/model/qwen2-tiny"
WORK = ROOT / "runs/check_export"
PROMPTS = ["The capital of France is", "def fibonacci(n):\n    ", "Once upon a time there was a"]
failed = []


def finding(what, ok, text):
    print(f"{'ok  ' if ok else 'FAIL'} {what}: {text}", flush=True)
    if not ok:
        failed.append(what)


def quantune(*args):
    """The JSON of one command of ours."""
    done = subprocess.run([QUANTUNE, *map(str, args), "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, args))}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(base, prompt, adapters=(), k=10):
    """Our most likely next tokens: id -> log-prob."""
    flags = [f for a in adapters for f in ("--adapter", a)]
    sampling = ["--raw", "--max-tokens", 1, "--temperature", 0, "--logprobs", k, "--compute", "f32"]
    out = quantune("generate", "--base", base, *flags, "--prompt", prompt, *sampling)
    return {t["token_id"]: t["logprob"] for t in out["logprobs"][0]}


def llama_cpp(model, prompt, lora=None):
    """llama.cpp's log-probs of all next tokens."""
    import llama_cpp

    llm = llama_cpp.Llama(str(model), n_ctx=128, n_threads=2, logits_all=True, verbose=False, lora_path=lora and str(lora))
    ids = llm.tokenize(prompt.encode(), add_bos=False, special=False)
    llm.eval(ids)
    logits = np.array(llm.scores[len(ids) - 1], np.float64)
    del llm
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def transformers_logprobs(folder, prompt):
    import tokenizers
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # The file's own words: AutoTokenizer cuts those of a Qwen2 as Qwen2's own tokenizer does, whatever is in it.
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(prompt, add_special_tokens=False).ids
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].double(), -1).numpy()


def worst(found, theirs):
    return max(abs(theirs[i] - p) for i, p in found.items())


def make_adapter(name, base_hf, **kw):
    """A random adapter that changes the model, saved by PEFT."""
    import peft
    import torch
    import transformers

    folder = WORK / name
    if folder.exists():
        return folder
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_pretrained(base_hf, dtype=torch.float32)
    config = peft.LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear", **kw)
    model = peft.get_peft_model(model, config)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(folder)
    return folder


def bases():
    """name -> (base, its folder for PEFT, adapters)"""
    hf = WORK / "smollm2-hf"
    if not hf.exists():
        quantune("quantize", "--base", BASE, "--type", "F32", "--out", WORK / "smollm2-f32.gguf")
        # A merge without effect: a folder of the base alone.
        import_folder(hf)
    pattern = {"alpha_pattern": {"q_proj": 32, "layers.1.mlp.down_proj": 4}, "rank_pattern": {"v_proj": 4}}
    return {
        "SmolLM2": (BASE, hf, [make_adapter("smollm2-lora", hf), make_adapter("smollm2-rslora", hf, use_rslora=True, **pattern)]),
        "Qwen2": (QWEN, QWEN, [make_adapter("qwen2-lora", QWEN), make_adapter("qwen2-rslora", QWEN, use_rslora=True, **pattern)]),
    }


def import_folder(out):
    """The base as a Hugging Face folder: an adapter of zeros merged in."""
    from safetensors.numpy import save_file

    zero = WORK / "zero"
    zero.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(BASE)
    shape = next(t.shape for t in reader.tensors if t.name == "blk.0.attn_q.weight")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": np.zeros((1, int(shape[0])), np.float32), f"{name}B.weight": np.zeros((int(shape[1]), 1), np.float32)}
    save_file(tensors, zero / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["model.layers.0.self_attn.q_proj"], "task_type": "CAUSAL_LM"}
    (zero / "adapter_config.json").write_text(json.dumps(config))
    quantune("merge", "--base", BASE, "--adapter", zero, "--type", "F32", "--out", out)


def check_gguf():
    for name, (base, _, adapters) in bases().items():
        for adapter in adapters:
            for of, bound in [("F32", 2e-2), ("F16", 2e-2), ("Q8_0", 1.0)]:
                out = WORK / "merged.gguf"
                quantune("merge", "--base", base, "--adapter", adapter, "--type", of, "--out", out)
                beside = [ours(base, p, [adapter]) for p in PROMPTS]
                merged = [ours(out, p) for p in PROMPTS]
                theirs = [llama_cpp(out, p) for p in PROMPTS]
                off = max(map(worst, beside, theirs))
                same_file = max(map(worst, merged, theirs))
                text = f"log-probs off by {off:.1e} from the adapter beside the base, {same_file:.1e} from ours of the file"
                same_bound = 2e-2
                if of == "Q8_0":
                    # llama.cpp rounds activations to 8 bits there; the same weights in F32 show what is in the file.
                    same_bound, exact = 0.5, WORK / "merged-exact.gguf"
                    quantune("quantize", "--base", out, "--type", "F32", "--out", exact)
                    same_weights = max(worst(m, llama_cpp(exact, p)) for m, p in zip(merged, PROMPTS))
                    text += f", {same_weights:.1e} with the file's weights in F32"
                    finding(f"{name} {adapter.name} {of}, its weights in llama.cpp", same_weights < 2e-2, text)
                finding(f"{name} {adapter.name} {of} in llama.cpp", off < bound and same_file < same_bound, text)


def check_folder():
    for name, (base, _, adapters) in bases().items():
        for adapter in adapters:
            for of, bound in [("F32", 2e-3), ("F16", 2e-2), ("BF16", 0.3)]:
                out = WORK / "merged"
                quantune("merge", "--base", base, "--adapter", adapter, "--type", of, "--out", out)
                off = max(worst(ours(base, p, [adapter]), transformers_logprobs(out, p)) for p in PROMPTS)
                finding(f"{name} {adapter.name} {of} in transformers", off < bound, f"log-probs off by {off:.1e}")


def check_lora():
    for name, (base, _, adapters) in bases().items():
        plain = WORK / "plain.gguf"
        quantune("quantize", "--base", base, "--type", "F32", "--out", plain)
        for adapter in adapters:
            out = WORK / "lora.gguf"
            quantune("export", "--base", base, "--adapter", adapter, "--out", out)
            beside = [ours(base, p, [adapter]) for p in PROMPTS]
            off = max(worst(b, llama_cpp(plain, p, out)) for b, p in zip(beside, PROMPTS))
            bare = max(worst(b, llama_cpp(plain, p)) for b, p in zip(beside, PROMPTS))
            text = f"log-probs off by {off:.1e}; without it by {bare:.1e}"
            finding(f"{name} {adapter.name} as a GGUF LoRA in llama.cpp", off < 2e-2 < bare, text)
            again = max(worst_of(b, ours(base, p, [out])) for b, p in zip(beside, PROMPTS))
            finding(f"{name} {adapter.name} as a GGUF LoRA here", again < 1e-3, f"log-probs off by {again:.1e}")


def worst_of(one, other):
    return max(abs(other[i] - p) for i, p in one.items() if i in other)


def reshaped(out):
    """A GGUF of SmolLM2's weights cut into rows of 512 and 1024: K-quants need multiples of 256."""
    reader = gguf.GGUFReader(BASE)
    values = np.concatenate([gguf.quants.dequantize(t.data, t.tensor_type).ravel() for t in reader.tensors
                             if t.name.startswith("blk.") and t.name.endswith(("_up.weight", "_q.weight", "_output.weight", "_down.weight"))])
    # What Q4_1 left is a lattice; a little noise makes it a matrix again.
    values = values * (1 + 0.05 * np.random.default_rng(1).standard_normal(values.size).astype(np.float32))
    w = gguf.GGUFWriter(out, "llama")
    hidden, inner, layers = 512, 1024, 8
    w.add_block_count(layers)
    w.add_context_length(64)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(inner)
    w.add_head_count(8)
    w.add_head_count_kv(8)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(512)
    w.add_rope_freq_base(1e4)
    for key in ("model", "pre"):
        w.add_string(f"tokenizer.ggml.{key}", bytes(reader.fields[f"tokenizer.ggml.{key}"].parts[-1]).decode())
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()[:512]
    w.add_token_list(tokens)
    w.add_token_types([1] * 512)
    w.add_token_merges([])
    w.add_eos_token_id(2)
    at = 0

    def take(rows, cols):
        nonlocal at
        part = values[at : at + rows * cols].reshape(rows, cols)
        at += rows * cols
        return part.astype(np.float32)

    w.add_tensor("token_embd.weight", take(512, hidden))
    w.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(hidden, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            w.add_tensor(f"blk.{i}.{part}.weight", take(hidden, hidden))
        w.add_tensor(f"blk.{i}.ffn_gate.weight", take(inner, hidden))
        w.add_tensor(f"blk.{i}.ffn_up.weight", take(inner, hidden))
        w.add_tensor(f"blk.{i}.ffn_down.weight", take(hidden, inner))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_imatrix(path, model):
    """Importance with a tail like that of activations."""
    rng = np.random.default_rng(3)
    w = gguf.GGUFWriter(path, "")
    w.add_type("imatrix")
    w.add_array("imatrix.datasets", ["none"])
    w.add_uint32("imatrix.chunk_count", 1)
    w.add_uint32("imatrix.chunk_size", 512)
    found = {}
    for t in gguf.GGUFReader(model).tensors:
        if t.name.startswith("blk.") and len(t.shape) == 2:
            found[t.name] = np.exp(1.5 * rng.standard_normal(int(t.shape[0]))).astype(np.float32)
            w.add_tensor(t.name + ".in_sum2", found[t.name][None])
            w.add_tensor(t.name + ".counts", np.ones((1, 1), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return found


def tensors_of(path):
    return {t.name: (gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64), t.tensor_type.name)
            for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2}


def check_errors():
    quantize = str(LLAMA_CPP / "build/bin/llama-quantize")
    for what, model in [("SmolLM2", WORK / "smollm2-f32.gguf"), ("rows of 512", WORK / "reshaped.gguf")]:
        if what == "SmolLM2":
            bases()
        else:
            reshaped(model)
        exact = tensors_of(model)
        importance = write_imatrix(WORK / "imatrix.gguf", model)
        for of in "Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_S Q4_K_S Q5_K_S Q6_K".split():
            for weighted in (False, True):
                flags = ["--imatrix", str(WORK / "imatrix.gguf")] if weighted else []
                mine, theirs = WORK / "ours.gguf", WORK / "theirs.gguf"
                quantune("quantize", "--base", model, "--type", of, "--pure", "--out", mine, *flags)
                done = subprocess.run([quantize, "--pure", *flags, str(model), str(theirs), of], capture_output=True, text=True)
                assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
                a, b = tensors_of(mine), tensors_of(theirs)
                ratios, sums = [], np.zeros(2)
                for name, (w, _) in exact.items():
                    assert a[name][1] == b[name][1], f"{name}: {a[name][1]} here, {b[name][1]} there"
                    by = importance.get(name) if weighted else None
                    by = np.ones(w.shape[1]) if by is None else by.astype(np.float64)
                    errors = [float((by * (w - q[name][0]) ** 2).sum()) for q in (a, b)]
                    norm = float((by * w**2).sum())
                    sums += np.array(errors) / norm
                    ratios.append((errors[0] / errors[1] if errors[1] else float(errors[0] == 0), name))
                highest, name = max(ratios)
                rmse = np.sqrt(sums / len(exact))
                text = f"relative error {rmse[0]:.5f}, llama.cpp's {rmse[1]:.5f}; squared, the worst tensor is {highest:.3f} of theirs ({name})"
                finding(f"{what} {of}{' imatrix' if weighted else ''}", highest <= 1.0, text)


def check_report():
    for name, command in {
        "merge Q8_0": ["merge", "--adapter", WORK / "smollm2-lora", "--type", "Q8_0"],
        "merge Q4_K_M": ["merge", "--adapter", WORK / "smollm2-lora", "--type", "Q4_K_M", "--imatrix-data", TEXT],
        "quantize Q3_K_M": ["quantize", "--type", "Q3_K_M", "--imatrix-data", TEXT],
    }.items():
        bases()
        out = quantune(*command, "--base", BASE, "--out", WORK / "report.gguf", "--report", TEXT)
        for line in out["report"]:
            print(f"     {name}: {line['name']:34} {line['bytes'] / 1e6:7.1f} MB  perplexity {line['perplexity']:8.4f}  "
                  f"KL {line['mean_kl']:.5f}  same top {line['same_top']:.4f}")
        if "--imatrix-data" in command:
            plain, weighted = out["report"][-2], out["report"][-1]
            finding(f"{name}, importance", weighted["mean_kl"] < plain["mean_kl"], f"{weighted['mean_kl']:.5f} after {plain['mean_kl']:.5f}")


if __name__ == "__main__":
    LLAMA_CPP = Path(sys.argv[1]).resolve()
    WORK.mkdir(parents=True, exist_ok=True)
    checks = {"gguf": check_gguf, "folder": check_folder, "lora": check_lora, "errors": check_errors, "report": check_report}
    for check in sys.argv[2:] or checks:
        checks[check]()
    sys.exit(f"{len(failed)} out of bounds: {', '.join(failed)}" if failed else 0)
