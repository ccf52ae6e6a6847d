"""LoRA steps of PyTorch + PEFT, as a short script of its own would do them: the peer of sft.py and startup.py.

    python3 peft_sft.py --model FOLDER --rows ROWS.jsonl --batch 4 --steps 5 [--checkpointing] [--bnb] [--bf16]

Rows of `input_ids` and `labels`, all of one length, in the order of the file. float32, attention by
torch's sdpa, r=16 on every linear layer, AdamW, gradients clipped to norm 1. With --bnb the frozen weights
are bitsandbytes' NF4 with double quantization, computed in float32; with --bf16 weights and activations are
bfloat16. Writes "training" to stderr before the first step; prints the steps as JSON.
"""

import argparse
import json
import os
import sys
import time

import peft
import torch
import transformers

from common import LEARNING_RATE, TARGETS, THREADS


def load_model(args):
    quantization = {}
    if args.bnb:
        quantization["device_map"] = {"": "cpu"}
        quantization["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if args.bf16 else torch.float32, attn_implementation="sdpa", **quantization
    )
    model.config.use_cache = False
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS)
    return peft.get_peft_model(model, lora).train()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--bnb", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    rows = [json.loads(line) for line in open(args.rows)]
    ids = torch.tensor([row["input_ids"] for row in rows]).split(args.batch)
    labels = torch.tensor([row["labels"] for row in rows]).split(args.batch)
    model = load_model(args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def step(i):
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids[i], labels=labels[i]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()  # the graph goes with `loss`: kept until the next forward pass it costs 1 GB

    print("training", file=sys.stderr, flush=True)
    seconds, cpu_seconds, losses = [], [], []
    for i in range(args.steps):
        start, cpu_start = time.perf_counter(), sum(os.times()[:2])
        losses.append(step(i))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(sum(os.times()[:2]) - cpu_start)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}))


if __name__ == "__main__":
    main()
