"""Full-parameter steps of PyTorch with transformers, as a short script of its own would do them: the peer of pretrain.py.

    python3 hf_pretrain.py --config CONFIG.json --batch 16 --length 256 --steps 8 [--compile | --bf16]

Random token ids; float32, attention by torch's sdpa, AdamW with weight decay, gradients clipped to norm 1. Prints the
steps as JSON.
"""

import argparse
import json
import os
import time

import torch
import transformers

from common import THREADS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = transformers.LlamaConfig.from_json_file(args.config)
    config.use_cache = False
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").train()
    ids = torch.randint(0, config.vocab_size, (args.steps, args.batch, args.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.1)
    forward = torch.compile(model) if args.compile else model

    def step(i):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            loss = forward(input_ids=ids[i], labels=ids[i]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    seconds, cpu_seconds, losses = [], [], []
    for i in range(args.steps):
        start, cpu_start = time.perf_counter(), sum(os.times()[:2])
        losses.append(step(i))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(sum(os.times()[:2]) - cpu_start)
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses}))


if __name__ == "__main__":
    main()
