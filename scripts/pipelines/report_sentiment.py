#!/usr/bin/env python3
"""The table at the end of scripts/pipelines/sentiment.sh: python3 scripts/pipelines/report_sentiment.py RUN_DIRECTORY"""

import json
import statistics
import sys
from pathlib import Path


def read(path):
    return json.loads(path.read_text().splitlines()[-1])


def spread(values):
    """Mean and standard error over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def last(run, key):
    """The last value of a key in a run's metrics."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    values = [line[key] for line in lines if line.get(key) is not None]
    return values[-1] if values else float("nan")


def main():
    out = Path(sys.argv[1])
    rewards = [read(path) for path in sorted(out.glob("reward-*.json"))]
    print(f"reward model: accuracy {spread([100 * r['eval_accuracy'] for r in rewards])} % on held-out pairs,")
    print(f"  calibration error {spread([r['eval_calibration_error'] for r in rewards])}; {len(rewards)} seeds")
    judge = read(out / "judge.json")
    print(f"judge: accuracy {100 * judge['eval_accuracy']:.1f} %, calibration error {judge['eval_calibration_error']:.3f}")
    print()
    head = ("", "judge", "win % vs sft", "win % vs base", "KL", "tokens", "entropy", "distinct-2")
    print("{:>8} {:>16} {:>13} {:>13} {:>7} {:>7} {:>8} {:>11}".format(*head))

    def row(name, figures, wins, wins_base, kl):
        judged = f"{figures['reward']:+.3f} ± {figures['reward_error']:.3f}"
        share = lambda w: f"{100 * w['win_rate']:.1f} ± {100 * w['win_rate_error']:.1f}" if w else "-"
        kl = "-" if kl is None else f"{kl:.2f}"
        print(
            f"{name:>8} {judged:>16} {share(wins):>13} {share(wins_base):>13} {kl:>7} {figures['length']:>7.1f}"
            f" {figures['entropy']:>8.2f} {figures['distinct_2']:>11.3f}"
        )

    sft = read(out / "sft.report.json")
    row("base", sft["against"], None, None, None)
    row("sft", sft, None, sft, None)
    names = [path.name for path in sorted(out.iterdir()) if path.is_dir() and path.name.startswith(("ppo-", "dpo", "grpo"))]
    for name in names:
        against, base = out / f"{name}.report.json", out / f"{name}-base.report.json"
        if against.exists() and base.exists():
            kl = None if name == "dpo" else last(out / name, "eval_kl")
            row(name, read(against), read(against), read(base), kl)
    ppo = [read(out / f"{n}.report.json") for n in names if n.startswith("ppo-") and (out / f"{n}.report.json").exists()]
    if len(ppo) > 1:
        print()
        print(f"ppo over {len(ppo)} seeds: judge {spread([r['reward'] for r in ppo])}, win rate against sft "
              f"{spread([100 * r['win_rate'] for r in ppo])} %, tokens per reply {spread([r['length'] for r in ppo])}, "
              f"entropy {spread([r['entropy'] for r in ppo])}")


if __name__ == "__main__":
    main()
