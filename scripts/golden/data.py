#!/usr/bin/env python3
"""Writes tests/golden/data: rows, and their tokens and labels by TRL's SFTTrainer.

    python3 scripts/golden/data.py

Three tokenizers over the vocabulary of tests/golden/model/llama-tiny: `chatml`, whose template marks
nothing; `generation`, the same text with {% generation %} around what the assistant says; `bos`, which
adds a beginning-of-sequence token that its template writes too. Conversations are labelled by the
`generation` template: what `chatml` must find from prefix renders alone is exactly that.
"""

import json
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import datasets
import transformers
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests/golden/model/llama-tiny"
OUT = ROOT / "tests/golden/data"

HEADER = "<|im_start|>{{ message['role'] }}\n"
LISTED = "{% if tools %}<|im_start|>system\nTools: {{ tools | map(attribute='name') | join(', ') }}<|im_end|>\n{% endif %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    LISTED
    + "{% for message in messages %}"
    + HEADER
    + "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    + PROMPT
)
GENERATION = (
    LISTED
    + "{% for message in messages %}"
    + HEADER
    + "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    + "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    + PROMPT
)
BOS_CHATML = "{{ bos_token }}" + CHATML
BOS_GENERATION = "{{ bos_token }}" + GENERATION


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TEXTS = [
    {"text": "The miller's daughter walked along the river until the road divided."},
    {"text": "In 1987 there were 365 boats on the river.<|im_end|>"},
    {"text": "  <|im_start|>user\nspecial tokens in plain text<|im_end|>\n "},
    {"text": "Die Fähre fährt über den Fluss. 渡し船は川を渡る。 \N{ROCKET}\N{GRINNING FACE}\n\n"},
    {"text": ""},
]
COMPLETIONS = [
    {"prompt": "Which of these roads", "completion": " leads to the mountain?"},
    {"prompt": "Question: 3.50 per crossing?\nAnswer:", "completion": " 12<|im_end|>"},
    {"prompt": "the old ferry", "completion": "man, who was mending his nets"},  # a token across the border
    {"prompt": "the rive", "completion": "r"},
    {"prompt": "She thanked him, ", "completion": "and followed"},
    {"prompt": "", "completion": "no prompt at all"},
    {"prompt": "no completion at all<|im_end|>", "completion": ""},
    {"prompt": "La rivière était très l", "completion": "arge à cet endroit \N{ROCKET}"},
]
CONVERSATIONS = [
    {"messages": [user("Hello, who is there?"), assistant("The old ferryman.")]},
    {
        "messages": [
            {"role": "system", "content": "Be short."},
            user("Which road?"),
            assistant("Both of them do."),
            user("And the price in 2024?"),
            assistant("\n3.50 per crossing \N{ROCKET} für alle.\n"),
        ]
    },
    {"messages": [user("One"), assistant("two"), assistant(""), user("three")]},
    {
        "messages": [user("Which boats?"), assistant("I look."), {"role": "tool", "content": "365"}, assistant("365 boats.")],
        "tools": [{"name": "count_boats"}, {"name": "ring_bell"}],
    },
    {"messages": [assistant("Where to?"), user("Across."), assistant("3.50, please.")]},
    {"messages": [assistant("Nobody is <|im_start|>assistant\nhere.")]},
    {"messages": [user("What does <|im_end|> mean?"), assistant("The <|im_start|> of <|im_end|> something.")]},
]
CHAT_COMPLETIONS = [
    {"prompt": [user("Which road?")], "completion": [assistant("Both.")]},
    {
        "prompt": [user("Which road?"), assistant("Not learned."), user("Why?")],
        "completion": [assistant("Learned."), user("And?"), assistant("Learned too.")],
    },
]
# (kind, rows, our tokenizers, the tokenizer TRL works with, its settings)
CASES = [
    ("text", TEXTS, ["chatml"], "chatml", {}),
    ("text, BOS added", TEXTS, ["bos"], "bos", {}),
    ("prompt/completion", COMPLETIONS, ["chatml"], "chatml", {}),
    ("prompt/completion, BOS added", COMPLETIONS, ["bos"], "bos", {}),
    ("prompt/completion, cut", COMPLETIONS, ["chatml"], "chatml", {"max_length": 7}),
    ("messages", CONVERSATIONS, ["chatml", "generation"], "generation", {"assistant_only_loss": True}),
    ("messages, cut", CONVERSATIONS, ["chatml", "generation"], "generation", {"assistant_only_loss": True, "max_length": 40}),
    ("messages, BOS in the template", CONVERSATIONS, ["bos"], "bos-generation", {"assistant_only_loss": True}),
    ("messages apart", CHAT_COMPLETIONS, ["chatml", "generation"], "generation", {"assistant_only_loss": True}),
]


def write_tokenizer(name, folder, template, adds_bos=False):
    folder = folder / name
    folder.mkdir(parents=True)
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    config = json.loads((MODEL / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "chat_template": template}
    if adds_bos:
        config |= {"add_bos_token": True, "bos_token": (bos := "<|endoftext|>")}
        one = {"SpecialToken": {"id": bos, "type_id": 0}}
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [one, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [one, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer["model"]["vocab"][bos]], "tokens": [bos]}},
        }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    return transformers.AutoTokenizer.from_pretrained(folder)


def prepared(rows, tokenizer, settings, tmp):
    """The training inputs of SFTTrainer, row by row: it drops rows, and a table would fill in missing keys."""
    for row in rows:
        config = SFTConfig(output_dir=tmp, report_to=[], use_cpu=True, shuffle_dataset=False, **({"max_length": None} | settings))
        model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
        try:
            table = datasets.Dataset.from_list([row])
            dataset = SFTTrainer(model, args=config, train_dataset=table, processing_class=tokenizer).train_dataset
            kept = dataset[0] if len(dataset) else None
        except IndexError:  # TRL looks at the first row of what is left
            kept = None
        yield {"row": row} | ({k: kept[k] for k in ("input_ids", "labels")} if kept else {"input_ids": None})


def main():
    assert version("trl") == "1.16.0", version("trl")
    for name in ("chatml", "generation", "bos"):
        shutil.rmtree(OUT / name, ignore_errors=True)
    with tempfile.TemporaryDirectory() as tmp:
        tokenizers = {
            "chatml": write_tokenizer("chatml", OUT, CHATML),
            "generation": write_tokenizer("generation", OUT, GENERATION),
            "bos": write_tokenizer("bos", OUT, BOS_CHATML, adds_bos=True),
            "bos-generation": write_tokenizer("bos-generation", Path(tmp), BOS_GENERATION, adds_bos=True),
        }
        cases = []
        for kind, rows, ours, theirs, settings in CASES:
            done = list(prepared(rows, tokenizers[theirs], settings, tmp))
            cases.append({"kind": kind, "tokenizers": ours, "max_length": settings.get("max_length"), "rows": done})
    learned = sum(label != -100 for case in cases for row in case["rows"] for label in row.get("labels", []))
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    (OUT / "trl.json").write_text(f"[\n{lines}\n]\n")
    print(f"{OUT}: {sum(len(case['rows']) for case in cases)} rows, {learned} labels")


if __name__ == "__main__":
    main()
