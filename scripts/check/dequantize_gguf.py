#!/usr/bin/env python3
"""Turns a Llama or Qwen2 GGUF into a Hugging Face folder in float32, tokenizer included.

    python3 scripts/check/dequantize_gguf.py FILE.gguf FOLDER

So that transformers and PEFT can be asked about the very weights a GGUF holds. transformers reads GGUF
too, but leaves out the pre-tokenizer (SmolLM2 splits digits one by one) and will not save what it read.
"""

import sys
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "golden"))
from tiny_models import GGUF_NAMES, hf_model, unpermute, write_json  # noqa: E402

PRE_TOKENIZERS = {
    "gpt-2": lambda byte_level: byte_level,
    "smollm": lambda byte_level: tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level]
    ),
}


def read_config(field):
    family = field("general.architecture")
    make = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[family]
    heads, hidden = field(f"{family}.attention.head_count"), field(f"{family}.embedding_length")
    return make(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=field(f"{family}.feed_forward_length"),
        num_hidden_layers=field(f"{family}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=field(f"{family}.attention.head_count_kv"),
        head_dim=field(f"{family}.attention.key_length", hidden // heads),
        max_position_embeddings=field(f"{family}.context_length"),
        # the file holds float32; transformers wants the decimal that was meant
        rms_norm_eps=float(f"{field(f'{family}.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": field(f"{family}.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id", None),
    )


def read_weights(reader, cfg):
    """Hugging Face name -> float32 array, q and k of Llama back in Hugging Face's row order."""
    fixed = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    inner = {v: k for k, v in GGUF_NAMES.items()}
    weights = {}
    for t in reader.tensors:
        assert t.name != "rope_freqs.weight", "Llama 3's rope scaling is not in this GGUF's metadata"
        value = gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float32)
        stem, kind = t.name.rsplit(".", 1)
        if stem in fixed:
            weights[f"{fixed[stem]}.{kind}"] = value
            continue
        _, layer, name = stem.split(".")
        heads = {"attn_q": cfg.num_attention_heads, "attn_k": cfg.num_key_value_heads}.get(name)
        if cfg.model_type == "llama" and heads:
            value = unpermute(value, heads)
        weights[f"model.layers.{layer}.{inner[name]}.{kind}"] = value
    return weights


def write_tokenizer(field, folder):
    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(m.split(" ")) for m in field("tokenizer.ggml.merges")]
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.pre_tokenizer = PRE_TOKENIZERS[field("tokenizer.ggml.pre")](byte_level)
    tok.decoder = tokenizers.decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types) if kind == gguf.TokenType.CONTROL]
    tok.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in control])
    assert tok.get_vocab_size() == len(tokens)
    tok.save(str(folder / "tokenizer.json"))
    named = {k: tokens[field(f"tokenizer.ggml.{v}_token_id")] for k, v in {"bos_token": "bos", "eos_token": "eos"}.items()}
    write_json(
        folder / "tokenizer_config.json",
        {**named, "chat_template": field("tokenizer.chat_template"), "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def main(source, folder):
    reader = gguf.GGUFReader(source)
    required = object()

    def field(name, default=required):
        found = reader.get_field(name)
        if found is None and default is required:
            sys.exit(f"{source}: no {name}")
        return default if found is None else found.contents()

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = read_config(field)
    weights = read_weights(reader, cfg)
    cfg.tie_word_embeddings = "lm_head.weight" not in weights
    hf_model(cfg, weights, torch.float32).save_pretrained(folder)
    write_tokenizer(field, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
