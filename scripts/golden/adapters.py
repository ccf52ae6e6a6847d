"""Goldens of the adapters crate, from PEFT itself on tiny random Llamas.

    PYTHONHASHSEED=0 python scripts/golden/adapters.py   writes tests/golden/adapters/
    python scripts/golden/adapters.py --check FOLDER     loads a folder our test wrote
                                                              (target/tmp/adapter_for_peft) in PEFT

Seeds are fixed (the hash seed too: PEFT saves sets); nothing is downloaded.
"""

import argparse
import json
import shutil
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden/adapters"
assert peft.__version__ == "0.21.2", f"peft {peft.__version__}, the goldens are made by 0.21.2"
warnings.simplefilter("ignore")


def llama(layers):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=16,
            tie_word_embeddings=False,
        )
    )


def lora_layers(model):
    """(module path, PEFT's layer) in the model's order."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            yield name.removeprefix("base_model.model."), module


# What follows is given to PEFT's LoraConfig and, as JSON, to ours.
MATCHING = [
    {"target_modules": "all-linear"},
    {"target_modules": "ALL-Linear", "r": 3, "lora_alpha": 7},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.3.mlp.up_proj"]},
    {"target_modules": "all-linear", "exclude_modules": r".*\.(1|10)\..*"},
    {"target_modules": "all-linear", "exclude_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": "proj"},
    {"target_modules": "all-linear", "exclude_modules": []},
    {"target_modules": ["q_proj"]},
    {"target_modules": ["lm_head"]},
    {"target_modules": ["lm_head", "v_proj"]},
    {"target_modules": ["_proj"]},
    {"target_modules": ["self_attn.q_proj", "1.mlp.up_proj"]},
    {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "no_such_proj"]},
    {"target_modules": ["no_such_proj"]},
    {"target_modules": []},
    {"target_modules": ["all-linear"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": r".*\.[qk]_proj"},
    {"target_modules": r"[qk]_proj"},
    {"target_modules": r"model\.layers\.\d\.mlp\.(up|down)_proj"},
    {"target_modules": r"^(?!.*self_attn).*_proj$"},
    {"target_modules": r".*(?<=self_attn)\.o_proj|lm_head"},
    {"target_modules": r".*\.(\w)_proj"},
    {"target_modules": r"(?i).*\.Q_PROJ"},
    {"target_modules": r"(?P<a>.*)\.k_proj"},
    {"target_modules": "(", "r": 2},
    {"target_modules": ".*q_proj)|(.*k_proj"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2, 11]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj"], "layers_to_transform": [99]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 10], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 10], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "model.layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "ayers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ""},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "layers|h"},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": ["model", "layers|h", "layers"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "(h|layers)"},
    # A whole path is a target whatever its layer.
    {"target_modules": ["model.layers.2.self_attn.q_proj", "k_proj"], "layers_to_transform": [1]},
    {"target_modules": ["self_attn.q_proj", "lm_head"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    {"target_modules": r".*q_proj", "layers_to_transform": [1]},
    {"target_modules": r".*q_proj", "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "lora_alpha": 16},
    {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"v_proj": 5}},
    {"target_modules": "all-linear", "rank_pattern": {"proj": 2, ".*_proj": 3}},
    {"target_modules": "all-linear", "rank_pattern": {"1.mlp.up_proj": 2, "up_proj": 3, "mlp.*": 5}},
    {"target_modules": "all-linear", "rank_pattern": {"^model.layers.1.*": 2, r"layers\.1.*": 3}},
    {"target_modules": "all-linear", "rank_pattern": {"q_proj|lm_head": 2}, "use_rslora": True},
    {"target_modules": "all-linear", "rank_pattern": {"(?!q)._proj": 2}, "alpha_pattern": {"[qk]_proj": 3}},
    {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
    {"target_modules": ["q_proj"], "r": 4, "lora_alpha": 6, "use_rslora": True},
    {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 0.5},
    {"target_modules": ["q_proj"], "r": 0},
    {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}},
]


def matching():
    cases = []
    for given in MATCHING:
        try:
            layers = lora_layers(get_peft_model(llama(12), LoraConfig(**given)))
            made = [[n, m.r["default"], m.scaling["default"]] for n, m in layers]
            case = {"config": given, "modules": made}
        except Exception as error:
            assert not isinstance(error, (NameError, AttributeError)), error
            case = {"config": given, "error": f"{type(error).__name__}: {error}"[:120]}
        case["config"] = {"peft_type": "LORA", **given}
        cases.append(case)
    table = {"peft": peft.__version__, "linears": linears(12), "head": "lm_head", "cases": cases}
    lines = ",\n".join(json.dumps(case) for case in table.pop("cases"))
    text = json.dumps(table)[:-1] + ', "cases": [\n' + lines + "\n]}\n"
    (GOLDEN / "matching.json").write_text(text)


def linears(layers):
    modules = llama(layers).named_modules()
    is_linear = lambda m: isinstance(m, torch.nn.Linear)
    return [[n, m.in_features, m.out_features] for n, m in modules if is_linear(m)]


def saved():
    """A folder saved by PEFT, and the outputs of its updates for random activations."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear",
        exclude_modules=["o_proj"],
        rank_pattern={"k_proj": 2, r"layers\.1\..*\.up_proj": 1},
        alpha_pattern={"v_proj": 0.5},
        use_rslora=True,
        lora_dropout=0.25,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(llama(2), config).eval()
    folder = GOLDEN / "saved_by_peft"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    tensors = {}
    for name, layer in lora_layers(model):
        x = torch.randn(3, layer.in_features)
        tensors[f"{name}.x"] = x
        tensors[f"{name}.y"] = delta(layer, x)
    save_file(tensors, GOLDEN / "saved_by_peft_deltas.safetensors")


def delta(layer, x):
    """The output of the adapter alone: PEFT's layer minus its base."""
    with torch.no_grad():
        return layer(x) - layer.base_layer(x)


def check(folder):
    base = llama(2)
    model = PeftModel.from_pretrained(base, folder).eval()
    known = load_file(Path(folder) / "deltas.safetensors")
    layers = dict(lora_layers(model))
    assert layers.keys() == {key[:-2] for key in known}, "PEFT made other modules"
    worst = 0.0
    for name, layer in layers.items():
        y = known[f"{name}.y"]
        assert y.abs().max() > 1e-3, f"{name}: the adapter does nothing"
        worst = max(worst, (delta(layer, known[f"{name}.x"]) - y).abs().max().item())
    print(f"{len(layers)} modules, largest difference {worst:.1e}")
    assert worst < 1e-5


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", metavar="FOLDER")
    folder = arguments.parse_args().check
    if folder:
        check(folder)
    else:
        GOLDEN.mkdir(parents=True, exist_ok=True)
        matching()
        saved()
