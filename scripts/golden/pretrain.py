#!/usr/bin/env python3
"""Writes tests/golden/pretrain: ten full-parameter steps of small models as PyTorch takes them.

    python3 scripts/golden/pretrain.py [RUN ...]     [default: all]

Same versions, same bytes. transformers' models with eager attention in float32, torch's AdamW in two groups, its
clip_grad_norm_, and a list of learning rates. Rows are packed documents; either a row is one text to the model, or
positions restart and attention is blocked at the documents' borders. Each run is repeated in float64 to show that
its digits are not rounding noise.
"""

import math
import re
import shutil
import sys

import numpy as np
import safetensors.torch
import torch
import transformers

from tiny_models import ROOT, assert_versions, config, hf_model, random_weights, write_json

PRETRAIN = ROOT / "tests/golden/pretrain"
STEPS, ROWS, LENGTH = 10, 4, 24
ADAMW = {"learning_rate": 4e-3, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 3
# Family, what is special in its config, whether documents of a row see each other, whether the embedding decays.
RUNS = {
    "llama-tied": ("llama", {}, True, True),
    "llama-untied": ("llama", {"tie_word_embeddings": False, "rope_theta": 500.0}, False, False),
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 1}, False, True),
    "qwen3": ("qwen3", {"num_attention_heads": 3, "num_key_value_heads": 1, "rope_theta": 1e6}, False, True),
}


def small_config(family, special):
    """No width is a multiple of a vector's; heads together are wider than the stream. There is no padding token:
    transformers would learn nothing from its row of the embedding."""
    sizes = dict(vocab_size=83, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2)
    return config(family, **{**sizes, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, **special})


def learning_rate(step):
    """Linear warm-up, then half a cosine."""
    if step < WARMUP_STEPS:
        return ADAMW["learning_rate"] * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (STEPS - WARMUP_STEPS)
    return ADAMW["learning_rate"] * 0.5 * (1 + math.cos(math.pi * progress))


def documents(rng, vocab_size):
    """A row: token ids of packed documents and their lengths. Half of the tokens repeat the one before last, so that
    there is something to learn."""
    ids = rng.integers(0, vocab_size, LENGTH)
    for i in range(2, LENGTH):
        if rng.random() < 0.5:
            ids[i] = ids[i - 2]
    borders = sorted(rng.choice(np.arange(2, LENGTH - 1), rng.integers(0, 4), replace=False).tolist())
    lengths = np.diff([0, *borders, LENGTH]).tolist()
    return ids.tolist(), lengths


def inputs(rows, whole, dtype):
    """What the model reads of the rows, and labels: with blocked documents their first tokens are not predicted."""
    ids = torch.tensor([ids for ids, _ in rows])
    if whole:
        return {"input_ids": ids}, ids
    document = torch.tensor([[i for i, n in enumerate(lengths) for _ in range(n)] for _, lengths in rows])
    positions = torch.tensor([[i for n in lengths for i in range(n)] for _, lengths in rows])
    seen = (document[:, :, None] == document[:, None, :]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
    labels = torch.where(positions == 0, -100, ids)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}, labels


def groups(model, embeddings_decay):
    """Matrices decay, norms and biases do not; the embedding as asked."""

    def decays(name, parameter):
        return parameter.ndim == 2 and (embeddings_decay or "embed_tokens" not in name)

    split = {True: [], False: []}
    for name, parameter in model.named_parameters():
        split[decays(name, parameter)].append(parameter)
    return [
        {"params": split[True], "weight_decay": ADAMW["weight_decay"]},
        {"params": split[False], "weight_decay": 0.0},
    ]


def train(cfg, weights, steps_rows, whole, embeddings_decay, dtype):
    model = hf_model(cfg, weights, dtype).train()
    betas = (ADAMW["adam_beta1"], ADAMW["adam_beta2"])
    optimizer = torch.optim.AdamW(groups(model, embeddings_decay), betas=betas, eps=ADAMW["adam_epsilon"])
    steps = []
    for step, rows in enumerate(steps_rows):
        read, labels = inputs(rows, whole, dtype)
        logits = model(**read).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        tokens = int((labels[:, 1:] != -100).sum())
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": learning_rate(step), "tokens": tokens})
    return model, steps


def make_run(name, family, special, whole, embeddings_decay, seed):
    cfg = small_config(family, special)
    weights = random_weights(cfg, seed)
    rng = np.random.default_rng(100 + seed)
    steps_rows = [[documents(rng, cfg.vocab_size) for _ in range(ROWS)] for _ in range(STEPS)]
    assert any(len(lengths) > 1 for rows in steps_rows for _, lengths in rows)

    folder = PRETRAIN / name
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "initial").mkdir(parents=True)
    hf_model(cfg, weights).save_pretrained(folder / "initial")
    (folder / "initial/generation_config.json").unlink()
    model, steps = train(cfg, weights, steps_rows, whole, embeddings_decay, torch.float32)
    exact, exact_steps = train(cfg, weights, steps_rows, whole, embeddings_decay, torch.float64)

    loss_noise = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, exact_steps))
    final = dict(model.named_parameters())
    noise = max(((final[k] - v).norm() / v.norm()).item() for k, v in exact.named_parameters())
    moved = min((final[k] - torch.from_numpy(weights[k])).norm() / final[k].norm() for k in final).item()
    assert loss_noise < 1e-5 and noise < 2e-5 < 1e-3 < moved, (name, loss_noise, noise, moved)
    print(f"{name}: loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}, float32 noise {loss_noise:.1e}, {noise:.1e}")

    tensors = {k: v.detach().clone().contiguous() for k, v in sorted(final.items())}
    safetensors.torch.save_file(tensors, folder / "final.safetensors")
    for step, rows in zip(steps, steps_rows):
        step["rows"] = [{"input_ids": ids, "documents": lengths} for ids, lengths in rows]
    settings = {"max_grad_norm": MAX_GRAD_NORM, "documents_apart": not whole, "embeddings_decay": embeddings_decay}
    write_json(folder / "run.json", {**ADAMW, **settings, "steps": steps})


def compact(path):
    """Lists of numbers on one line each."""
    text = path.read_text()
    path.write_text(re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", text))


def main():
    assert_versions()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for seed, (name, run) in enumerate(RUNS.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        make_run(name, *run, seed)
        compact(PRETRAIN / name / "run.json")


if __name__ == "__main__":
    main()
