#!/usr/bin/env python3
"""Writes tests/golden/model_families: a tiny random model of each family as a Hugging Face folder and as the
GGUF that llama.cpp's converter makes of it, what transformers says about it, and the gradients of a PEFT
adapter on it.

    python3 scripts/golden/model_families.py LLAMA_CPP

LLAMA_CPP is a checkout of llama.cpp. As in scripts/golden/tiny_models.py, models are sharp, and each property that a
family has is shown to matter: without it, log-probs move by far more than the tests allow.
"""

import copy
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

LLAMA_CPP = Path(sys.argv[1]).resolve()
sys.path[:0] = [str(LLAMA_CPP), str(LLAMA_CPP / "gguf-py")]

import gguf
import numpy as np
import peft
import safetensors.torch
import torch
import transformers

from tiny_models import clear, write_adapter, write_json

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "tests/golden/model_families"
VOCAB = 64
BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def rope(theta, kind="default", **kw):
    return {"rope_type": kind, "rope_theta": theta, **kw}


YARN = rope(10000.0, "yarn", factor=4.0, original_max_position_embeddings=16)
LONGROPE = rope(
    10000.0,
    "longrope",
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.3, 1.5],
    long_factor=[1.1, 2.5, 4.0],
)
GEMMA_SCALED = {
    "full_attention": rope(1000000.0, "linear", factor=8.0),
    "sliding_attention": rope(10000.0),
}
# name -> config class, its settings, settings without which the model must be another, how many positions
# of a row a GGUF agrees on (its keys do not say all)
MODELS = {
    "llama-yarn": ("Llama", dict(rope_parameters=YARN), [dict(rope_parameters=rope(10000.0))], None),
    "mistral": ("Mistral", dict(sliding_window=12, rope_parameters=rope(10000.0)), [dict(sliding_window=11)], 12),
    "qwen3": ("Qwen3", dict(head_dim=16, rope_parameters=rope(10000.0)), [dict(rope_parameters=rope(10200.0))], None),
    "gemma2": (
        "Gemma2",
        dict(
            num_hidden_layers=3,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=9,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=6.0,
            rope_parameters=rope(10000.0),
        ),
        [
            dict(query_pre_attn_scalar=17),
            dict(sliding_window=10),
            dict(attn_logit_softcapping=3.1),
            dict(final_logit_softcapping=6.1),
            dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        ],
        None,
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            num_hidden_layers=7,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=9,
            rope_parameters=GEMMA_SCALED,
        ),
        [
            dict(query_pre_attn_scalar=17),
            dict(sliding_window=10),
            dict(layer_types=["sliding_attention"] * 7),
            dict(rope_parameters={**GEMMA_SCALED, "full_attention": rope(1000000.0)}),
            dict(rope_parameters={**GEMMA_SCALED, "sliding_attention": rope(10500.0)}),
        ],
        None,
    ),
    "phi3": (
        "Phi3",
        dict(sliding_window=20, tie_word_embeddings=False, rope_parameters=rope(10000.0)),
        [dict(sliding_window=21)],
        None,
    ),
    "smollm3": (
        "SmolLM3",
        dict(num_hidden_layers=4, rope_parameters=rope(10000.0)),
        [dict(no_rope_layers=[1, 1, 1, 1])],
        None,
    ),
    "olmo2": (
        "Olmo2",
        dict(tie_word_embeddings=False, rope_parameters=rope(10000.0)),
        [dict(rms_norm_eps=1e-3)],
        None,
    ),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=6.0,
            residual_multiplier=0.7,
            attention_multiplier=0.6,
            logits_scaling=1.6,
            rope_parameters=rope(10000.0),
        ),
        [
            dict(embedding_multiplier=6.2),
            dict(residual_multiplier=0.72),
            dict(attention_multiplier=0.62),
            dict(logits_scaling=1.65),
        ],
        None,
    ),
}
# The same weights under other settings, which a GGUF cannot say but for longrope: name -> model, settings.
VARIANTS = {
    "llama-linear": ("llama-yarn", dict(rope_parameters=rope(10000.0, "linear", factor=3.0))),
    "llama-yarn-all": (
        "llama-yarn",
        dict(rope_parameters=dict(YARN, beta_fast=9.0, beta_slow=2.0, attention_factor=1.3, truncate=False)),
    ),
    "qwen3-window": ("qwen3", dict(use_sliding_window=True, sliding_window=10, max_window_layers=1, layer_types=None)),
    "gemma2-scalar": ("gemma2", dict(query_pre_attn_scalar=24, layer_types=["full_attention"] + ["sliding_attention"] * 2)),
    "smollm3-window": (
        "smollm3",
        dict(use_sliding_window=True, sliding_window=10, no_rope_layers=[0, 1, 1, 0], layer_types=None),
    ),
    "phi3-long": (
        "phi3",
        dict(sliding_window=None, original_max_position_embeddings=24, rope_parameters=LONGROPE),
    ),
}
# Further adapters: name -> model, their config.
ADAPTERS = {
    "phi3-dora": ("phi3", dict(use_dora=True, target_modules=["qkv_proj", "gate_up_proj"])),
    "gemma2-head": ("gemma2", dict(target_modules=["lm_head"])),
    "gemma2-tokens": ("gemma2", dict(target_modules=["v_proj"], trainable_token_indices=[3, 17, 41])),
}


def make_config(family, settings):
    return getattr(transformers, family + "Config")(**{**BASE, **copy.deepcopy(settings)})


def random_weights(cfg, seed):
    """Name -> float16 array. Norms are multiples of 1/64, so that what a converter adds to them is exact."""
    rng = np.random.default_rng(seed)
    less = 1.0 if cfg.model_type.startswith("gemma") else 0.0
    weights = {}
    for name, like in make_model(cfg).state_dict().items():
        rows, cols = like.shape[0], like.shape[-1]
        if name == "lm_head.weight" and cfg.tie_word_embeddings:
            continue
        if like.ndim == 1:
            low, high = (2.0, 5.0) if name == "model.norm.weight" else (0.5, 1.5)
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                low, high = 0.8, 1.8
            value = np.round(rng.uniform(low, high, rows) * 64) / 64 - less
        elif "embed_tokens" in name or "lm_head" in name:
            value = rng.standard_normal(like.shape) * 0.8 / np.sqrt(cols)
        else:
            gain = 1.5 if name.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")) else 1.0
            value = rng.standard_normal(like.shape) * gain / np.sqrt(cols)
        weights[name] = torch.from_numpy(value.astype(np.float16))
    return weights


def make_model(cfg, weights=None, dtype=torch.float32):
    cfg = copy.deepcopy(cfg)
    cfg._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(cfg)
    if weights is not None:
        missing, unexpected = model.load_state_dict({n: w.to(dtype) for n, w in weights.items()}, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
    return model.to(dtype).eval()


def log_probs(model, ids):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).float()


def convert(folder, path, **split):
    """The converter's GGUF in F16, without a tokenizer."""
    from conversion import ModelBase, ModelType, get_model_class  # llama.cpp's
    from conversion.base import get_model_architecture

    hparams = ModelBase.load_hparams(folder, False)
    model = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
    model.set_vocab = lambda self: None
    model(folder, gguf.LlamaFileType.MOSTLY_F16, path, **split).write()


def adapted(cfg, weights, seed, dtype, **settings):
    modules = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    if cfg.model_type != "phi3":
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": modules, **settings}
    conf = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(make_model(cfg, weights, dtype), conf, autocast_adapter_dtype=False)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.from_numpy((rng.standard_normal(p.shape) * 0.1).astype(np.float32)).to(dtype)
                p.copy_(noise if "lora_A" in name or "lora_B" in name else p * (1 + noise))
    return model


def gradients(model, rows):
    """Loss per token over all rows, and its gradients to the adapter."""
    loss = 0
    for row in rows:
        logits = model(torch.tensor([row])).logits[0, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")
    loss = loss / sum(len(row) - 1 for row in rows)
    loss.backward()
    named = ((as_saved(n), p.grad) for n, p in model.named_parameters() if p.requires_grad)
    return loss.item(), dict(sorted((n, g.clone()) for n, g in named))


def as_saved(name):
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def make(name, seed):
    family, settings, matters, gguf_positions = MODELS[name]
    cfg = make_config(family, settings)
    weights = random_weights(cfg, seed)
    folder = OUT / name
    folder.mkdir()
    model = make_model(cfg, weights)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, VOCAB, n).tolist() for n in (40, 23)]
    found = [log_probs(model, row) for row in rows]
    entropy = float(np.mean([-(p.exp() * p).sum(-1).mean() for p in found]) / np.log(VOCAB))
    moved = {}
    for other in matters:
        again = make_model(make_config(family, {**settings, **other}), weights)
        moved[str(other)] = max((log_probs(again, r) - f).abs().max().item() for r, f in zip(rows, found))
    print(f"{name}: entropy {entropy:.2f} ln V; moved {moved}")
    assert entropy < 0.85 and min(moved.values()) > 1e-2, name

    model.to(torch.float16).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / name  # which the converter writes down
        shutil.copytree(folder, made)
        # Gemma 3's converter counts its tokens.
        vocab = {f"t{i}": i for i in range(VOCAB)}
        write_json(made / "tokenizer.json", {"model": {"vocab": vocab}, "added_tokens": []})
        convert(made, OUT / f"{name}.gguf")
        if name == "llama-yarn":
            convert(made, OUT / "split.gguf", split_max_tensors=9)

    adapter = adapted(cfg, weights, seed, torch.float32)
    write_adapter(OUT / f"{name}-adapter", adapter, name)
    loss, grads = gradients(adapter, rows)
    exact_loss, exact = gradients(adapted(cfg, weights, seed, torch.float64), rows)
    noise = max(((grads[n] - g).norm() / g.norm()).item() for n, g in exact.items())
    assert abs(loss - exact_loss) < 1e-5 and noise < 1e-4, (name, noise)
    tensors = {f"log_probs.{i}": f for i, f in enumerate(found)} | grads
    safetensors.torch.save_file(tensors, OUT / f"{name}.safetensors")
    write_json(
        OUT / f"{name}.json",
        {"base": name, "input_ids": rows, "loss": loss, "gguf_positions": gguf_positions},
    )
    return weights


def make_variant(name, base, settings, weights):
    family, of_base, _, _ = MODELS[base]
    cfg = make_config(family, {**of_base, **settings})
    rows = json.loads((OUT / f"{base}.json").read_text())["input_ids"]
    found = [log_probs(make_model(cfg, weights), row) for row in rows]
    theirs = safetensors.torch.load_file(OUT / f"{base}.safetensors")
    assert max((f - theirs[f"log_probs.{i}"]).abs().max() for i, f in enumerate(found)) > 1e-2, name
    safetensors.torch.save_file({f"log_probs.{i}": f for i, f in enumerate(found)}, OUT / f"{name}.safetensors")
    with tempfile.TemporaryDirectory() as made:
        cfg.save_pretrained(made)
        config = json.loads((Path(made) / "config.json").read_text())
        record = {"base": base, "input_ids": rows, "config": config}
        if name == "phi3-long":
            # What the converter says of it beside the weights.
            shutil.copy(OUT / base / "model.safetensors", made)
            architectures = json.loads((OUT / base / "config.json").read_text())["architectures"]
            write_json(Path(made) / "config.json", {**config, "architectures": architectures})
            convert(Path(made), Path(made) / "made.gguf")
            made_of = gguf.GGUFReader(Path(made) / "made.gguf")
            record["keys"] = {k: f.contents() for k, f in made_of.fields.items() if k.startswith("phi3.")}
            ropes = [t for t in made_of.tensors if t.name.startswith("rope")]
            record["tensors"] = {t.name: t.data.tolist() for t in ropes}
    write_json(OUT / f"{name}.json", record)


def make_adapter(name, base, settings, weights, seed):
    family, of_base, _, _ = MODELS[base]
    cfg = make_config(family, of_base)
    rows = json.loads((OUT / f"{base}.json").read_text())["input_ids"]
    model = adapted(cfg, weights, seed, torch.float32, **settings)
    write_adapter(OUT / f"{name}-adapter", model, base, save_embedding_layers=False)
    loss, grads = gradients(model, rows)
    exact_loss, exact = gradients(adapted(cfg, weights, seed, torch.float64, **settings), rows)
    noise = max(((grads[n] - g).norm() / g.norm()).item() for n, g in exact.items())
    assert abs(loss - exact_loss) < 1e-5 and noise < 1e-4, (name, noise)
    safetensors.torch.save_file(grads, OUT / f"{name}.safetensors")
    write_json(OUT / f"{name}.json", {"base": base, "input_ids": rows, "loss": loss})


def main():
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    OUT.mkdir(exist_ok=True)
    clear(OUT)
    weights = {name: make(name, 100 + i) for i, name in enumerate(MODELS)}
    for name, (base, settings) in VARIANTS.items():
        make_variant(name, base, settings, weights[base])
    for i, (name, (base, settings)) in enumerate(ADAPTERS.items()):
        make_adapter(name, base, settings, weights[base], 200 + i)
    for path in OUT.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


if __name__ == "__main__":
    main()
