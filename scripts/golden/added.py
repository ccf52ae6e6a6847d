#!/usr/bin/env python3
"""Writes tests/golden/added_tokens: tokens added to a vocabulary, as transformers numbers them and PEFT trains
and saves their rows.

    PYTHONHASHSEED=0 python3 scripts/golden/added.py

Models and rows are those of scripts/golden/tiny_models.py; in the rows every fifth token is one that was added. New rows
begin as the mean of the others: transformers' `mean_resizing` without its noise.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import peft
import torch
import transformers
from safetensors.torch import save_file

import tiny_models as golden
import lora_variants as family

ADDED = golden.ROOT / "tests/golden/added_tokens"
TOKENS, SPECIAL_TOKENS = ["ferry", "über all", "miller"], ["<|tool|>", "<|im_end|>", "<|", "er"]
NEW = [512, 513]
TEXTS = [
    "The ferryman and the ferry.<|tool|>x<|im_end|>\n",
    "<|tool|><|tool|> ferryferry über allem <|to<|tool|>",
    " river\nrivers, miller's mill <| |> <||>",
    "",
]
RUNS = {
    "tied": ("llama-tiny", {"trainable_token_indices": NEW}),
    "untied": ("llama-untied", {"trainable_token_indices": {"embed_tokens": [*NEW, 36], "lm_head": [513, 512]}}),
    # Updates of the ends: what is new of these trains in them.
    "embedding-and-head": ("llama-untied", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "head-tied": ("llama-tiny", {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": NEW}),
}


def tokens():
    """Ids and texts of a tokenizer that tokens were added to, some of which it had."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(golden.MODEL / "llama-tiny")
    tokenizer.add_tokens(TOKENS)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS + SPECIAL_TOKENS}
    assert min(ids.values()) < 512 < max(ids.values()), "none is new, or none was there"
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return {
        "add_tokens": TOKENS,
        "add_special_tokens": SPECIAL_TOKENS,
        "length": len(tokenizer),
        "ids": ids,
        "texts": [
            {"text": text, "ids": ids, "plain": tokenizer.decode(ids, skip_special_tokens=True)}
            for text, ids in zip(TEXTS, encoded)
        ],
    }


def resized(model, tokens):
    """The model with rows for `tokens` tokens, new ones the mean of the others."""
    before = model.config.vocab_size
    model.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[before:] = layer.weight[:before].double().mean(0).to(layer.weight.dtype)
    return model


def rows():
    found = [json.loads(line) for line in (golden.TRAIN / "llama-tiny/rows.jsonl").read_text().splitlines()]
    for row in found:
        for key in ("input_ids", "labels"):
            row[key] = [512 + token // 5 % 2 if token > 2 and token % 5 == 0 else token for token in row[key]]
    return found


def initialized(name, config, seed, dtype):
    config = peft.LoraConfig(**{k: v for k, v in family.whole(config).items() if k != "peft_type"})
    model = peft.get_peft_model(resized(family.base(name, dtype), 514), config, autocast_adapter_dtype=False)
    family.randomize(model, seed)
    return model


def ten_steps(run, seed):
    name, config = RUNS[run]
    config = {"target_modules": ["q_proj"], **config}
    folder = ADDED / run
    folder.mkdir()
    args = {**golden.TRAIN_ARGS, "weight_decay": 0.1}
    model = initialized(name, config, seed, torch.float32)
    family.save(model, folder / "initial", name)
    steps = golden.train(model, rows(), args)
    family.save(model, folder / "final", name)
    exact = golden.train(initialized(name, config, seed, torch.float32).double(), rows(), args)
    noise = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, exact))
    print(f"{run}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, float32 noise {noise:.1e}")
    assert noise < 1e-5, run
    golden.write_json(folder / "run.json", {"base": name, "config": family.whole(config), **args, "steps": steps})


FILES = {
    "tokens": (False, {"trainable_token_indices": [16, 17]}),
    "tokens-tied": (True, {"trainable_token_indices": [17, 16]}),
    "both-tied": (True, {"trainable_token_indices": {"embed_tokens": [16, 17], "lm_head": [16, 17]}}),
    "both": (False, {"trainable_token_indices": {"embed_tokens": [16, 17], "lm_head": [17]}}),
    "whole": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


def files():
    """Folders as PEFT saves them over a resized vocabulary, with whole embeddings, and the ends that a
    reader gets of them."""
    for i, (name, (tied, config)) in enumerate(FILES.items()):
        with tempfile.TemporaryDirectory() as base:
            family.small(tied).save_pretrained(base)
            model = resized(transformers.AutoModelForCausalLM.from_pretrained(base), 18)
            model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], **config))
            family.randomize(model, 90 + i)
            folder = ADDED / "files" / name
            model.save_pretrained(folder)
            (folder / "README.md").unlink()
            path = folder / "adapter_config.json"
            conf = json.loads(path.read_text())
            conf["base_model_name_or_path"] = "small"
            golden.write_json(path, conf)
            state = resized(transformers.AutoModelForCausalLM.from_pretrained(base), 18)
            read = peft.PeftModel.from_pretrained(state, folder).merge_and_unload()
            ends = {"model.embed_tokens": read.get_input_embeddings(), "lm_head": read.get_output_embeddings()}
            save_file({n: m.weight.data.clone() for n, m in ends.items()}, folder / "ends.safetensors")


def main():
    golden.assert_versions()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    ADDED.mkdir(exist_ok=True)
    golden.clear(ADDED)
    (ADDED / "files").mkdir()
    golden.write_json(ADDED / "tokens.json", tokens())
    for i, run in enumerate(RUNS):
        ten_steps(run, 80 + i)
    files()


if __name__ == "__main__":
    main()
