"""LoRA steps of TRL's RewardTrainer or DPOTrainer + PEFT in float32: the peer of pairs.py.

    python3 trl_pairs.py reward|dpo --model FOLDER --rows ROWS.jsonl --batch 4 --steps 10 [--checkpointing]

Rows of `prompt`, `chosen` and `rejected` as text, in the order of the file. DPO's reference is the model with its adapter
switched off, asked in each step: TRL's default. What else is set is the work (rank, optimizer, no bf16), not the way it
is done. A step lasts from the end of the one before to its own end. Prints the steps as JSON; "losses" are TRL's logs.
"""

import argparse
import json

import datasets
import peft
import torch
import transformers
import trl

from common import LEARNING_RATE, TARGETS, THREADS, differences, fresh
from trl_sft import Clock


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=["reward", "dpo"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    settings = {
        "output_dir": str(fresh("trl")),
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": args.checkpointing,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }
    make_trainer, make_config, load, task, extras = {
        "reward": (
            trl.RewardTrainer,
            trl.RewardConfig,
            transformers.AutoModelForSequenceClassification,
            "SEQ_CLS",
            {"num_labels": 1},
        ),
        "dpo": (trl.DPOTrainer, trl.DPOConfig, transformers.AutoModelForCausalLM, "CAUSAL_LM", {}),
    }[args.objective]
    tokenizer, clock = transformers.AutoTokenizer.from_pretrained(args.model), Clock()
    tokenizer.pad_token = "<|endoftext|>"  # the score is read at EOS, so padding must be something else
    trainer = make_trainer(
        model=load.from_pretrained(args.model, dtype=torch.float32, **extras),
        args=make_config(**settings),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in open(args.rows)]),
        peft_config=peft.LoraConfig(
            task_type=task, r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS
        ),
        callbacks=[clock],
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    steps = {"seconds": differences(clock.seconds), "cpu_seconds": differences(clock.cpu_seconds)}
    print(json.dumps({**steps, "losses": logs}))


if __name__ == "__main__":
    main()
