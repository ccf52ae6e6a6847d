#!/usr/bin/env python3
"""Writes tests/golden/data/comparisons.json: rows, and the tokens TRL's trainers make of them.

    python3 scripts/golden/data_comparisons.py

RewardTrainer, DPOTrainer (with its collator, which cuts) and KTOTrainer, each row on its own, with the
tokenizers of scripts/golden/data.py. A row that a trainer filters out has no tokens.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import datasets
import transformers
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

OUT = Path(__file__).resolve().parents[2] / "tests/golden/data"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


ROAD = [user("Which road?")]
PAIRS = [
    {"prompt": "Which of these roads", "chosen": " leads to the mountain?", "rejected": " ends here"},
    {"prompt": "Question: 3.50 per crossing?\nAnswer:", "chosen": " 12<|im_end|>", "rejected": " 365 boats"},
    {"prompt": "the old ferry", "chosen": "man, who was mending his nets", "rejected": " boat"},  # a token across one border
    {"prompt": "the rive", "chosen": "r", "rejected": "rs and boats"},
    {"prompt": "", "chosen": "no prompt at all", "rejected": "none"},
    {"prompt": "no answer at all<|im_end|>", "chosen": "", "rejected": "but here"},
    {"prompt": "La rivière était très l", "chosen": "arge à cet endroit \N{ROCKET}", "rejected": "ongue"},
]
CHAT_PAIRS = [
    {"prompt": ROAD, "chosen": [assistant("Both of them do.")], "rejected": [assistant("Neither.")]},
    {
        "prompt": [{"role": "system", "content": "Be short."}, user("Which road?"), assistant("Both."), user("Why?")],
        "chosen": [assistant("They meet.")],
        "rejected": [assistant("I do not know, and nobody told me \N{ROCKET}")],
        "tools": [{"name": "count_boats"}],
    },
    {"prompt": ROAD, "chosen": [assistant("One."), user("Sure?"), assistant("Yes.")], "rejected": [assistant("")]},
]
IMPLICIT = [
    {"chosen": ROAD + [assistant("Both.")], "rejected": ROAD + [assistant("None at all.")]},
    {"chosen": ROAD + [assistant("Both."), user("Why?"), assistant("So.")], "rejected": ROAD + [assistant("Both."), user("Why?"), assistant("Hm.")]},
    {"chosen": ROAD + [assistant("Both."), user("Why?"), assistant("So.")], "rejected": ROAD + [assistant("Both.")]},
    {"chosen": ROAD + [assistant("Both.")], "rejected": ROAD + [assistant("Both.")]},
]
TEXTS = [
    {"chosen": "The miller's daughter walked along the river.", "rejected": "The river."},
    {"chosen": "In 1987 there were 365 boats on the river.<|im_end|>", "rejected": "In 1987 none"},
]
LABELS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"} for pair in PAIRS + CHAT_PAIRS[:1] for side in ["chosen", "rejected"]
]
# A prompt without words makes transformers' chat template a text of its own.
PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS + CHAT_PAIRS if pair["prompt"]]


def one(row):
    return datasets.Dataset.from_list([row])


def settings(max_length):
    return SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")


def reward(row, tokenizer, max_length):
    rows = RewardTrainer._prepare_dataset(SimpleNamespace(), one(row), tokenizer, settings(max_length), "train")
    return [{"sequences": [row["chosen_ids"], row["rejected_ids"]]} for row in rows]


def dpo(row, tokenizer, max_length):
    rows = list(DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), one(row), tokenizer, settings(max_length), "train"))
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode="keep_start")
    for row in rows:
        batch = collator([row])
        lengths = batch["attention_mask"].sum(1).tolist()
        yield {
            "sequences": [ids[:length] for ids, length in zip(batch["input_ids"].tolist(), lengths)],
            "prompt_length": len(row["prompt_ids"]),
        }


def kto(row, tokenizer, max_length):
    stub = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=False, desirable_weight=1.0, undesirable_weight=1.0)
    rows = KTOTrainer._prepare_dataset(stub, one(row), tokenizer, settings(max_length), "eval")
    return [{"sequences": [(row["prompt_ids"] + row["completion_ids"])[:max_length]], "prompt_length": len(row["prompt_ids"])} for row in rows]


def grpo(row, tokenizer, max_length):
    stub = SimpleNamespace(environment_factories=None, processing_class=tokenizer, chat_template=None, chat_template_kwargs={}, _is_vlm=False)
    stub.tools = row.get("tools")
    tokens = GRPOTrainer._tokenize_prompts(stub, [row["prompt"]])
    return [{"sequences": [list(tokens[0][0])]}]


MAKERS = {"reward": reward, "dpo": dpo, "kto": kto, "prompts": grpo}
# (who makes the tokens, rows, tokenizer, max_length)
CASES = [
    *[(maker, PAIRS + CHAT_PAIRS + IMPLICIT, name, None) for maker in ["reward", "dpo"] for name in ["chatml", "bos"]],
    ("reward", TEXTS, "chatml", None),
    ("reward", TEXTS, "bos", None),
    ("reward", PAIRS + CHAT_PAIRS, "chatml", 14),
    ("dpo", PAIRS + CHAT_PAIRS, "chatml", 14),
    ("kto", LABELS, "chatml", None),
    ("kto", LABELS, "bos", None),
    ("kto", LABELS, "chatml", 9),
    ("prompts", PROMPTS, "chatml", None),
    ("prompts", PROMPTS, "bos", None),
]


def main():
    assert version("trl") == "1.16.0", version("trl")
    lines = []
    for maker, rows, name, max_length in CASES:
        tokenizer = transformers.AutoTokenizer.from_pretrained(OUT / name)
        for row in rows:
            try:
                made = list(MAKERS[maker](row, tokenizer, max_length))
            except StopIteration:  # KTOTrainer and the others look at the first row that is left
                made = []
            assert len(made) <= 1, made
            line = {"maker": maker, "tokenizer": name, "max_length": max_length, "row": row} | (made[0] if made else {"sequences": None})
            lines.append(json.dumps(line, ensure_ascii=False))
    (OUT / "comparisons.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
    print(f"{OUT / 'comparisons.json'}: {len(lines)} rows")


if __name__ == "__main__":
    main()
