#!/usr/bin/env python3
"""Writes tests/golden/model and tests/golden/train: tiny random models, outputs of transformers for
them, and of ten LoRA steps by PEFT.

    python3 scripts/golden/tiny_models.py

Same versions, same bytes: every number is drawn from a separate seed, and the script checks its own
golden files. One that a wrong program would also meet is worthless, so each model is made sharp (entropy
under 0.6 ln V), sensitive (1 % of rope_theta moves its log-probs by far more than the tests' 1e-3), and
the training runs are repeated in float64 to show that their digits are not rounding noise.
"""

import copy
import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import gguf
import numpy as np
import peft
import safetensors.torch
import tokenizers
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests/golden/model"
TRAIN = ROOT / "tests/golden/train"
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What the byte-level BPE learns its merges from: English, code, digits, accents, three alphabets.
TEXT = """The miller's daughter walked along the river until the road divided, and there she sat down to rest.
"Which of these roads leads to the mountain?" she asked the old ferryman, who was mending his nets.
He looked at her for a while, then he answered: "Both of them do; the shorter one is the longer way."
In 1987 there were 365 boats on the river, in 2024 only 12 were left, and the price was 3.50 per crossing.
She thanked him, she'd no money anyway, and followed the narrow path through the fields of barley and rye.
When the evening came the wind had turned, and the lights of the village were shining over the water.
fn crossing(boats: &[Boat], price: f64) -> f64 {
    let total: f64 = boats.iter().map(|boat| boat.seats as f64 * price).sum();
    if total > 100.0 { total - 10.0 } else { total }
}
for boat in boats:
    print(boat.name, boat.seats * price)
Die Fähre fährt um acht Uhr über den Fluss. La rivière était très large à cet endroit, où l'eau dormait.
Паром идёт через реку. 渡し船は川を渡る。 Η βάρκα περνά το ποτάμι. \N{GRINNING FACE}\N{ROCKET}
"""


def assert_versions():
    """Fails unless the installed packages are those of requirements.txt. TRL is not checked here: PPO needs an older one."""
    for line in (ROOT / "scripts/golden/requirements.txt").read_text().splitlines():
        if line and not line.startswith(("#", "trl==")):
            name, wanted = line.split("==")
            assert version(name).split("+")[0] == wanted, f"{name}: found {version(name)}, needed {wanted}"


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(vocab_size, pre):
    """A byte-level BPE: 3 special tokens, 256 bytes, merges. `pre` is a name of tokenizer.ggml.pre."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    tok.pre_tokenizer = {"gpt-2": byte_level, "smollm": tokenizers.pre_tokenizers.Sequence([digits, byte_level])}[pre]
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator([TEXT], trainer)
    assert tok.get_vocab_size() == vocab_size, tok.get_vocab_size()
    return tok


def write_hf_tokenizer(folder, tok):
    tok.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "bos_token": "<|im_start|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<|endoftext|>",
        },
    )


def add_gguf_tokenizer(writer, tok, pre):
    tokens = sorted(tok.get_vocab(), key=tok.get_vocab().get)
    control, normal = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([control if t in SPECIALS else normal for t in tokens])
    writer.add_token_merges([" ".join(m) for m in json.loads(tok.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


# ------------------------------------------------------------------- models


def config(family, **kw):
    base = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    rope = {"rope_type": "default", "rope_theta": kw.pop("rope_theta", 10000.0), **kw.pop("rope_scaling", {})}
    make = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }[family]
    return make(**{**base, **kw}, rope_parameters=rope)


# Wave lengths of a 16-wide head at this context fall on all three branches of Llama 3's scaling.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def head_dim(cfg):
    return getattr(cfg, "head_dim", None) or cfg.hidden_size // cfg.num_attention_heads


def linear_shapes(cfg):
    """Name inside a layer -> (out, in)."""
    h, f, d = cfg.hidden_size, cfg.intermediate_size, head_dim(cfg)
    q, kv = cfg.num_attention_heads * d, cfg.num_key_value_heads * d
    return {
        "self_attn.q_proj": (q, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, q),
        "mlp.gate_proj": (f, h),
        "mlp.up_proj": (f, h),
        "mlp.down_proj": (h, f),
    }


def random_weights(cfg, seed):
    """HF name -> float32 array. Queries and keys are large enough that attention looks somewhere, the
    final norm that the head decides; norms and biases are far from their usual 1 and 0."""
    rng = np.random.default_rng(seed)

    def normal(std, *shape):
        return (rng.standard_normal(shape) * std).astype(np.float32)

    def norm(low, high, width=cfg.hidden_size):
        return rng.uniform(low, high, width).astype(np.float32)

    head_std = 0.8 / np.sqrt(cfg.hidden_size)
    w = {"model.embed_tokens.weight": normal(head_std, cfg.vocab_size, cfg.hidden_size)}
    for i in range(cfg.num_hidden_layers):
        layer = f"model.layers.{i}."
        w[layer + "input_layernorm.weight"] = norm(0.5, 1.5)
        w[layer + "post_attention_layernorm.weight"] = norm(0.5, 1.5)
        for name, (rows, cols) in linear_shapes(cfg).items():
            gain = 1.5 if name.endswith(("q_proj", "k_proj")) else 1.0
            w[f"{layer}{name}.weight"] = normal(gain / np.sqrt(cols), rows, cols)
            if cfg.model_type == "qwen2" and name.endswith(("q_proj", "k_proj", "v_proj")):
                w[f"{layer}{name}.bias"] = normal(0.5, rows)
        if cfg.model_type == "qwen3":
            for name in ("q_norm", "k_norm"):
                w[f"{layer}self_attn.{name}.weight"] = norm(0.5, 1.5, head_dim(cfg))
    w["model.norm.weight"] = norm(2.0, 5.0)
    if not cfg.tie_word_embeddings:
        w["lm_head.weight"] = normal(head_std, cfg.vocab_size, cfg.hidden_size)
    return w


def hf_model(cfg, weights, dtype=torch.float32):
    """transformers' model in `dtype`, eager attention, over exactly these weights."""
    cfg = copy.deepcopy(cfg)
    cfg._attn_implementation = "eager"
    make = {
        "llama": transformers.LlamaForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "qwen3": transformers.Qwen3ForCausalLM,
    }[cfg.model_type]
    model = make(cfg)
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in weights.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.to(dtype).eval()


def write_hf_folder(name, cfg, weights, dtype, tok, shards=1, old_rope_keys=False):
    """A Hugging Face folder in `dtype`; returns the weights as rounded on disk."""
    folder = MODEL / name
    folder.mkdir()
    model = hf_model(cfg, weights, dtype)
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // shards + 1024 * (shards > 1) + size * (shards == 1))
    assert len(list(folder.glob("*.safetensors"))) == shards
    if old_rope_keys:  # as transformers 4 wrote them, and as most folders on disks have them
        path = folder / "config.json"
        conf = json.loads(path.read_text())
        rope = conf.pop("rope_parameters")
        conf["rope_theta"] = rope.pop("rope_theta")
        conf["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        conf["torch_dtype"] = conf.pop("dtype")
        conf["transformers_version"] = "4.57.0"
        write_json(path, conf)
    write_hf_tokenizer(folder, tok)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rounded = {k: torch.from_numpy(v).to(dtype).float().numpy() for k, v in weights.items()}
    for k, v in loaded.state_dict().items():
        assert torch.equal(v, torch.from_numpy(rounded.get(k, rounded["model.embed_tokens.weight"]))), k
    ids = torch.arange(40)[None] % cfg.vocab_size
    loaded.set_attn_implementation("eager")
    assert torch.equal(loaded(ids).logits, hf_model(cfg, rounded)(ids).logits), f"{name}: the folder is not the model"
    return rounded


# --------------------------------------------------------------------- GGUF

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(hf):
    """model.layers.0.self_attn.q_proj.weight -> blk.0.attn_q.weight"""
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = hf.rsplit(".", 1)
    if stem in fixed:
        return f"{fixed[stem]}.{kind}"
    _, _, i, inner = stem.split(".", 3)
    return f"blk.{i}.{GGUF_NAMES[inner]}.{kind}"


def permute(w, heads):
    """Rows of a head from Hugging Face's two halves to llama.cpp's interleaved pairs."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def unpermute(w, heads):
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def permuted_heads(cfg, name):
    """How many heads llama.cpp's converter permutes this tensor by; none outside Llama's q and k."""
    if cfg.model_type != "llama":
        return None
    return {"q_proj": cfg.num_attention_heads, "k_proj": cfg.num_key_value_heads}.get(name.split(".")[-2])


# K-quants: fields of a block in file order (bytes), and the d that gives random fields unit deviation.
# Every bit pattern of the integer fields is a valid block; only the half-precision scales are chosen.
K_FIELDS = {
    "Q2_K": (["scales:16", "qs:64", "d", "dmin:1.5"], 13.9),
    "Q3_K": (["hmask:32", "qs:64", "scales:12", "d"], 43.0),
    "Q4_K": (["d", "dmin:7.5", "scales:12", "qs:128"], 255.0),
    "Q5_K": (["d", "dmin:15.5", "scales:12", "qh:32", "qs:128"], 522.0),
    "Q6_K": (["ql:128", "qh:64", "scales:16", "d"], 1367.0),
}


def random_k_blocks(kind, std, shape, rng):
    """Random valid blocks of a K-quant, (rows, bytes), whose values deviate by about `std`."""
    rows, blocks = shape[0], shape[1] // 256
    fields, unit = K_FIELDS[kind]
    d = (std / unit * rng.uniform(0.6, 1.4, (rows, blocks, 1))).astype(np.float16)
    parts = []
    for field in fields:
        name, _, arg = field.partition(":")
        if name == "d":
            parts.append(d.view(np.uint8))
        elif name == "dmin":
            parts.append((d * np.float16(arg)).astype(np.float16).view(np.uint8))
        else:
            parts.append(rng.integers(0, 256, (rows, blocks, int(arg)), dtype=np.uint8))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def write_gguf(name, cfg, weights, kind_of, tok, pre, seed):
    """Writes `name`.gguf with the block types `kind_of(hf_name)` says; returns the weights as rounded,
    under Hugging Face's names and row order."""
    kinds = gguf.GGMLQuantizationType
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(MODEL / f"{name}.gguf", cfg.model_type)
    w.add_type("model")
    w.add_name(name)
    w.add_block_count(cfg.num_hidden_layers)
    w.add_context_length(cfg.max_position_embeddings)
    w.add_embedding_length(cfg.hidden_size)
    w.add_feed_forward_length(cfg.intermediate_size)
    w.add_head_count(cfg.num_attention_heads)
    w.add_head_count_kv(cfg.num_key_value_heads)
    w.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    w.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    if head_dim(cfg) != cfg.hidden_size // cfg.num_attention_heads:
        w.add_key_length(head_dim(cfg))
        w.add_value_length(head_dim(cfg))
    w.add_file_type(gguf.LlamaFileType.GUESSED)
    if cfg.model_type == "llama":
        w.add_vocab_size(cfg.vocab_size)
        w.add_rope_dimension_count(head_dim(cfg))
    add_gguf_tokenizer(w, tok, pre)
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if cfg.rope_parameters["rope_type"] == "llama3":
        w.add_tensor("rope_freqs.weight", rope_factors(cfg))

    rounded = {}
    for hf, value in weights.items():
        heads = permuted_heads(cfg, hf)
        if heads:
            value = permute(value, heads)
        if value.ndim == 1:
            w.add_tensor(gguf_name(hf), value)
        else:
            kind = kind_of(hf)
            if kind in K_FIELDS:
                data = random_k_blocks(kind, value.std(), value.shape, rng)
            else:
                data = gguf.quants.quantize(value, kinds[kind])
            w.add_tensor(gguf_name(hf), data, raw_dtype=kinds[kind])
            value = gguf.quants.dequantize(data, kinds[kind]).astype(np.float32)
            assert np.isfinite(value).all()
        rounded[hf] = unpermute(value, heads) if heads else value
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return rounded


def rope_factors(cfg):
    """Llama 3's divisors of the rotation frequencies, (head_dim / 2), as llama.cpp keeps them in a file."""
    rope, dim = cfg.rope_parameters, head_dim(cfg)
    wave = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (rope["original_max_position_embeddings"] / wave - low) / (high - low)
    factors = np.where(smooth < 0, factor, np.where(smooth > 1, 1.0, 1 / ((1 - smooth) / factor + smooth)))
    assert {1.0, factor} < set(factors.tolist()), "a branch of the scaling is not taken"
    return factors.astype(np.float32)


# ------------------------------------------------------------ model goldens


@torch.inference_mode()
def log_probs(model, ids):
    """(T, V) float32"""
    return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).float()


@torch.inference_mode()
def greedy(model, ids, steps):
    """The most likely next tokens, one forward over everything each; None if a choice was a near-tie."""
    ids = list(ids)
    for _ in range(steps):
        top = log_probs(model, ids)[-1].topk(2)
        if top.values[0] - top.values[1] < 5e-3:
            return None
        ids.append(int(top.indices[0]))
    return ids[-steps:]


def golden_row(model, rng, length):
    """Random tokens after which 16 greedy steps are never in doubt, and those steps."""
    while True:
        row = rng.integers(0, model.config.vocab_size, length).tolist()
        if continuation := greedy(model, row, 16):
            return row, continuation


def write_model_golden(name, cfg, weights, seed):
    model = hf_model(cfg, weights)
    rng = np.random.default_rng(seed)
    rows, continuations = zip(*(golden_row(model, rng, n) for n in (37, 20)))
    out = [log_probs(model, row) for row in rows]
    # Sharp, and moved by every detail that a wrong decoder would miss.
    entropy = float(np.mean([-(p.exp() * p).sum(-1).mean() for p in out]) / np.log(cfg.vocab_size))
    assert entropy < 0.6, f"{name}: entropy {entropy:.3f} ln V"
    moved = {
        "rope_theta": lambda c: c.rope_parameters.update(rope_theta=c.rope_parameters["rope_theta"] * 1.01),
        "rms_norm_eps": lambda c: setattr(c, "rms_norm_eps", c.rms_norm_eps * 10),
    }
    if cfg.rope_parameters["rope_type"] == "llama3":
        moved["rope factor"] = lambda c: c.rope_parameters.update(factor=c.rope_parameters["factor"] * 1.1)
    report = {}
    for what, change in moved.items():
        other = copy.deepcopy(cfg)
        change(other)
        moved_by = (log_probs(hf_model(other, weights), rows[0]) - out[0]).abs().max()
        report[what] = round(float(moved_by), 4)
        assert moved_by > 5e-3, f"{name}: {what} moves the log-probs by {moved_by:.1e} only"
    exact = log_probs(hf_model(cfg, weights, torch.float64), rows[0])
    noise = float((exact - out[0]).abs().max())
    assert noise < 1e-4, f"{name}: {noise:.1e} between float32 and float64"
    print(f"{name}: entropy {entropy:.2f} ln V, float32 noise {noise:.1e}, moved by {report}")
    safetensors.torch.save_file({f"log_probs.{i}": p.contiguous() for i, p in enumerate(out)}, MODEL / f"{name}.safetensors")
    write_json(MODEL / f"{name}.json", {"input_ids": rows, "greedy": continuations})


def make_models():
    """All tiny models; returns name -> (config, weights as rounded on disk)."""
    smollm, gpt2 = make_tokenizer(512, "smollm"), make_tokenizer(512, "gpt-2")
    made = {}

    def folder(name, cfg, seed, dtype, tok, **kw):
        made[name] = (cfg, write_hf_folder(name, cfg, random_weights(cfg, seed), dtype, tok, **kw))

    def gguf_file(name, cfg, seed, kind_of, tok, pre):
        made[name] = (cfg, write_gguf(name, cfg, random_weights(cfg, seed), kind_of, tok, pre, seed + 1))

    llama3 = config("llama", rope_scaling=LLAMA3)
    untied = config("llama", head_dim=24, tie_word_embeddings=False)
    qwen2 = config("qwen2", rope_theta=1000000.0, rms_norm_eps=1e-6)
    wide = config("llama", vocab_size=320, hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4)
    folder("llama-tiny", llama3, 1, torch.float32, smollm, old_rope_keys=True)
    folder("llama-untied", untied, 2, torch.bfloat16, gpt2, shards=2)
    folder("qwen2-tiny", qwen2, 3, torch.float16, gpt2)
    gguf_file("llama-q8_0", llama3, 4, lambda _: "Q8_0", smollm, "smollm")
    gguf_file("llama-q4_0", untied, 5, lambda name: "Q8_0" if name == "lm_head.weight" else "Q4_0", gpt2, "gpt-2")

    def qwen2_kind(name):
        inner = name.split(".")[-2]
        mix = {"embed_tokens": "F16", "q_proj": "Q5_0", "k_proj": "Q5_1", "v_proj": "Q4_1", "o_proj": "F32"}
        return {**mix, "gate_proj": "Q4_1", "up_proj": "Q5_0", "down_proj": "BF16" if "layers.0" in name else "Q5_1"}[inner]

    gguf_file("qwen2-mix", qwen2, 6, qwen2_kind, gpt2, "gpt-2")

    def k_kind(name):
        if "layers" not in name:
            return "Q6_K"  # as llama.cpp keeps embeddings that are the head too
        layer, inner = int(name.split(".")[2]), list(linear_shapes(wide)).index(name.split(".", 3)[3].rsplit(".", 1)[0])
        return list(K_FIELDS)[(inner + 2 * layer) % 5]

    gguf_file("llama-k", wide, 7, k_kind, make_tokenizer(320, "smollm"), "smollm")
    return made


# ---------------------------------------------------------- training goldens

STEPS, ROWS_PER_STEP = 10, 4
# run -> base model, seed, LoraConfig's extras, and the optimizer's departures from TRAIN_ARGS
RUNS = {
    "llama-tiny": ("llama-tiny", 11, {}, {}),
    "qwen2-tiny": ("qwen2-tiny", 12, {}, {}),
    "llama-q8_0": ("llama-q8_0", 13, {}, {}),
    "llama-q4_0": ("llama-q4_0", 14, {}, {}),
    "llama-tiny-rslora": (
        "llama-tiny",
        15,
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 8},
            "alpha_pattern": {"layers.0.mlp.gate_proj": 3, "q_proj": 5},
        },
        {},
    ),
    # strong enough that a wrong decay shows; no clipping
    "llama-tiny-linear": (
        "llama-tiny",
        16,
        {},
        {"lr_scheduler_type": "linear", "learning_rate": 5e-3, "weight_decay": 1.0, "max_grad_norm": 0.0},
    ),
}
TRAIN_ARGS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_steps": STEPS,
    "per_device_train_batch_size": ROWS_PER_STEP,
}


def train_rows(vocab_size, seed):
    """Rows of 6 to 40 tokens: a short motif of few tokens repeated, so that there is something to learn.
    In three of four rows a prompt (the first token at least) is not learned; the others learn all."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(STEPS * ROWS_PER_STEP):
        length = int(rng.integers(6, 41))
        motif = rng.integers(3, 35, int(rng.integers(2, 8))) * (vocab_size // 40)
        ids = np.resize(motif, length).tolist()
        prompt = int(rng.integers(1, length - 1)) if i % 4 else 0
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def write_adapter(folder, model, base, **kw):
    """As save_pretrained writes it; sets become sorted lists, the model card goes."""
    model.save_pretrained(folder, **kw)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    conf = json.loads(path.read_text())
    conf["base_model_name_or_path"] = base
    conf["target_modules"] = sorted(conf["target_modules"])
    write_json(path, conf)


def row_loss(model, row):
    """Summed loss in nats over the counted tokens of one row, and their number."""
    labels = torch.tensor(row["labels"][1:])
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss, int((labels != -100).sum())


def train(model, rows, args, first_gradients=None):
    """Ten steps; the reference of one step is: rows run singly, one backward of summed loss / count."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    betas = (args["adam_beta1"], args["adam_beta2"])
    opt = torch.optim.AdamW(
        params.values(), lr=args["learning_rate"], betas=betas, eps=args["adam_epsilon"], weight_decay=args["weight_decay"]
    )
    schedule = transformers.get_scheduler(args["lr_scheduler_type"], opt, args["warmup_steps"], args["max_steps"])
    steps = []
    for step in range(args["max_steps"]):
        n = args["per_device_train_batch_size"]
        losses, counts = zip(*(row_loss(model, row) for row in rows[step * n : (step + 1) * n]))
        loss = sum(losses) / sum(counts)
        loss.backward()
        if step == 0 and first_gradients is not None:
            first_gradients.update({n.replace(".default", ""): p.grad.clone() for n, p in params.items()})
        # max_grad_norm 0 measures and does not clip, as in transformers
        norm = torch.nn.utils.clip_grad_norm_(params.values(), args["max_grad_norm"] or float("inf"))
        rate = schedule.get_last_lr()[0]
        opt.step()
        schedule.step()
        opt.zero_grad()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate, "tokens": sum(counts)})
    return steps


def lora_model(cfg, weights, seed, extras, dtype):
    """The base with an adapter whose B is random too, so that every gradient matters from the start."""
    conf = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=[n.split(".")[1] for n in linear_shapes(cfg)], **extras
    )
    model = peft.get_peft_model(hf_model(cfg, weights, dtype), conf, autocast_adapter_dtype=False)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.from_numpy((rng.standard_normal(p.shape) * 0.1).astype(np.float32)))
    return model


def make_training(models):
    for run, (base, seed, extras, changes) in RUNS.items():
        cfg, weights = models[base]
        folder = TRAIN / run
        folder.mkdir()
        args = {**TRAIN_ARGS, **changes}
        rows = train_rows(cfg.vocab_size, seed)
        model = lora_model(cfg, weights, seed, extras, torch.float32)
        write_adapter(folder / "initial", model, base)
        gradients = {}
        steps = train(model, rows, args, gradients)
        write_adapter(folder / "final", model, base)

        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())
        exact = lora_model(cfg, weights, seed, extras, torch.float64)
        exact_steps = train(exact, rows, args)
        loss_noise = max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, exact_steps))
        pairs = zip(model.parameters(), exact.parameters())
        noise = max(((a - b).norm() / b.norm()).item() for a, b in pairs if a.requires_grad)
        assert loss_noise < 1e-5 and noise < 1e-4, f"{run}: {loss_noise:.1e} {noise:.1e}"
        norms = [s["grad_norm"] for s in steps]
        print(
            f"{run}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, grad_norm {min(norms):.2f} to {max(norms):.2f},"
            f" float32 noise {loss_noise:.1e} in the loss, {noise:.1e} in the adapter"
        )
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_json(folder / "run.json", {"base": base, **args, "steps": steps})
        safetensors.torch.save_file(dict(sorted(gradients.items())), folder / "gradients.safetensors")


def clear(folder):
    """Removes what a script wrote into its folder. README.md and smollm2.json stay: no script writes them."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("README.md", "smollm2.json"):
            path.unlink()


def main():
    assert_versions()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    clear(MODEL)
    models = make_models()
    for i, (name, (cfg, weights)) in enumerate(models.items()):
        write_model_golden(name, cfg, weights, 100 + i)
    clear(TRAIN)
    make_training(models)


if __name__ == "__main__":
    main()
