#!/usr/bin/env python3
"""Writes tests/golden/export: the types that llama-quantize gives each tensor, and the GGUFs that llama.cpp's
converter makes of the golden folders.

    python3 scripts/golden/export.py LLAMA_CPP

LLAMA_CPP is a checkout of llama.cpp with llama-quantize built in build/bin.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LLAMA_CPP = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]

import gguf
import numpy as np

OUT = ROOT / "tests/golden/export"
FILE_TYPES = (
    "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K".split()
)
# What decides: layers, heads, whether the head is tied, widths of 256, of 32 and of neither.
MODELS = {
    "llama-256-tied": dict(arch="llama", layers=17, heads=8, kv=2, hidden=256, inner=512, tied=True),
    "llama-256-untied": dict(arch="llama", layers=9, heads=4, kv=4, hidden=256, inner=96, tied=False),
    "qwen2-288": dict(arch="qwen2", layers=8, heads=6, kv=3, hidden=288, inner=768, tied=True),
    "llama-80": dict(arch="llama", layers=3, heads=5, kv=1, hidden=80, inner=256, tied=False),
    "llama-80-layers": dict(arch="llama", layers=80, heads=4, kv=2, hidden=256, inner=256, tied=False),
    "phi3-256": dict(arch="phi3", layers=9, heads=4, kv=2, hidden=256, inner=512, tied=False),
    "qwen2-80-layers": dict(arch="qwen2", layers=80, heads=2, kv=2, hidden=256, inner=256, tied=False),
}
VOCAB = 64
# Flags in addition to the type, on the first two models.
FLAGS = [
    ["--pure"],
    ["--output-tensor-type", "q5_k"],
    ["--token-embedding-type", "q8_0"],
    ["--token-embedding-type", "q4_0", "--output-tensor-type", "f16", "--pure"],
    ["--tensor-type", "attn_v=q8_0", "--tensor-type", r"blk\.[0-3]\.ffn_down=q2_k", "--tensor-type", "attn=q4_0"],
    ["--tensor-type", "ATTN_K=Q6_K", "--pure"],
]


def shapes(m):
    head = m["hidden"] // m["heads"]
    kv = m["kv"] * head
    layer = {
        "attn_q": (m["hidden"], m["hidden"]),
        "attn_k": (kv, m["hidden"]),
        "attn_v": (kv, m["hidden"]),
        "attn_output": (m["hidden"], m["hidden"]),
        "ffn_gate": (m["inner"], m["hidden"]),
        "ffn_up": (m["inner"], m["hidden"]),
        "ffn_down": (m["hidden"], m["inner"]),
    }
    if m["arch"] == "phi3":
        fused = {"attn_qkv": (m["hidden"] + 2 * kv, m["hidden"]), "ffn_up": (2 * m["inner"], m["hidden"])}
        layer = {name: layer[name] for name in ("attn_output", "ffn_down")} | fused
    found = {"token_embd.weight": (VOCAB, m["hidden"])}
    for i in range(m["layers"]):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not m["tied"]:
        found["output.weight"] = (VOCAB, m["hidden"])
    return found


def write_model(path, m):
    w = gguf.GGUFWriter(path, m["arch"])
    w.add_block_count(m["layers"])
    w.add_context_length(64)
    w.add_embedding_length(m["hidden"])
    w.add_feed_forward_length(m["inner"])
    w.add_head_count(m["heads"])
    w.add_head_count_kv(m["kv"])
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(VOCAB)
    w.add_tensor("output_norm.weight", np.ones(m["hidden"], np.float32))
    for i in range(m["layers"]):
        for norm in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{norm}.weight", np.ones(m["hidden"], np.float32))
    for name, shape in shapes(m).items():
        w.add_tensor(name, np.zeros(shape, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_imatrix(path, m):
    w = gguf.GGUFWriter(path, "")
    w.add_type("imatrix")
    w.add_array("imatrix.datasets", ["none"])
    w.add_uint32("imatrix.chunk_count", 1)
    w.add_uint32("imatrix.chunk_size", 512)
    for name, shape in shapes(m).items():
        w.add_tensor(name + ".in_sum2", np.ones((1, shape[1]), np.float32))
        w.add_tensor(name + ".counts", np.ones((1, 1), np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def types_by_llama_quantize(model, file_type, flags):
    """Tensor -> type, of a run that writes nothing."""
    command = [str(LLAMA_CPP / "build/bin/llama-quantize"), "--dry-run", *flags, str(model), file_type]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for line in (done.stdout + done.stderr).splitlines():
        if line.lstrip().startswith("[") and "type = " in line and "/" in line:
            name = line.split("]", 1)[1].split("-")[0].strip()
            of = line.split("type =")[1].split(",")[0].strip()
            if "->" in line:
                of = line.rsplit("(", 1)[1].rstrip(")\n ")
            found[name] = of.upper()
    return found


def short(model, found):
    """Kind of matrix -> type, or one type a layer where they differ."""
    kinds = {}
    for name in shapes(model):
        parts = name.split(".")
        kinds.setdefault(parts[2] if parts[0] == "blk" else parts[0], []).append(found[name])
    return {kind: types[0] if len(set(types)) == 1 else " ".join(types) for kind, types in kinds.items()}


def make_types():
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        path, imatrix = Path(folder) / "model.gguf", Path(folder) / "imatrix.gguf"
        for name, model in MODELS.items():
            write_model(path, model)
            write_imatrix(imatrix, model)
            runs = [(t, []) for t in FILE_TYPES] + [(t, ["--imatrix", str(imatrix)]) for t in ("Q4_0", "Q5_0", "Q4_K_M")]
            if name in list(MODELS)[:2]:
                runs += [(t, flags) for flags in FLAGS for t in ("Q4_K_M", "Q3_K_S", "F16")]
            for file_type, flags in runs:
                types = short(model, types_by_llama_quantize(path, file_type, flags))
                flags = ["--imatrix" if f == "--imatrix" else f for f in flags if f != str(imatrix)]
                cases.append({"model": name, "type": file_type, "flags": flags, "types": types})
                print(name, file_type, flags)
    text = ",\n".join(json.dumps(case) for case in cases)
    models = json.dumps(MODELS)
    (OUT / "types.json").write_text(f'{{"models": {models},\n"cases": [\n{text}\n]}}\n')


def convert(name, pre):
    """The converter's GGUF of a golden folder: its keys, and shape and digest of each tensor."""
    from conversion import ModelBase, ModelType, get_model_class  # llama.cpp's
    from conversion.base import TextModel, get_model_architecture

    # The converter knows tokenizers by a digest; these are trained for the goldens.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    folder = ROOT / "tests/golden/model" / name
    with tempfile.TemporaryDirectory() as out:
        path = Path(out) / "model.gguf"
        hparams = ModelBase.load_hparams(folder, False)
        model = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
        model(folder, gguf.LlamaFileType.ALL_F32, path).write()
        reader = gguf.GGUFReader(path)
        keys = {k: f.contents() for k, f in reader.fields.items() if not k.startswith(("GGUF.", "general."))}
        tensors = {}
        for t in reader.tensors:
            assert t.tensor_type == gguf.GGMLQuantizationType.F32, t.name
            shape = [int(d) for d in reversed(t.shape)]
            digest = hashlib.sha256(np.ascontiguousarray(t.data).tobytes()).hexdigest()
            # Computed in float32 by the converter: its last bit is its own.
            tensors[t.name] = [shape, t.data.tolist() if t.name == "rope_freqs.weight" else digest]
    # Long lists by their digest.
    for key in ("tokens", "token_type", "merges"):
        items = keys["tokenizer.ggml." + key]
        text = json.dumps(items, ensure_ascii=False, separators=(",", ":"))
        keys["tokenizer.ggml." + key] = hashlib.sha256(text.encode()).hexdigest()
    return {"keys": keys, "tensors": tensors}


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    converted = {n: convert(n, p) for n, p in [("llama-tiny", "smollm"), ("llama-untied", "gpt-2"), ("qwen2-tiny", "gpt-2")]}
    (OUT / "converted.json").write_text(json.dumps(converted, indent=1, ensure_ascii=False) + "\n")
    make_types()
