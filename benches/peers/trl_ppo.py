"""Updates of TRL 1.0.0's PPOTrainer + PEFT in float32: the peer of ppo.py.

    TRL_PPO=DIR python3 trl_ppo.py --model FOLDER --rows PROMPTS.jsonl --batch 8 --updates 3 --epochs 4 --response 32 \
        --learning-rate 1e-5 [--lora-value]

TRL_PPO is the folder TRL 1.0.0 was installed into, the last version with PPO. Policy, reward and value model are the
same checkpoint three times; the policy has an adapter, which is switched off for the reference; the value model is
trained whole, or has an adapter of its own. An update lasts from the end of the one before to its own end. Prints the updates as JSON; "losses" are
TRL's logs.
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.environ["TRL_PPO"])
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import datasets
import peft
import torch
import transformers
from trl.experimental.ppo import PPOConfig, PPOTrainer

from common import TARGETS, THREADS, differences, fresh
from trl_sft import Clock


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--updates", type=int, required=True)
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--response", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--lora-value", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    tokenizer, clock = transformers.AutoTokenizer.from_pretrained(args.model, padding_side="left"), Clock()
    tokenizer.pad_token = "<|endoftext|>"  # what TRL takes for padding must not be EOS
    policy = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    scoring = transformers.AutoModelForSequenceClassification
    reward, value = (scoring.from_pretrained(args.model, num_labels=1, dtype=torch.float32) for _ in range(2))
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": TARGETS}
    if args.lora_value:
        # the class that TRL looks for, with PEFT's layers and its trained copy of the head in it
        value = peft.get_peft_model(value, peft.LoraConfig(task_type="SEQ_CLS", **lora)).get_base_model()
    rows = [{"input_ids": tokenizer(json.loads(line)["prompt"]).input_ids} for line in open(args.rows)]
    config = PPOConfig(
        output_dir=str(fresh("trl")),
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=args.epochs,
        total_episodes=args.batch * args.updates,
        response_length=args.response,
        local_rollout_forward_batch_size=args.batch,
        learning_rate=args.learning_rate,
        lr_scheduler_type="constant",
        stop_token="eos",
        missing_eos_penalty=1.0,
        temperature=0.7,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        num_sample_generations=0,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora),
        callbacks=[clock],
    )
    trainer.train()
    steps = {"seconds": differences(clock.seconds), "cpu_seconds": differences(clock.cpu_seconds)}
    print(json.dumps({**steps, "losses": trainer.state.log_history}))


if __name__ == "__main__":
    main()
