#!/usr/bin/env python3
"""Writes tests/golden/objectives: losses, gradients and statistics of TRL's own code on random numbers.

    python3 scripts/golden/objectives.py
    PYTHONPATH=target/trl-1.0.0 python3 scripts/golden/objectives.py ppo

A trainer's method is called on a stand-in for the trainer, with a stand-in for the model that returns the
log-probs (or scores) in question; where a formula is in the middle of a long method, its lines are
cut out of the source and run. Gradients are autograd's.
"""

import inspect
import json
import os
import sys
import textwrap
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
import torch
import trl

OUT = Path(__file__).resolve().parents[2] / "tests/golden/objectives"
DEVICE = torch.device("cpu")


def listed(value):
    """Tensors and their containers as JSON, numbers to 9 digits: all that f32 holds."""
    if isinstance(value, torch.Tensor):
        value = value.detach().tolist()
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [listed(item) for item in value]
    if isinstance(value, float):
        return None if value != value else float(f"{value:.9g}")
    return value


def write(name, cases):
    OUT.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(listed(case)) for case in cases)
    (OUT / name).write_text(f"[\n{lines}\n]\n")
    print(f"{OUT / name}: {len(cases)} cases, {(OUT / name).stat().st_size} bytes")


def section(function, first, last):
    """The lines of a function from the one that begins with `first` up to the one with `last`, compiled."""
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i > start and line.strip().startswith(last))
    name = f"{inspect.getsourcefile(function)} of trl {trl.__version__}"
    return compile(textwrap.dedent("\n".join(lines[start:end])), name, "exec")


def trainer(**attributes):
    """The attributes of `self` that the methods use."""
    accelerator = SimpleNamespace(
        device=DEVICE,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
        parallelism_config=None,
    )
    return SimpleNamespace(
        accelerator=accelerator,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        **attributes,
    )


def logged(stub, names):
    return {name: stub._metrics["train"][name][-1] for name in names if stub._metrics["train"][name]}


def random(*shape, scale=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def leaf(values):
    return values.clone().requires_grad_(True)


# ----- reward models --------------------------------------------------------------------------------


def reward():
    from trl import RewardTrainer

    cases = []
    for seed, pairs, margin, center, scale in [(1, 5, False, None, 1), (2, 4, True, None, 2), (3, 4, True, 0.01, 1), (4, 3, False, 0.5, 60)]:
        scores = leaf(random(2 * pairs, scale=scale, seed=seed))
        inputs = {"attention_mask": torch.ones(2 * pairs, 1)}
        if margin:
            inputs["margin"] = random(pairs, seed=seed + 100).abs()
        stub = trainer(args=SimpleNamespace(center_rewards_coefficient=center))
        loss = RewardTrainer.compute_loss(stub, lambda **_: SimpleNamespace(logits=scores.unsqueeze(-1)), dict(inputs))
        loss.backward()
        names = ["accuracy", "margin", "min_reward", "mean_reward", "max_reward"]
        cases.append(
            {
                "scores": scores,  # the chosen, then the rejected
                "margins": inputs.get("margin"),
                "center_rewards_coefficient": center or 0.0,
                "loss": loss,  # means over pairs
                "gradient": scores.grad,
                "metrics": logged(stub, names),
            }
        )
    write("reward.json", cases)


# ----- preferences ----------------------------------------------------------------------------------


def outputs(logps):
    """A model's fused output: all of a row's log-prob stands at its first predicted token."""
    rows = logps.shape[0]
    log_probs = torch.zeros(rows, 7)
    zeros = torch.zeros(rows, 7)
    return SimpleNamespace(log_probs=log_probs + torch.nn.functional.pad(logps.unsqueeze(1), (0, 6)), entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def dpo(loss_type, logps, reference, tokens, beta):
    from trl import DPOTrainer

    rows = logps.shape[0]
    mask = (torch.arange(8).unsqueeze(0) < tokens.unsqueeze(1)).long()  # only its sums count
    inputs = {"input_ids": torch.zeros(rows, 8).long(), "attention_mask": torch.ones(rows, 8), "completion_mask": mask}
    inputs |= dict(zip(["ref_chosen_logps", "ref_rejected_logps"], reference.chunk(2)))
    stub = trainer(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[loss_type], loss_weights=[1.0])
    stub.beta, stub.use_weighting = beta, False
    loss = DPOTrainer._compute_loss(stub, lambda **_: outputs(logps), inputs, False)
    return loss, stub


def cpo(loss_type, logps, beta, label_smoothing, gamma=0.5):
    from trl.experimental.cpo import CPOTrainer

    stub = trainer(alpha=0.0, beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, simpo_gamma=gamma, cpo_alpha=0.0)
    chosen, rejected = logps.chunk(2)
    stub.concatenated_forward = lambda model, batch: (chosen, rejected, chosen, rejected, torch.tensor(0.0))
    stub.cpo_loss = lambda *logps: CPOTrainer.cpo_loss(stub, *logps)
    return *CPOTrainer.get_batch_loss_metrics(stub, None, {}), CPOTrainer.cpo_loss(stub, chosen, rejected)[0]


def orpo(logps, nll, beta):
    from trl.experimental.orpo import ORPOTrainer

    stub = trainer(beta=beta)
    chosen, rejected = logps.chunk(2)
    stub.concatenated_forward = lambda model, batch: (chosen, rejected, chosen, rejected, nll)
    stub.odds_ratio_loss = lambda *logps: ORPOTrainer.odds_ratio_loss(stub, *logps)
    return ORPOTrainer.get_batch_loss_metrics(stub, None, {})


REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"]


def preference():
    cases = []
    pairs = 5
    for seed, kind in enumerate(["sigmoid", "hinge", "ipo", "sigmoid", "sigmoid smoothed", "simpo", "simpo smoothed", "orpo", "orpo near 1"]):
        free = seed == 3
        logps = leaf(random(2 * pairs, scale=8, seed=seed) - 30)
        reference = torch.zeros(2 * pairs) if free else logps.detach() + random(2 * pairs, scale=3, seed=seed + 50)
        tokens = torch.randint(1, 9, (2 * pairs,), generator=torch.Generator().manual_seed(seed))
        case = {"loss_type": kind.split()[0], "beta": 0.3, "label_smoothing": 0.0, "simpo_gamma": 0.7}
        if kind == "orpo near 1":
            with torch.no_grad():
                logps.copy_(-torch.tensor([1e-5, 1e-3, 0.1, 0.6, 0.7, 0.8, 1e-4, 3.0, 90.0, 1e-2]) * tokens)
        average = logps / tokens
        if "smoothed" in kind:
            case["label_smoothing"] = 0.2
        losses = None
        if case["loss_type"] == "orpo":
            # ORPOTrainer.concatenated_forward: the mean over all predicted tokens of prompt and chosen response
            nll_logps, nll_tokens = leaf(random(pairs, scale=9, seed=seed + 70) - 40), tokens[:pairs] + 6
            loss, metrics = orpo(average, -nll_logps.sum() / nll_tokens.sum(), case["beta"])
        elif case["loss_type"] == "simpo":
            loss, metrics, losses = cpo("simpo", average, case["beta"], case["label_smoothing"], case["simpo_gamma"])
        elif case["label_smoothing"]:
            # DPOTrainer no longer smooths its sigmoid; CPOTrainer does, of log-probs that here are log-ratios.
            loss, metrics, losses = cpo("sigmoid", logps - reference, case["beta"], case["label_smoothing"])
            metrics |= {"logps/chosen": logps[:pairs].mean().item(), "logps/rejected": logps[pairs:].mean().item()}
        else:
            loss, stub = dpo(case["loss_type"], logps, reference, tokens, case["beta"])
            metrics = logged(stub, REWARDS)
            losses = []
            for i in range(pairs):
                both = [i, i + pairs]
                losses.append(dpo(case["loss_type"], logps[both].detach(), reference[both], tokens[both], case["beta"])[0])
        loss.backward()
        case |= {"logps": logps, "reference": None if free else reference, "tokens": tokens, "loss": loss, "losses": losses, "gradient": logps.grad}
        if case["loss_type"] == "orpo":
            case |= {"nll_logps": nll_logps, "nll_tokens": nll_tokens, "nll_gradient": nll_logps.grad}
        names = REWARDS + (["nll_loss", "log_odds_ratio", "log_odds_chosen"] if case["loss_type"] == "orpo" else [])
        case["metrics"] = {name: metrics[name] for name in names}
        cases.append(case)
    cases += [kto(seed, labels, weights) for seed, labels, weights in [(1, [1, 0, 1, 1, 0], (1.0, 1.0)), (2, [0, 1, 0, 0, 1], (1.5, 0.7)), (3, [1, 1, 1], (1.0, 1.33)), (4, [0, 0], (1.0, 2.0))]]
    write("preference.json", cases)


def kto(seed, labels, weights):
    from trl import KTOTrainer

    rows = len(labels)
    logps = leaf(random(rows, scale=8, seed=seed) - 30)
    reference = logps.detach() + random(rows, scale=2, seed=seed + 50)
    kl_logps = random(rows, scale=8, seed=seed + 90) - 40
    ref_kl_logps = kl_logps + random(rows, scale=2, seed=seed + 130) + (2 if seed == 3 else -1)
    stub = trainer(calculate_KL=True, precompute_ref_logps=True, loss_type="kto", beta=0.2)
    stub.desirable_weight, stub.undesirable_weight = weights
    stub._compute_kl_logps = lambda model, batch: kl_logps
    batch = {"label": torch.tensor(labels), "input_ids": torch.zeros(rows, 8).long(), "attention_mask": torch.ones(rows, 8), "completion_mask": torch.ones(rows, 8).long()}
    batch |= {"ref_logps": reference, "ref_KL_logps": ref_kl_logps}
    loss = KTOTrainer._compute_loss(stub, lambda **_: outputs(logps), batch, False)
    loss.backward()
    return {
        "loss_type": "kto",
        "beta": 0.2,
        "desirable_weight": weights[0],
        "undesirable_weight": weights[1],
        "logps": logps,
        "reference": reference,
        "labels": [bool(label) for label in labels],
        "kl_logps": kl_logps,
        "ref_kl_logps": ref_kl_logps,
        "loss": loss,
        "gradient": logps.grad,
        "metrics": logged(stub, ["kl", *REWARDS]),
    }


# ----- PPO ------------------------------------------------------------------------------------------


def ppo():
    from trl.experimental.ppo import ppo_trainer

    assert trl.__version__ == "1.0.0", trl.__version__
    train = ppo_trainer.PPOTrainer.train
    judge = section(train, "# be very careful with", "empty_cache()")
    learn = section(train, "vpred = vpred_temp", "accelerator.backward")
    count = section(train, "pg_clipfrac = masked_mean", "prob_dist =")
    cases = []
    for seed, kl_estimator, whiten_rewards, gamma, lam, clip in [(1, "k1", False, 1.0, 0.95, 0.2), (2, "k3", False, 0.99, 0.9, 0.1), (3, "k1", True, 1.0, 0.95, 0.2), (4, "k1", False, 1.0, 1.0, 0.2)]:
        rows, width = 4, 6
        lengths = torch.tensor([6, 3, 1, 5])  # response tokens, the end-of-sequence token included
        args = SimpleNamespace(kl_estimator=kl_estimator, kl_coef=0.05, whiten_rewards=whiten_rewards, gamma=gamma, lam=lam, cliprange=clip, cliprange_value=clip, vf_coef=0.1)
        responses = torch.zeros(rows, width)
        logprobs = random(rows, width, seed=seed) - 2
        scope = {
            **vars(ppo_trainer),
            "args": args,
            "responses": responses,
            "sequence_lengths": lengths - 1,
            "logprobs": logprobs,
            "ref_logprobs": logprobs + random(rows, width, scale=0.5, seed=seed + 10),
            "values": random(rows, width, seed=seed + 20),
            "scores": random(rows, scale=2, seed=seed + 30),
        }
        before = {name: scope[name].clone() for name in ["logprobs", "ref_logprobs", "values", "scores"]}
        exec(judge, scope)
        # The first epoch meets the policy that sampled: ratios of exactly 1 in the second case.
        new = leaf(scope["logprobs"] + random(rows, width, scale=0.0 if seed == 2 else 0.3, seed=seed + 40))
        values = leaf(before["values"] + random(rows, width, scale=0.3, seed=seed + 50))
        scope |= {
            "micro_batch_inds": slice(None),
            "mb_advantage": scope["advantages"],
            "mb_logprobs": scope["logprobs"],
            "mb_return": scope["returns"],
            "mb_values": scope["values"],
            "vpred_temp": torch.cat([torch.zeros(rows, 1), values, torch.zeros(rows, 1)], 1).unsqueeze(-1),
            "context_length": 2,
        }
        scope["new_logprobs"] = torch.masked_fill(new, scope["padding_mask"], ppo_trainer.INVALID_LOGPROB)
        exec(learn, scope)
        exec(count, scope)
        scope["pg_loss"].backward()
        scope["vf_loss"].backward()
        states = [min(length + 1, width) for length in lengths.tolist()]
        tokens = lambda x: [row[:length] for row, length in zip(x.tolist(), lengths.tolist())]
        by_state = lambda x: [row[:count] for row, count in zip(x.tolist(), states)]
        diff = (new.detach() - scope["logprobs"])[~scope["padding_mask"]]
        cases.append(
            vars(args)
            | {
                "scores": before["scores"],
                "logps": tokens(before["logprobs"]),
                "ref_logps": tokens(before["ref_logprobs"]),
                "values": by_state(before["values"]),
                "kl": tokens(scope["kl"]),
                "rewards": by_state(scope["rewards"]),
                "advantages": tokens(scope["advantages"]),  # whitened
                "returns": by_state(scope["returns"]),
                "new_logps": tokens(new.detach()),
                "new_values": by_state(values.detach()),
                "policy_loss": scope["pg_loss"],
                "value_loss": scope["vf_loss"],
                "policy_gradient": tokens(new.grad),
                "value_gradient": by_state(values.grad),
                "metrics": {
                    "policy/clipfrac_avg": scope["pg_clipfrac"],
                    "val/clipfrac_avg": scope["vf_clipfrac"],
                    # TRL's means over padding as well, restated over tokens.
                    "policy/approxkl_avg": 0.5 * (diff**2).mean(),
                    "val/ratio": diff.exp().mean(),
                },
            }
        )
    write("ppo.json", cases)


# ----- GRPO and RLOO --------------------------------------------------------------------------------

CLIPS = ["clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max", "clip_ratio/region_mean"]


def advantages():
    from trl import GRPOTrainer, RLOOTrainer
    from trl.trainer import grpo_trainer, rloo_trainer

    grpo = section(GRPOTrainer._generate_and_score_completions, "unscorable_mask =", "# Slice to keep only")
    rloo = section(RLOOTrainer._generate_and_score_completions, "unscorable_mask =", "# Slice to keep only")
    nan = float("nan")
    tables = {
        "spread": [0.5, 1.5, -2.0, 0.25, 3.0, 3.0, 3.0, 3.0, 100.0, 101.0, 99.0, 100.0],
        "unscorable": [0.5, nan, -2.0, 0.25, nan, nan, nan, 1.0, nan, nan, nan, nan],
        "equal": [0.5] * 12,  # exact in binary: else TRL finds a spread in the rounding
    }
    cases = []
    for rewards in tables.values():
        for kind in ["group", "batch", "none", "rloo"]:
            for generations in [4, 2, 12]:
                stub = trainer(reward_weights=torch.ones(1), multi_objective_aggregation="sum_then_normalize", scale_rewards=kind)
                stub.normalize_advantages, stub.reward_funcs = False, [None]
                stub.num_generations = stub.num_generations_eval = generations
                module, code = (rloo_trainer, rloo) if kind == "rloo" else (grpo_trainer, grpo)
                # RLOO adds -β KL to the rewards first; here there is none.
                scope = {**vars(module), "self": stub, "rewards_per_func": torch.tensor(rewards).unsqueeze(1), "num_generations": generations}
                scope |= {"device": DEVICE, "mode": "train"}
                stub.beta, stub.reward_clip_range = 0.0, None
                exec(code, scope)
                cases.append({"rewards": rewards, "kind": kind, "generations": generations, "advantages": scope["advantages"], "frac_reward_zero_std": scope["is_std_zero"].float().mean()})
    write("advantages.json", cases)


def grpo():
    from trl import GRPOTrainer, RLOOTrainer

    cases = []
    rows, width = 4, 6
    for seed, (loss_type, beta, high, on_policy) in enumerate([("grpo", 0.0, 0.2, False), ("grpo", 0.04, 0.28, False), ("bnpo", 0.04, 0.2, False), ("dr_grpo", 0.1, 0.2, False), ("grpo", 0.04, 0.2, True), ("rloo", 0.0, 0.2, False)]):
        lengths = torch.tensor([6, 3, 0, 5] if loss_type == "bnpo" else [6, 3, 1, 5])  # a masked row among them
        mask = (torch.arange(width).unsqueeze(0) < lengths.unsqueeze(1)).long()
        logps = leaf(random(rows, width, seed=seed) - 2)
        old = logps.detach() + random(rows, width, scale=0.0 if on_policy else 0.3, seed=seed + 10)
        reference = logps.detach() + random(rows, width, scale=0.5, seed=seed + 20)
        entropies = random(rows, width, seed=seed + 30).abs()
        given = random(rows, seed=seed + 40)
        inputs = {"prompt_ids": torch.zeros(rows, 1), "prompt_mask": torch.ones(rows, 1), "completion_ids": torch.zeros(rows, width), "completion_mask": mask}
        inputs |= {"advantages": given, "ref_per_token_logps": reference, "old_per_token_logps": old, "old_logps": (old * mask).sum(1)}
        stub = trainer(loss_type=loss_type, beta=beta, epsilon_low=0.2, epsilon_high=high, importance_sampling_level="token", top_entropy_quantile=1.0)
        stub.args = SimpleNamespace(delta=None, use_bias_correction_kl=False)
        stub.off_policy_mask_threshold, stub.use_vllm, stub._entropy_bonus_enabled = None, False, False
        stub.current_gradient_accumulation_steps, stub.max_completion_length = 1, 9
        stub._get_per_token_logps_and_entropies = lambda *_, **__: (logps, entropies, None)
        kind = RLOOTrainer if loss_type == "rloo" else GRPOTrainer
        loss = kind._compute_loss(stub, None, inputs)
        loss.backward()
        tokens = lambda x: [row[:length] for row, length in zip(x.tolist(), lengths.tolist())]
        cases.append(
            {
                "loss_type": loss_type,
                "epsilon": 0.2,
                "epsilon_high": high,
                "beta": beta,
                "max_completion_length": 9,
                "logps": tokens(logps.detach()),
                "old_logps": tokens(old),
                "ref_logps": tokens(reference),
                "entropies": tokens(entropies),
                "advantages": given,
                "loss": loss,
                "gradient": tokens(logps.grad),
                "metrics": logged(stub, ["kl", "entropy", *CLIPS]),
            }
        )
    write("grpo.json", cases)


def main():
    if sys.argv[1:] == ["ppo"]:
        return ppo()
    assert trl.__version__ == "1.16.0", trl.__version__
    for make in [reward, preference, advantages, grpo]:
        make()


if __name__ == "__main__":
    main()
