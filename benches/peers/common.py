"""Shared by the scripts of this folder: paths, the cost of a process, and the line that a run prints.

Set by the environment:

    QUANTUNE      our binary                                  [target/release/quantune]
    PYTHON        a Python with requirements.txt installed    [the one that runs the script]
    LLAMA_BIN     folder of llama.cpp's programs
    PEERS_MODELS  the models prepare.py makes                 [models/]
    TRL_PPO       folder of TRL 1.0.0, the last with PPO
    THREADS       of either side                              [2]

A script that measures imports nothing heavy: Linux counts the memory of the process that starts another
into the other's peak.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent
MODELS = Path(os.environ.get("PEERS_MODELS", ROOT / "models"))
DATA = ROOT / "data"
WORK = ROOT / "runs/peers"
TARGET = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
QUANTUNE = os.environ.get("QUANTUNE", f"{TARGET}/release/quantune")
PYTHON = os.environ.get("PYTHON", sys.executable)
THREADS = int(os.environ.get("THREADS", "2"))

# Name -> (Hugging Face folder for the peer, GGUF for us): the same weights, the folder's in floats.
MODEL_FILES = {
    "smollm2": ("smollm2-135m-hf", "SmolLM2-135M-Instruct.Q4_1.gguf"),
    "qwen05": ("qwen05-random-hf", "qwen05-random.Q8_0.gguf"),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LEARNING_RATE = 2e-4


def child_environment():
    """The same number of threads for all programs. Waiting threads spin or sleep by each program's default; if other
    work runs at the same time, spinning ones lose most of their time, and OMP_WAIT_POLICY=PASSIVE lets OpenMP's sleep."""
    ours = {name: str(THREADS) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")}
    defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if os.environ.get("OMP_WAIT_POLICY") == "PASSIVE":
        defaults["GOMP_SPINCOUNT"] = "0"
    return {**defaults, **os.environ, **ours}


# ------------------------------------------------------------------ processes


@dataclass
class Finished:
    """A successful process, with its time and memory from start to end."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_rss: int  # bytes

    def json(self):
        """The object on the last line of stdout."""
        return json.loads(self.stdout.splitlines()[-1])


def run(command, each_poll=None, stderr_line=None):
    """Runs a command and waits for it. `each_poll(pid)` is called every 2 ms, `stderr_line(pid, line)` on each
    line of stderr; one of them at most. Ends the program if the command fails."""
    command = [str(word) for word in command]
    if shutil.which(command[0]) is None:
        sys.exit(f"{command[0]}: no such program; the head of {__file__} says which variable names it")
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        stderr = subprocess.PIPE if stderr_line else err
        child = subprocess.Popen(command, stdout=out, stderr=stderr, env=child_environment(), text=True)
        if stderr_line:
            for line in child.stderr:
                stderr_line(child.pid, line)
                err.write(line)
        pid, status, usage = os.wait4(child.pid, os.WNOHANG if each_poll else 0)
        while pid == 0:
            each_poll(child.pid)
            time.sleep(0.002)
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if child.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit {child.returncode}\n{err.read()[-3000:]}")
        return Finished(out.read(), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def quantune(*args, **kw):
    """One command of ours."""
    return run([QUANTUNE, *args, "--json", "--threads", THREADS], **kw)


def cpu_seconds_of(pid):
    """User and system time of a running process, all its threads, in ticks of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ------------------------------------------------------------------- training


@dataclass
class Training:
    """A run of training, step by step; the steps of warm-up are there too."""

    seconds: list
    cpu_seconds: list
    losses: list
    peak_rss: int


def sft_args(base, rows, out, *, batch, steps, max_length, checkpointing=False, compute=None):
    """Our command for rows in the order of the file, `batch` of them a step, as the peers' scripts take them."""
    recompute = ["--gradient-checkpointing", "true" if checkpointing else "false"]
    kernel = ["--compute", compute] if compute else []
    order = ["--no-shuffle", "--packing", "false", "--per-device-train-batch-size", batch]
    order += ["--gradient-accumulation-steps", 1, "--max-steps", steps, "--max-length", max_length]
    rate = ["--learning-rate", LEARNING_RATE, "--lr-scheduler-type", "constant"]
    return ["sft", "--base", base, "--data", rows, "--out", out, *order, *rate, *recompute, *kernel]


def fresh(name):
    """A path in WORK where nothing is yet."""
    path = WORK / name
    shutil.rmtree(path, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    return path


# A token each in SmolLM2's vocabulary, with a space before and without.
WORDS = (
    "water stone light river field summer winter window music paper bread table letter market forest road bridge house"
    " door friend teacher story question answer number"
).split()


def some_words(draw, count):
    return " ".join(draw.choice(WORDS) for _ in range(count))


def our_run(command, work, *flags, samples, steps, rate=LEARNING_RATE):
    """A run of ours, its whole process: files are opened, DPO's reference is asked and the adapter is written within."""
    settings = ["--learning-rate", rate, "--lr-scheduler-type", "constant", "--warmup-ratio", 0]
    out = fresh(command)
    done = quantune(command, *work, "--out", out, "--max-steps", steps, *settings, *flags)
    return out, Side(samples * steps / done.seconds, done.seconds / steps, done.cpu_seconds / steps, done.peak_rss)


def peer_side(training, warm, samples):
    """TRL's steps after the first `warm` ones."""
    seconds, cpu_seconds = sum(training.seconds[warm:]), sum(training.cpu_seconds[warm:])
    timed = len(training.seconds) - warm
    return Side(samples * timed / seconds, seconds / timed, cpu_seconds / timed, training.peak_rss)


def our_training(base, rows, **settings):
    """Our steps on rows."""
    out = fresh("sft")
    return watched(sft_args(base, rows, out, **settings), out)


def watched(command, out):
    """A run of ours, watched from outside: a step is done when its line is in metrics.jsonl."""
    metrics, seen, moments = out / "metrics.jsonl", 0, []

    def watch(pid):
        nonlocal seen
        size = metrics.stat().st_size if metrics.exists() else 0
        if size == seen:
            return
        seen, now = size, time.perf_counter()
        try:
            moments.append((now, cpu_seconds_of(pid), metrics.read_text().count("\n")))
        except OSError:
            pass  # it has ended between the two looks

    began = time.perf_counter()
    done = quantune(*command, each_poll=watch)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    if [count for _, _, count in moments] != list(range(1, len(lines) + 1)):
        sys.exit(f"{out}: steps too short to be distinguished from outside, needed longer rows or more of them")
    times, cpu = [began, *(t for t, _, _ in moments)], [0.0, *(c for _, c, _ in moments)]
    return Training(differences(times), differences(cpu), [line["loss"] for line in lines], done.peak_rss)


def differences(values):
    return [b - a for a, b in zip(values, values[1:])]


def peer_training(script, *args):
    """A peer's script, which prints its steps as JSON."""
    done = run([PYTHON, PEERS / script, *args])
    steps = done.json()
    return Training(steps["seconds"], steps["cpu_seconds"], steps["losses"], done.peak_rss)


def same_start(ours, peer, bound=0.01):
    """Both sides begin from the same weights and an update of zero: another first loss is other work."""
    if abs(ours / peer - 1) > bound:
        sys.exit(f"first loss is {ours:.4f}, the peer's {peer:.4f}: the two did not do the same work")


# -------------------------------------------------------------------- the line


@dataclass
class Side:
    """One side of a comparison; `value` is the compared number, in the line's unit."""

    value: float
    seconds: float
    cpu_seconds: float
    peak_rss: int


def median_side(sides):
    def middle(key):
        return statistics.median(getattr(side, key) for side in sides)

    return Side(middle("value"), middle("seconds"), middle("cpu_seconds"), max(side.peak_rss for side in sides))


HEADER = (
    f"{'work':<44} {'unit':>7} {'ours':>9} {'peer':>9} {'ratio':>6}  {'MB ours':>8} {'peer':>8}"
    f"  {'s ours':>8} {'cpu':>8} {'s peer':>8} {'cpu':>8}  load"
)


def print_header():
    print(HEADER, flush=True)


def print_line(work, unit, ours, peer):
    """The line of a run, on stdout and as JSON in runs/peers/results.jsonl. The ratio is how many times as fast we
    are: of rates ours to the peer's, of seconds the peer's to ours."""
    load = os.getloadavg()[0]
    ratio = peer.value / ours.value if unit == "s" else ours.value / peer.value
    print(
        f"{work:<44} {unit:>7} {ours.value:9.4g} {peer.value:9.4g} {ratio:6.2f}"
        f"  {ours.peak_rss / 1e6:8.0f} {peer.peak_rss / 1e6:8.0f}"
        f"  {ours.seconds:8.3f} {ours.cpu_seconds:8.3f} {peer.seconds:8.3f} {peer.cpu_seconds:8.3f}  {load:.2f}",
        flush=True,
    )
    record = {"work": work, "unit": unit, "ratio": ratio, "ours": vars(ours), "peer": vars(peer)}
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / "results.jsonl", "a") as results:
        results.write(json.dumps({**record, "load": load, "threads": THREADS, "time": time.time()}) + "\n")


def alternate(rounds, ours, peer):
    """Both sides in turn, the first of a round being the second of the next: a drift of the machine hits both."""
    for i in range(rounds):
        if i % 2 == 0:
            first = ours()
            yield first, peer()
        else:
            second = peer()
            yield ours(), second


def compare(work, unit, rounds, ours, peer):
    """A line a round, and one of the medians over the rounds."""
    pairs = []
    for pair in alternate(rounds, ours, peer):
        pairs.append(pair)
        print_line(f"{work} [{len(pairs)}]", unit, *pair)
    if rounds > 1:
        print_line(work, unit, median_side([o for o, _ in pairs]), median_side([p for _, p in pairs]))
