#!/usr/bin/env python3
"""Writes tests/golden/lora_variants: the LoRA family as PEFT computes, saves, combines and trains it.

    PYTHONHASHSEED=0 python3 scripts/golden/lora_variants.py

Ten steps and merged weights are of the models in tests/golden/model, rows and settings those of
scripts/golden/tiny_models.py; files and combinations are of a Llama of 8 numbers a token. Every number is drawn
from a separate seed.
"""

import json
import math
import os
import shutil
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny_models as golden
from adapters import llama, lora_layers

VARIANTS = golden.ROOT / "tests/golden/lora_variants"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MERGED = ["model.layers.1.self_attn.k_proj"]
warnings.simplefilter("ignore")


def base(name, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(golden.MODEL / name, dtype=dtype, attn_implementation="eager").eval()


def lora_model(name, dtype=torch.float32, **config):
    config = {k: v for k, v in whole(config).items() if k != "peft_type"}
    return peft.get_peft_model(base(name, dtype), peft.LoraConfig(**config), autocast_adapter_dtype=False)


def whole(config):
    """The config with the additions of lora_model, as ours reads it."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 5, "target_modules": LINEARS, **config}


def randomize(model, seed):
    """Every trained number away from its start; magnitudes, whole modules and token rows by a tenth."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.from_numpy((rng.standard_normal(p.shape) * 0.1).astype(np.float32)).to(p.dtype)
                p.copy_(noise if "lora_A" in name or "lora_B" in name or "lora_embedding" in name else p * (1 + noise))


def save(model, folder, base_name, **kw):
    model.save_pretrained(folder, save_embedding_layers=False, **kw)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    conf = json.loads(path.read_text())
    conf["base_model_name_or_path"] = base_name
    conf["target_modules"] = sorted(conf["target_modules"])
    golden.write_json(path, conf)
    return conf


def train(model, args):
    rows = [json.loads(line) for line in (golden.TRAIN / "llama-tiny/rows.jsonl").read_text().splitlines()]
    return golden.train(model, rows, args)


# ------------------------------------------------------------------ ten steps

RUNS = {
    "dora": ("llama-tiny", {"use_dora": True}),
    "dora-rslora": ("llama-tiny", {"use_dora": True, "use_rslora": True, "target_modules": ["k_proj", "v_proj"]}),
    "pissa": ("llama-tiny", {"init_lora_weights": "pissa", "use_rslora": True, "lora_alpha": 3}),
    "olora": (
        "llama-tiny",
        {"init_lora_weights": "olora", "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 5}, "alpha_pattern": {"k_proj": 3}},
    ),
    "dora-pissa": (
        "llama-tiny",
        {"init_lora_weights": "pissa", "use_dora": True, "target_modules": ["k_proj", "v_proj"]},
    ),
    "embeddings": ("llama-untied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "embeddings-tied": ("llama-tiny", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tokens": ("llama-tiny", {"target_modules": ["q_proj"], "trainable_token_indices": [480, 36, 252, 48]}),
    "tokens-untied": ("llama-untied", {"target_modules": ["q_proj"], "trainable_token_indices": [480, 36, 252, 48]}),
    "whole": ("llama-tiny", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
}


def begins_of_the_base(config):
    return "init_lora_weights" in config


def initialized(name, config, seed, dtype=torch.float32):
    # PEFT's PiSSA requires float32, so both are initialized in it.
    of_base = begins_of_the_base(config)
    model = lora_model(name, torch.float32 if of_base else dtype, **config).to(dtype)
    if not of_base:
        randomize(model, seed)
    return model


def ten_steps(run, seed):
    name, config = RUNS[run]
    folder = VARIANTS / run
    folder.mkdir()
    args = {**golden.TRAIN_ARGS, "weight_decay": 0.1}
    model = initialized(name, config, seed)
    if begins_of_the_base(config):
        # As in PEFT's guide to PiSSA, so that save_pretrained converts.
        start = Path(tempfile.mkdtemp()) / "start"
        init = model.peft_config["default"].init_lora_weights
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = init
        steps = train(model, args)
        if config.get("use_dora"):
            # PEFT's conversion loses the magnitudes, so the file would not load; only the losses are kept.
            shutil.rmtree(start.parent)
        else:
            save(model, folder / "final", name, path_initial_model_for_weight_conversion=str(start))
    elif "modules_to_save" in config:
        # The whole modules would be most of the goldens; they begin as the base's.
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                source = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
                original = next(source[key] for key in source if key in n).original_module.weight
                p.data.copy_(original.data)
        conf = save(model, folder / "initial", name)
        conf["modules_to_save"] = None
        golden.write_json(folder / "initial/adapter_config.json", conf)
        strip(folder / "initial/adapter_model.safetensors")
        steps = train(model, args)
        final = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        sums = {n.removeprefix("base_model.model."): float(p.double().square().sum()) for n, p in final.items() if "lora" not in n}
    else:
        save(model, folder / "initial", name)
        steps = train(model, args)
        save(model, folder / "final", name)
    exact = initialized(name, config, seed, torch.float64)
    if "modules_to_save" in config:
        for n, p in exact.named_parameters():
            if "modules_to_save" in n:
                source = {"embed_tokens": exact.get_input_embeddings(), "lm_head": exact.get_output_embeddings()}
                p.data.copy_(next(source[key] for key in source if key in n).original_module.weight.data)
    noise = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, train(exact, args)))
    print(f"{run}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, float32 noise {noise:.1e}")
    assert noise < 1e-5, run
    record = {"base": name, "config": whole(config), **args, "steps": steps}
    if "modules_to_save" in config:
        record["squares"] = sums
    golden.write_json(folder / "run.json", record)
    if all(any(module.endswith(t) for t in config.get("target_modules", LINEARS)) for module in MERGED):
        merged(model, folder)


def strip(path):
    kept = {name: t for name, t in load_file(path).items() if "lora" in name}
    save_file(kept, path, metadata={"format": "pt"})


def merged(model, folder):
    model = model.merge_and_unload()
    save_file({f"{m}.weight": model.get_submodule(m).weight.data.contiguous() for m in MERGED}, folder / "merged.safetensors")


def rslora():
    """The merged weights of a run that is already there."""
    folder = VARIANTS / "rslora"
    folder.mkdir()
    merged(peft.PeftModel.from_pretrained(base("llama-tiny"), golden.TRAIN / "llama-tiny-rslora/final"), folder)


# ---------------------------------------------------------------------- files

FILES = {
    "embeddings": (False, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "lora_alpha": 7}),
    "tokens": (True, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [9, 2, 5], "lm_head": [9, 2, 5]}}),
    "whole": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"], "use_dora": True}),
}


def small(tied):
    model = llama(1)
    if tied:
        conf = model.config
        conf.tie_word_embeddings = True
        torch.manual_seed(0)
        model = type(model)(conf)
    return model


def files():
    """Folders as PEFT saves them, and the weights it merges them into."""
    for i, (name, (tied, config)) in enumerate(FILES.items()):
        model = peft.get_peft_model(small(tied), peft.LoraConfig(task_type="CAUSAL_LM", r=2, **config))
        randomize(model, 50 + i)
        folder = VARIANTS / "files" / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        path = folder / "adapter_config.json"
        conf = json.loads(path.read_text())
        conf["target_modules"] = sorted(conf["target_modules"])
        golden.write_json(path, conf)
        before = {n: p.clone() for n, p in small(tied).state_dict().items()}
        after = model.merge_and_unload().state_dict()
        kept = [n for n in before if n.endswith(("embed_tokens.weight", "lm_head.weight", "q_proj.weight"))]
        tensors = {f"{which}.{n}": state[n].clone() for n in kept for which, state in (("base", before), ("merged", after))}
        save_file(tensors, folder / "merged.safetensors")


# --------------------------------------------------------------- combinations

ADAPTERS = {
    "one": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
    "two": {"r": 3, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
    "three": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]},
}
TWO, THREE = ["one", "two"], ["one", "two", "three"]
CASES = [
    {"method": "linear", "adapters": TWO, "weights": [0.7, 0.4]},
    {"method": "linear", "adapters": TWO, "weights": [1.0, -0.5]},
    {"method": "cat", "adapters": THREE, "weights": [0.7, -0.4, 1.3]},
    {"method": "svd", "adapters": THREE, "weights": [0.7, -0.4, 1.3]},
    {"method": "svd", "adapters": THREE, "weights": [0.7, 0.4, 1.3], "svd_rank": 2},
    {"method": "ties", "adapters": TWO, "weights": [1.0, 0.5], "density": 0.5},
    {"method": "ties", "adapters": TWO, "weights": [1.0, -0.5], "density": 0.8, "majority_sign_method": "frequency"},
    {"method": "ties_svd", "adapters": THREE, "weights": [1.0, 0.5, 0.8], "density": 0.4},
    {"method": "ties_svd", "adapters": THREE, "weights": [1.0, 0.5, 0.8], "density": 0.7, "majority_sign_method": "frequency"},
    {"method": "dare_linear", "adapters": TWO, "weights": [1.0, -0.5], "density": 0.6},
    {"method": "dare_linear_svd", "adapters": THREE, "weights": [1.0, 0.5, 0.8], "density": 0.6, "svd_rank": 3},
    {"method": "dare_ties", "adapters": TWO, "weights": [1.0, 0.5], "density": 0.6},
    {"method": "dare_ties_svd", "adapters": THREE, "weights": [1.0, 0.5, 0.8], "density": 0.6, "majority_sign_method": "frequency"},
    {"method": "magnitude_prune", "adapters": TWO, "weights": [1.0, 0.5], "density": 0.5},
    {"method": "magnitude_prune_svd", "adapters": THREE, "weights": [1.0, 0.5, -0.8], "density": 0.5},
    {"method": "magnitude_prune", "adapters": TWO, "weights": [1.0, 0.5], "density": 1.0},
]


def combinations():
    folder = VARIANTS / "combine"
    folder.mkdir()
    model = None
    for i, (name, config) in enumerate(ADAPTERS.items()):
        config = peft.LoraConfig(task_type="CAUSAL_LM", **config)
        if model is None:
            model = peft.get_peft_model(small(False), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        randomize(model, 70 + i)
        model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    (folder / "README.md").unlink()
    for path in folder.glob("*/adapter_config.json"):
        conf = json.loads(path.read_text())
        conf["target_modules"] = sorted(conf["target_modules"])
        golden.write_json(path, conf)
    layers = [(n.removeprefix("base_model.model."), m) for n, m in model.named_modules() if hasattr(m, "get_delta_weight")]
    tensors = {}
    for i, case in enumerate(CASES):
        masks, draw = [], torch.bernoulli

        def record(p):
            masks.append(draw(p))
            return masks[-1]

        torch.manual_seed(i)
        torch.bernoulli = record
        settings = {k: case[k] for k in ("svd_rank", "density", "majority_sign_method") if k in case}
        model.add_weighted_adapter(case["adapters"], case["weights"], f"case{i}", combination_type=case["method"], **settings)
        torch.bernoulli = draw
        masks = iter(masks)
        for module, layer in layers:
            if f"case{i}" not in layer.scaling:
                continue
            assert layer.scaling[f"case{i}"] == 1
            is_embedding = "embed" in module
            delta = layer.get_delta_weight(f"case{i}").detach()
            tensors[f"{i}.{module}"] = (delta.T if is_embedding else delta).contiguous()
            if "dare" not in case["method"]:
                continue
            for matrix in ["Product"] if case["method"].endswith("svd") else ["A", "B"]:
                for adapter, name in enumerate(case["adapters"]):
                    if name in layer.scaling:
                        mask = next(masks)
                        mask = mask.T if matrix == "Product" and is_embedding else mask
                        tensors[f"{i}.{module}.{matrix}.{adapter}"] = mask.to(torch.uint8).contiguous()
        assert next(masks, None) is None
    save_file(tensors, folder / "combined.safetensors")
    golden.write_json(folder / "cases.json", CASES)


def main():
    golden.assert_versions()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for path in VARIANTS.iterdir() if VARIANTS.exists() else ():
        if path.is_dir():
            shutil.rmtree(path)
    VARIANTS.mkdir(exist_ok=True)
    for i, run in enumerate(RUNS):
        ten_steps(run, 30 + i)
    rslora()
    files()
    combinations()


if __name__ == "__main__":
    main()
