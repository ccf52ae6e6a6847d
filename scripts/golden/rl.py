#!/usr/bin/env python3
"""Writes tests/golden/rl: ten optimizer steps of reward models, DPO, KTO and PPO as TRL takes them, on llama-tiny.

    python3 scripts/golden/rl.py                                   # reward models, DPO, KTO
    PYTHONPATH=target/trl-1.0.0 python3 scripts/golden/rl.py       # PPO, which later versions do not have

Same versions, same bytes. TRL's own loops run, unchanged; their steps are recorded from outside. Only random
parts are replaced: the adapters' initial weights, and PPO's responses.
Each run is repeated in float64 to show that its digits are not rounding noise.
"""

import itertools
import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import accelerate
import datasets
import numpy as np
import peft
import safetensors.torch
import torch
import transformers
import trl

from tiny_models import MODEL, ROOT, assert_versions, write_adapter, write_json

RL = ROOT / "tests/golden/rl"
BASE = "llama-tiny"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# TRL's PPO takes any pad token for padding, and transformers scores the last token that is none: it must not be EOS.
PAD, EOS, VOCAB = 0, 2, 512
STEPS = 10


# --------------------------------------------------------------------- models


def lora_model(task, seed, dtype, std=0.1):
    """The base with an adapter whose B is random too, and, for SEQ_CLS, a random score head in it."""
    load = {"CAUSAL_LM": transformers.AutoModelForCausalLM, "SEQ_CLS": transformers.AutoModelForSequenceClassification}
    extras = {"num_labels": 1} if task == "SEQ_CLS" else {}
    # transformers' eager attention makes NaN of float64's padding: its mask is -inf in the float32 of its softmax
    attention = "eager" if dtype == torch.float32 else "sdpa"
    model = load[task].from_pretrained(MODEL / BASE, dtype=dtype, attn_implementation=attention, **extras)
    model.config.pad_token_id = PAD
    model = peft.get_peft_model(model, lora_config(task), autocast_adapter_dtype=False)
    randomize(model, seed, std)
    return model


def lora_config(task):
    return peft.LoraConfig(task_type=task, r=4, lora_alpha=8, lora_dropout=0.0, target_modules=TARGETS)


def randomize(model, seed, std):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                scale = 0.03 if "score" in name else std
                p.copy_(torch.from_numpy((rng.standard_normal(p.shape) * scale).astype(np.float32)))


def tokenizer(padding_side):
    tok = transformers.AutoTokenizer.from_pretrained(MODEL / BASE, padding_side=padding_side)
    tok.pad_token = "<|endoftext|>"
    assert (tok.pad_token_id, tok.eos_token_id) == (PAD, EOS)
    return tok


def trainable(model):
    """Names as save_pretrained writes them -> parameters."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(".modules_to_save", "").replace(".default", ""): p for name, p in named}


def gradients(params):
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in params.values())
    return {name: p.grad.clone() for name, p in params.items()}


def norm(params):
    return float(sum(p.grad.double().square().sum() for p in params) ** 0.5)


# ----------------------------------------------------------------------- rows


def tokens(rng, low, high):
    return rng.integers(3, VOCAB, int(rng.integers(low, high + 1))).tolist()


def response(rng, good):
    """Better responses have more low ids, so that there is something to learn; two in three end with EOS."""
    ids = rng.integers(3, VOCAB, int(rng.integers(2, 17)))
    low = rng.random(len(ids)) < (0.7 if good else 0.3)
    ids = np.where(low, 3 + ids % 100, ids)
    return ids.tolist() + [EOS] * int(rng.random() < 2 / 3)


def preference_rows(seed, margins):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(STEPS * 4):
        prompt = tokens(rng, 1, 10)
        row = {"chosen_ids": prompt + response(rng, True), "rejected_ids": prompt + response(rng, False)}
        if margins:
            row["margin"] = round(float(rng.uniform(0, 2)), 3)
        rows.append(row)
    return rows


def ranked_rows(seed):
    """Two prompts a step, four responses each, the best first."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(STEPS * 2):
        prompt = tokens(rng, 1, 10)
        responses = [response(rng, good) for good in (True, True, False, False)]
        rows.append({"prompt_ids": prompt, "responses_ids": responses})
    return rows


def dpo_rows(seed):
    rng = np.random.default_rng(seed)
    return [
        {"prompt_ids": tokens(rng, 1, 10), "chosen_ids": response(rng, True), "rejected_ids": response(rng, False)}
        for _ in range(STEPS * 4)
    ]


def kto_rows(seed):
    """Labelled responses, each paired with that of the previous row in its batch for the KL term, as in TRL."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(STEPS * 4):
        good = i % 4 in (0, 2) or i % 8 == 1
        rows.append({"prompt_ids": tokens(rng, 1, 10), "completion_ids": response(rng, good), "label": good})
    for i, row in enumerate(rows):
        row["KL_completion_ids"] = rows[i - 1 if i % 4 else i + 3]["completion_ids"]
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------- training

TRAIN_ARGS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
}
UNCLIPPED = {"lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.1, "max_grad_norm": 0.0}
# How it is done, of no influence on the numbers.
MANNER = {
    "optim": "adamw_torch",
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
}


def drive(trainer):
    """Trains; returns what TRL logged of each step, and the first step's gradients before clipping."""
    params, first, norms = trainable(trainer.model), {}, []
    inner = trainer.training_step

    def training_step(*args, **kw):
        loss = inner(*args, **kw)
        norms.append(norm(params.values()))
        if len(norms) == 1:
            first.update(gradients(params))
        return loss

    trainer.training_step = training_step
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, grad_norm in zip(steps, norms, strict=True):
        # not measured by transformers where nothing is clipped
        assert abs(step.get("grad_norm", grad_norm) / grad_norm - 1) < 1e-4
        step["grad_norm"] = grad_norm
        del step["epoch"], step["step"]
    return steps, first


def reward_run(folder, dtype, rows, args, seed):
    with tempfile.TemporaryDirectory() as tmp:
        trainer = trl.RewardTrainer(
            model=lora_model("SEQ_CLS", seed, dtype),
            args=trl.RewardConfig(output_dir=tmp, train_sampling_strategy="sequential", **args, **MANNER),
            processing_class=tokenizer("right"),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        if folder:
            write_adapter(folder / "initial", trainer.model, BASE)
        return trainer.model, *drive(trainer)


def score(model, ids):
    """The hidden state of a row's last token, which the head reads; without padding."""
    backbone = model.get_base_model()
    return backbone.score(backbone.model(torch.tensor([ids])).last_hidden_state[0, -1])[0]


def ranked_run(folder, dtype, rows, args, seed):
    """InstructGPT's loss: all pairs of a prompt's responses, each weighted by one over their number. TRL has only pairs,
    so this is torch and PEFT, row by row."""
    model = lora_model("SEQ_CLS", seed, dtype)
    if folder:
        write_adapter(folder / "initial", model, BASE)
    params, first, steps = trainable(model), {}, []
    betas = (args["adam_beta1"], args["adam_beta2"])
    opt = torch.optim.AdamW(
        params.values(), lr=args["learning_rate"], betas=betas, eps=args["adam_epsilon"], weight_decay=args["weight_decay"]
    )
    schedule = transformers.get_scheduler(args["lr_scheduler_type"], opt, args["warmup_steps"], args["max_steps"])
    for i in range(args["max_steps"]):
        n, losses, differences = args["per_device_train_batch_size"], [], []
        for row in rows[i * n : (i + 1) * n]:
            scores = [score(model, row["prompt_ids"] + ids) for ids in row["responses_ids"]]
            difference = torch.stack([better - worse for better, worse in itertools.combinations(scores, 2)])
            losses.append(-torch.nn.functional.logsigmoid(difference).mean())
            differences.append(difference.detach())
        loss = torch.stack(losses).mean()
        loss.backward()
        if i == 0:
            first = gradients(params)
        grad_norm = norm(params.values())
        torch.nn.utils.clip_grad_norm_(params.values(), args["max_grad_norm"])
        rate = schedule.get_last_lr()[0]
        opt.step(), schedule.step(), opt.zero_grad()
        differences = torch.cat(differences)
        step = {"loss": loss.item(), "grad_norm": grad_norm, "learning_rate": rate}
        steps.append({**step, "accuracy": (differences > 0).float().mean().item(), "margin": differences.mean().item()})
    return model, steps, first


def with_ids(trainer):
    """The trainer for rows that are token ids already."""
    return type("Ids", (trainer,), {"_prepare_dataset": lambda self, dataset, *_args: dataset})


def preference_trainer(trainer, config, dtype, rows, args, seed, folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL / BASE, dtype=dtype, attn_implementation="eager")
    made = with_ids(trainer)(
        model=model,
        args=config(output_dir=folder, train_sampling_strategy="sequential", **args, **MANNER),
        processing_class=tokenizer("right"),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=lora_config("CAUSAL_LM"),  # given so, the reference is the base: the adapter switched off
    )
    randomize(made.model, seed, 0.1)
    return made


def preference_run(trainer, config):
    def run(folder, dtype, rows, args, seed):
        with tempfile.TemporaryDirectory() as tmp:
            made = preference_trainer(trainer, config, dtype, rows, args, seed, tmp)
            if folder:
                write_adapter(folder / "initial", made.model, BASE)
            return made.model, *drive(made)

    return run


def other_losses(rows, args, seed):
    """The first step's loss and gradient norm under DPO's other forms, and under losses without a reference."""
    changes = {
        "hinge": {"loss_type": ["hinge"]},
        "ipo": {"loss_type": ["ipo"]},
        "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    }
    found = {}
    for name, change in changes.items():
        with tempfile.TemporaryDirectory() as tmp:
            settings = {**args, **change, "max_steps": 1}
            trainer = preference_trainer(trl.DPOTrainer, trl.DPOConfig, torch.float32, rows, settings, seed, tmp)
            ((step,), _) = drive(trainer)
            found[name] = {**change, "loss": step["loss"], "grad_norm": step["grad_norm"]}
    rows = rows[: args["per_device_train_batch_size"]]
    for name, loss_of in (("simpo", simpo_loss), ("orpo", orpo_loss)):
        model = lora_model("CAUSAL_LM", seed, torch.float32)
        settings, loss = loss_of(model, rows)
        loss.backward()
        found[name] = {**settings, "loss": loss.item(), "grad_norm": norm(trainable(model).values())}
    return found


def token_logps(model, prompt, ids):
    """Log-probs of all tokens but the first, and from which on they are the response's."""
    both = torch.tensor(prompt + ids)
    logits = model(both[None]).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(1, both[1:, None])[:, 0], len(prompt) - 1


def mean_logps(model, rows, side):
    """Per token of the response. (rows)"""
    both = (token_logps(model, row["prompt_ids"], row[f"{side}_ids"]) for row in rows)
    return torch.stack([logps[start:].mean() for logps, start in both])


def simpo_loss(model, rows):
    """TRL's function on torch's log-probs: its trainer takes text only."""
    from trl.experimental.cpo import CPOTrainer

    settings = {"beta": 2.0, "simpo_gamma": 0.5, "label_smoothing": 0.1}
    on = SimpleNamespace(**settings, loss_type="simpo", alpha=0.0, accelerator=accelerate.Accelerator(cpu=True))
    sides = (mean_logps(model, rows, side) for side in ("chosen", "rejected"))
    return settings, CPOTrainer.cpo_loss(on, *sides)[0].mean()


def orpo_loss(model, rows):
    """As simpo_loss. The likelihood is of prompt and response, over all tokens of the batch."""
    from trl.experimental.orpo import ORPOTrainer

    settings = {"beta": 0.1}
    on = SimpleNamespace(**settings, accelerator=accelerate.Accelerator(cpu=True))
    sides = (mean_logps(model, rows, side) for side in ("chosen", "rejected"))
    chosen = torch.cat([token_logps(model, row["prompt_ids"], row["chosen_ids"])[0] for row in rows])
    return settings, -chosen.mean() - ORPOTrainer.odds_ratio_loss(on, *sides)[0].mean()


@torch.inference_mode()
def reference_logps(rows):
    """TRL's columns of log-probs summed over a response under the base, each row by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL / BASE, dtype=torch.float32, attn_implementation="eager")
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = row["prompt_ids"] + row[f"{side}_ids"]
            logps = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)
            picked = logps.gather(1, torch.tensor(ids[1:])[:, None])[len(row["prompt_ids"]) - 1 :]
            row[f"ref_{side}_logps"] = picked.sum().item()


def far(a, b):
    """The greatest difference of two lists of steps, over all their numbers, relative above 1."""
    assert [step.keys() for step in a] == [step.keys() for step in b]
    return max(abs(x[key] - y[key]) / max(1, abs(y[key])) for x, y in zip(a, b) for key in x)


def adapters_apart(model, exact):
    pairs = zip(trainable(model).values(), trainable(exact).values(), strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def make_run(name, run, rows, args, seed, **more):
    folder = RL / name
    folder.mkdir()
    model, steps, first = run(folder, torch.float32, rows, args, seed)
    write_adapter(folder / "final", model, BASE)
    exact, exact_steps, _ = run(None, torch.float64, rows, args, seed)
    noise, apart = far(steps, exact_steps), adapters_apart(model, exact)
    norms, losses = [s["grad_norm"] for s in steps], [s["loss"] for s in steps]
    print(
        f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, grad_norm {min(norms):.2f} to {max(norms):.2f}, float32 noise"
        f" {noise:.1e} in the steps, {apart:.1e} in the adapter"
    )
    assert noise < 2e-5 and apart < 1e-4
    write_rows(folder / "rows.jsonl", rows)
    write_json(folder / "run.json", {"base": BASE, **args, **more, "steps": steps})
    safetensors.torch.save_file(dict(sorted(first.items())), folder / "gradients.safetensors")


def make_preferences():
    args = {**TRAIN_ARGS, "max_length": None}
    make_run("reward", reward_run, preference_rows(31, False), args, 21)
    make_run(
        "reward-margin",
        reward_run,
        preference_rows(32, True),
        {**args, **UNCLIPPED, "center_rewards_coefficient": 0.01},
        22,
    )
    make_run("reward-ranked", ranked_run, ranked_rows(33), {**TRAIN_ARGS, "per_device_train_batch_size": 2}, 23)
    rows, args = dpo_rows(34), {**args, "beta": 0.1, "loss_type": ["sigmoid"]}
    others = other_losses(rows, args, 24)
    written = [dict(row) for row in rows]
    reference_logps(written)
    make_run("dpo", preference_run(trl.DPOTrainer, trl.DPOConfig), rows, args, 24, first_step=others)
    write_rows(RL / "dpo/rows.jsonl", written)
    args = {**TRAIN_ARGS, "max_length": None, "beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.8}
    make_run("kto", preference_run(trl.KTOTrainer, trl.KTOConfig), kto_rows(35), args, 27)


# ------------------------------------------------------------------------ PPO

RESPONSE_LENGTH = 12
PPO_ARGS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-6,  # keeps the rounding noise of next to no gradient small
    "weight_decay": 0.01,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "response_length": RESPONSE_LENGTH,
    "stop_token": "eos",
    "missing_eos_penalty": 1.0,
    "temperature": 0.7,
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
}
UPDATES = 5
# Of an update, in the order of its rows. (B) or (B, response_length)
KEPT = ["scores", "logprobs", "ref_logprobs", "values", "kl", "rewards", "advantages", "returns"]
MASKS = ["padding_mask", "padding_mask_p1"]


def planned_ends(rng, update, rows):
    """Where a response says EOS (B): every fourth one never; first, last and other positions all occur."""
    ends = rng.integers(1, RESPONSE_LENGTH - 1, rows)
    ends[3::4] = RESPONSE_LENGTH
    ends[0] = 0 if update == 0 else ends[0]
    ends[1] = RESPONSE_LENGTH - 1 if update in (0, 3) else ends[1]
    return ends


@torch.no_grad()
def sample(forward, policy, queries, ends, temperature, rng):
    """Responses (B, response_length) drawn from the policy, EOS where planned, PAD from there on."""
    sequence = queries
    for position in range(RESPONSE_LENGTH):
        logits = forward(policy, sequence, PAD).logits[:, -1].double().numpy() / temperature
        logits[:, [PAD, EOS]] = -np.inf
        drawn = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
        drawn = np.where(position == ends, EOS, np.where(position > ends, PAD, drawn))
        sequence = torch.cat([sequence, torch.from_numpy(drawn)[:, None]], 1)
    return sequence[:, queries.shape[1] :]


class Notes:
    """What TRL's loop computes, read from its own variables: it keeps them to itself, and a copy of the loop would be
    another program. `stored` are responses of an earlier run to be replayed."""

    def __init__(self, ppo, args, seed, stored=None):
        self.ppo, self.args, self.stored = ppo, args, stored
        self.rng = np.random.default_rng(seed)
        self.updates, self.steps, self.gradients = [], [], None

    def attach(self, trainer, params):
        """`params`: of the policy and of the value model."""
        self.params, self.optimizer = params, trainer.optimizer
        self.backward = trainer.accelerator.backward
        trainer.accelerator.backward = self.on_backward
        trainer.log = lambda metrics: self.updates[-1].update(metrics={k: v for k, v in metrics.items() if k != "eps"})
        self.ppo.batch_generation = self.generation
        self.ppo.empty_cache = self.on_empty_cache

    def generation(self, policy, queries, _batch_size, pad_token_id, _config):
        """In place of TRL's: (B, query + response) and the logits (B, response, V) the sampler saw, which transformers
        hands over divided by the temperature."""
        assert pad_token_id == PAD
        temperature = self.args["temperature"] + 1e-7
        update = len(self.updates)
        if self.stored:
            responses = self.stored[update]["responses"]
        else:
            ends = planned_ends(self.rng, update, len(queries))
            responses = sample(self.ppo.forward, policy, queries, ends, temperature, self.rng)
        self.updates.append({"queries": queries, "responses": responses, "minibatches": []})
        both = torch.cat([queries, responses], 1)
        logits = self.ppo.forward(policy, both, PAD).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / temperature

    def on_empty_cache(self):
        """Called by the loop several times: the first time after it has computed the advantages."""
        seen = sys._getframe(1).f_locals
        if "advantages" in seen and "advantages" not in self.updates[-1]:
            self.updates[-1].update({key: seen[key].clone() for key in KEPT + MASKS})

    def on_backward(self, loss):
        seen = sys._getframe(1).f_locals
        rows = seen["micro_batch_inds"]
        self.updates[-1]["minibatches"].append(rows.tolist())
        self.backward(loss)
        if self.gradients is None:
            self.gradients = [gradients(params) for params in self.params]
        real = ~seen["padding_mask"][rows]
        mean = self.ppo.masked_mean
        logits, difference, ratio = (seen[key].detach() for key in ("logits", "logprobs_diff", "ratio"))
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        step = {
            "loss": loss,
            "policy_loss": seen["pg_loss"],
            "value_loss": seen["vf_loss"],
            "policy_clipfrac": mean((seen["pg_losses2"] > seen["pg_losses"]).float(), real),
            "value_clipfrac": seen["vf_clipfrac"],
            "approxkl": 0.5 * difference.square().mean(),
            "approxkl_masked": 0.5 * mean(difference.square(), real),
            "ratio": ratio.mean(),
            "ratio_masked": mean(ratio, real),
            "entropy": entropy.mean(),
            "entropy_masked": mean(entropy, real),
        }
        step = {key: value.item() for key, value in step.items()}
        grad_norm = norm(p for params in self.params for p in params.values())
        rate = self.optimizer.param_groups[0]["lr"]
        self.steps.append({"update": len(self.updates) - 1, **step, "grad_norm": grad_norm, "learning_rate": rate})


def ppo_run(folder, dtype, args, seed, stored=None):
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    policy = lora_model("CAUSAL_LM", seed, dtype, std=0.05)  # not far from the reference: the KL stays moderate
    value, reward = (lora_model("SEQ_CLS", seed + more, dtype) for more in (100, 200))
    if folder:
        write_adapter(folder / "policy/initial", policy, BASE)
        write_adapter(folder / "value/initial", value, BASE)
        write_adapter(folder / "reward", reward, BASE)
    reward.requires_grad_(False)
    batch = args["per_device_train_batch_size"]
    rng = np.random.default_rng(seed + 300)
    queries = datasets.Dataset.from_list([{"input_ids": tokens(rng, 3, 10)} for _ in range(UPDATES * batch)])
    notes = Notes(ppo_trainer, args, seed + 400, stored)
    with tempfile.TemporaryDirectory() as tmp:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=tmp,
                total_episodes=UPDATES * batch,
                local_rollout_forward_batch_size=batch,
                num_sample_generations=0,
                **args,
                **MANNER,
            ),
            processing_class=tokenizer("left"),
            model=policy,
            ref_model=None,  # the policy with its adapter switched off
            reward_model=reward.get_base_model(),
            value_model=value.get_base_model(),
            train_dataset=queries,
            eval_dataset=queries,
        )
        np.random.seed(seed)  # TRL shuffles minibatches with numpy's global generator
        trainer.remove_callback(transformers.PrinterCallback)
        notes.attach(trainer, [trainable(policy), trainable(value)])
        trainer.train()
    assert len(notes.updates) == UPDATES and len(notes.steps) == STEPS
    return policy, value, notes


def unpadded(ids):
    return [[i for i in row if i != PAD] for row in ids.tolist()]


def check_update(update, args):
    """Checks that TRL behaves as described in the README."""
    lengths = torch.tensor([len(row) for row in unpadded(update["responses"])])
    at = torch.arange(RESPONSE_LENGTH)
    assert (update["padding_mask"] == (at >= lengths[:, None])).all()
    assert (update["padding_mask_p1"] == (at > lengths[:, None])).all()
    scored = torch.where(lengths < RESPONSE_LENGTH, lengths, RESPONSE_LENGTH - 1)
    if not args["whiten_rewards"]:
        paid = torch.nn.functional.one_hot(scored, RESPONSE_LENGTH) * update["scores"][:, None]
        assert torch.allclose(update["rewards"], paid - args["kl_coef"] * update["kl"], atol=1e-6)


def make_ppo(name, args, seed):
    folder = RL / name
    folder.mkdir()
    policy, value, notes = ppo_run(folder, torch.float32, args, seed)
    for kind, model in (("policy", policy), ("value", value)):
        write_adapter(folder / kind / "final", model, BASE)
    exact_policy, exact_value, exact = ppo_run(None, torch.float64, args, seed, notes.updates)

    pairs = list(zip(notes.updates, exact.updates, strict=True))
    assert all(torch.equal(a["queries"], b["queries"]) and a["minibatches"] == b["minibatches"] for a, b in pairs)
    noise = far(notes.steps, exact.steps)
    noise = max(noise, far(*([update["metrics"] for update in run.updates] for run in (notes, exact))))
    rollout_noise = max(((a[key] - b[key]).abs() / b[key].abs().clamp(min=1)).max().item() for a, b in pairs for key in KEPT)
    apart = max(adapters_apart(policy, exact_policy), adapters_apart(value, exact_value))
    moved = max(step["approxkl_masked"] for step in notes.steps)
    clipped = [max(step[key] for step in notes.steps) for key in ("policy_clipfrac", "value_clipfrac")]
    print(
        f"{name}: greatest approxkl {moved:.3f}, clipped {clipped[0]:.2f} and {clipped[1]:.2f}, float32 noise {noise:.1e} in"
        f" the steps, {rollout_noise:.1e} in the rollouts, {apart:.1e} in the adapters"
    )
    assert min(clipped) > 0 and noise < 2e-5 and rollout_noise < 2e-5 and apart < 1e-4

    tensors, rows = {}, []
    for i, update in enumerate(notes.updates):
        check_update(update, args)
        tensors.update({f"{i}.{key}": update[key].float().contiguous() for key in KEPT})
        tensors.update({f"{i}.{key}": update[key].to(torch.uint8) for key in MASKS})
        ids = {"query_ids": unpadded(update["queries"]), "response_ids": unpadded(update["responses"])}
        rows.append({**ids, "minibatches": update["minibatches"]})
    safetensors.torch.save_file(tensors, folder / "rollouts.safetensors")
    write_rows(folder / "rollouts.jsonl", rows)
    for kind, first in zip(("policy", "value"), notes.gradients, strict=True):
        safetensors.torch.save_file(dict(sorted(first.items())), folder / kind / "gradients.safetensors")
    updates = [update["metrics"] for update in notes.updates]
    write_json(folder / "run.json", {"base": BASE, **args, "updates": updates, "steps": notes.steps})


def clear(names):
    RL.mkdir(exist_ok=True)
    for path in RL.iterdir():
        if path.is_dir() and path.name.startswith(names):
            shutil.rmtree(path)


def main():
    assert_versions()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    if version("trl") == "1.0.0":
        clear(("ppo",))
        make_ppo("ppo", PPO_ARGS, 25)
        # whitening needs minibatches of at least 8 rows
        k3 = {"kl_estimator": "k3", "whiten_rewards": True, "per_device_train_batch_size": 16, "num_mini_batches": 2}
        make_ppo("ppo-k3", {**PPO_ARGS, **k3, "num_ppo_epochs": 1, "temperature": 1.0, "learning_rate": 6e-3}, 26)
    else:
        assert version("trl") == "1.16.0", f"trl: found {version('trl')}, needed 1.16.0, or 1.0.0 for PPO"
        clear(("reward", "dpo", "kto"))
        make_preferences()


if __name__ == "__main__":
    main()
