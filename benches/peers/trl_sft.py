"""LoRA steps of TRL's SFTTrainer + PEFT in float32: the peer of chats.py.

    python3 trl_sft.py --model FOLDER --rows ROWS.jsonl --batch 8 --steps 20 [--checkpointing]

Rows of `input_ids` and `labels`, in the order of the file, padded as the trainer's own collator does by
default: to the longest row of a batch. What else is set is the work (rank, optimizer, no bf16), not the way it
is done. A step lasts from the end of the one before to its own end, data and logging included. Prints the
steps as JSON.
"""

import argparse
import json
import os
import time

import datasets
import peft
import torch
import transformers
import trl

from common import LEARNING_RATE, TARGETS, THREADS, differences, fresh


class Clock(transformers.TrainerCallback):
    """When each step ended."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def look(self):
        self.seconds.append(time.perf_counter())
        self.cpu_seconds.append(sum(os.times()[:2]))

    def on_train_begin(self, *_args, **_kw):
        self.look()

    def on_step_end(self, *_args, **_kw):
        self.look()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    config = trl.SFTConfig(
        output_dir=str(fresh("trl")),
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        gradient_checkpointing=args.checkpointing,
        bf16=False,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    rows, clock = [json.loads(line) for line in open(args.rows)], Clock()
    trainer = trl.SFTTrainer(
        model=args.model,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS
        ),
        callbacks=[clock],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = {"seconds": differences(clock.seconds), "cpu_seconds": differences(clock.cpu_seconds)}
    print(json.dumps({**steps, "losses": losses}))


if __name__ == "__main__":
    main()
