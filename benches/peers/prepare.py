#!/usr/bin/env python3
"""Makes the models and data of the other scripts, in PEERS_MODELS [models/]; existing files are kept.

    $PYTHON benches/peers/prepare.py [smollm2] [qwen05]

smollm2  SmolLM2-135M-Instruct as fetched (Q4_1), its weights in float32 as a Hugging Face folder, and, from
         these, Q4_0, Q4_K_M and Q8_0 by llama.cpp's own llama-quantize (LLAMA_BIN names its folder); the chats
qwen05   the shape of Qwen2.5-0.5B with random weights: a Hugging Face folder in bfloat16, and a Q8_0 GGUF of it

Needs requirements.txt.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import torch
import transformers

from common import MODEL_FILES, MODELS, ROOT

sys.path.insert(0, str(ROOT / "scripts/golden"))
from tiny_models import gguf_name  # noqa: E402


def say(path, word):
    print(f"{path}: {word}", file=sys.stderr, flush=True)


def once(path, make):
    """`make(part)` writes a temporary file, which is then renamed: existing files are complete."""
    if path.exists():
        return say(path, "there already")
    part = path.with_name(f"part.{path.name}")
    make(part)
    os.replace(part, path)
    say(path, "written")


def script(name, *args):
    subprocess.run([sys.executable, ROOT / name, *args], check=True)


def prepare_smollm2():
    script("scripts/fetch/chatterbot.py")
    folder, q4_1 = (MODELS / name for name in MODEL_FILES["smollm2"])
    if not q4_1.exists():
        script("scripts/fetch/smollm2.py")
        if MODELS != ROOT / "models":
            shutil.copy(ROOT / "models" / q4_1.name, q4_1)
    once(folder, lambda part: script("scripts/check/dequantize_gguf.py", q4_1, part))
    if "LLAMA_BIN" not in os.environ:
        return say(MODELS, "no other quantizations, LLAMA_BIN is not set")
    program = Path(os.environ["LLAMA_BIN"]) / "llama-quantize"
    f32 = MODELS / "smollm2-135m-f32.gguf"

    def quantize(source, part, kind):
        command = [program, "--allow-requantize", source, part, kind, "2"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    once(f32, lambda part: quantize(q4_1, part, "F32"))
    for kind in ("Q4_0", "Q4_K_M", "Q8_0"):
        once(MODELS / f"smollm2-135m-{kind.lower()}.gguf", lambda part: quantize(f32, part, kind))


def qwen05_config():
    return transformers.Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def write_gguf(model, path):
    """The model as a Q8_0 GGUF. Its vocabulary is the 256 bytes, one merge of two and names for the rest: enough for
    rows that are token ids already."""
    cfg = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_type("model")
    writer.add_name("Random weights in the shape of Qwen2.5-0.5B")
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_head_count_kv(cfg.num_key_value_heads)
    writer.add_rope_freq_base(cfg.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    words = [*sorted(transformers.convert_slow_tokenizer.bytes_to_unicode().values()), "ab"]
    names = [f"<|{i}|>" for i in range(len(words), cfg.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(words + names)
    kinds = [gguf.TokenType.NORMAL] * len(words) + [gguf.TokenType.CONTROL] * len(names)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(len(words))
    writer.add_eos_token_id(len(words))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    for name, value in model.state_dict().items():
        value = value.float().numpy()
        if name == "lm_head.weight":
            continue  # tied to the embedding
        if value.ndim == 1:
            writer.add_tensor(gguf_name(name), value)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(value, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare_qwen05():
    folder, q8_0 = (MODELS / name for name in MODEL_FILES["qwen05"])

    def make_folder(part):
        transformers.set_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(qwen05_config(), dtype=torch.float32)
        model.to(torch.bfloat16).save_pretrained(part)

    once(folder, make_folder)
    load = transformers.AutoModelForCausalLM.from_pretrained
    once(q8_0, lambda part: write_gguf(load(folder, dtype=torch.bfloat16), part))


def main():
    kinds = {"smollm2": prepare_smollm2, "qwen05": prepare_qwen05}
    if unknown := set(sys.argv[1:]) - kinds.keys():
        sys.exit(f"no {', '.join(unknown)}; there are {', '.join(kinds)}")
    MODELS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or kinds:
        kinds[name]()


if __name__ == "__main__":
    main()
