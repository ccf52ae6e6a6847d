#!/usr/bin/env python3
"""Writes tests/golden/generate/sampling.json: which tokens transformers' own chain of logits processors
lets through, and with what probability.

    python3 scripts/golden/generate.py

The chain is the one `generate` builds from a generation config, so the order of the filters is
transformers' too. Every setting must change the distribution, and no filter may decide by rounding:
the script repeats the chain in float64 and asks for the same tokens.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).resolve().parents[2] / "tests/golden/generate/sampling.json"
VOCAB = 48
SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 2.5},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.01},
    {"min_p": 0.05},
    {"min_p": 0.6},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"temperature": 1.7, "top_k": 12},
    {"temperature": 0.6, "top_p": 0.95},
    {"top_k": 10, "top_p": 0.8},
    {"top_k": 20, "min_p": 0.1},
    {"top_p": 0.85, "min_p": 0.08},
    {"temperature": 3.0, "min_p": 0.3},
    {"repetition_penalty": 1.5, "top_p": 0.7},
    {"temperature": 0.8, "top_k": 15, "top_p": 0.9, "min_p": 0.04, "repetition_penalty": 1.1},
    {"temperature": 1.4, "top_k": 30, "top_p": 0.75, "min_p": 0.2, "repetition_penalty": 2.0},
]
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


def probabilities(model, settings, seen, logits):
    """softmax of the processed logits; a token that was filtered out has exactly 0."""
    config = GenerationConfig(do_sample=True, **(NEUTRAL | settings))
    chain = model._get_logits_processor(generation_config=config, input_ids_seq_length=len(seen))
    return chain(torch.tensor([seen]), logits[None].clone()).softmax(-1)[0]


def main():
    assert transformers.__version__ == "5.23.0" and torch.__version__.split("+")[0] == "2.15.0"
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    ))
    generator = torch.Generator().manual_seed(20)
    cases = []
    for settings in SETTINGS:
        for _ in range(3):
            logits = torch.randn(VOCAB, generator=generator) * 2.5
            # The most likely tokens are among the seen ones, one of them twice.
            seen = logits.topk(4).indices.tolist() + torch.randint(VOCAB, (6,), generator=generator).tolist()
            seen.append(seen[0])
            p = probabilities(model, settings, seen, logits)
            exact = probabilities(model, settings, seen, logits.double())
            assert ((p > 0) == (exact > 0)).all(), (settings, "decided by rounding")
            assert settings == {} or (p - logits.softmax(-1)).abs().max() > 1e-3, (settings, "changes nothing")
            cases.append({
                "settings": NEUTRAL | settings,
                "seen": seen,
                "logits": logits.tolist(),
                "probabilities": [[i, x] for i, x in enumerate(exact.tolist()) if x > 0],
                "log_probs": logits.double().log_softmax(-1).tolist(),
            })
    OUT.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(case) for case in cases)
    OUT.write_text(f"[\n{lines}\n]\n")
    print(f"{len(cases)} cases in {OUT}")


if __name__ == "__main__":
    main()
