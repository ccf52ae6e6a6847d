#!/usr/bin/env python3
"""The bar for our reward model: TRL's RewardTrainer on the same pairs, and its accuracy on held-out ones.

    python3 scripts/fetch/sentiment.py
    python3 scripts/check/reward.py --model FOLDER --out DIR        # trains one epoch, then measures
    python3 scripts/check/reward.py --model FOLDER --adapter DIR    # measures an adapter, ours for example

FOLDER is a Hugging Face folder of the base (benches/peers/prepare.py makes one from our GGUF). LoRA r=16 on every
linear layer, 8 pairs a step, learning rate 1e-4 falling to zero, float32. Prints one JSON object. Needs
benches/peers/requirements.txt.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import datasets
import peft
import torch
import transformers
import trl

DATA = Path(__file__).resolve().parents[2] / "data/sentiment"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_rows(path):
    return datasets.Dataset.from_list([json.loads(line) for line in open(path)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", default=DATA / "pairs.train.jsonl")
    parser.add_argument("--heldout", default=DATA / "pairs.heldout.jsonl")
    parser.add_argument("--adapter", help="measure this one, train nothing")
    parser.add_argument("--out", help="where the trained adapter goes")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    # TRL ends each text with EOS. A pad token of its own lets transformers read the score there, not one token earlier.
    tokenizer.pad_token = "<|endoftext|>"
    transformers.set_seed(args.seed)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model = load(args.model, num_labels=1, dtype=torch.float32)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
    if args.adapter:
        model = peft.PeftModel.from_pretrained(model, args.adapter)
    heldout = load_rows(args.heldout)
    # TRL takes the mean of its batches' accuracies, so they have to be of one size
    eval_batch = next(size for size in range(8, 0, -1) if len(heldout) % size == 0)
    with tempfile.TemporaryDirectory() as tmp:
        trainer = trl.RewardTrainer(
            model=model,
            args=trl.RewardConfig(
                output_dir=tmp,
                num_train_epochs=1,
                per_device_train_batch_size=8,
                per_device_eval_batch_size=eval_batch,
                learning_rate=1e-4,
                max_length=512,
                seed=args.seed,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=tokenizer,
            train_dataset=load_rows(args.train),
            eval_dataset=heldout,
            peft_config=None if args.adapter else lora,
        )
        if not args.adapter:
            trainer.train()
        if args.out:
            trainer.save_model(args.out)
        found = trainer.evaluate()
    keys = {"accuracy": "eval_accuracy", "loss": "eval_loss", "margin": "eval_margin", "seconds": "eval_runtime"}
    print(json.dumps({name: found[key] for name, key in keys.items()}))


if __name__ == "__main__":
    main()
