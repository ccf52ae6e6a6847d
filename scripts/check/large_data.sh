#!/usr/bin/env bash
# The memory that `sft` needs for a file of rows, however large it is.
#
#   scripts/check/large_data.sh MODEL [MEGABYTES]     a GGUF file or a Hugging Face folder; 2000 by default
#
# Makes a file of conversations of 0.5 to 4 kB out of this repository's own words, and one of a twentieth of its size, and
# trains 20 steps on each: twice, the second time from the tokens that the first has kept on disk. Prints the peak private memory
# (RssAnon of /proc/PID/status) while tokenizing, while planning the epoch and during the steps,
# how long each takes, and by how many bytes a row it grows from the small file to the large one. Ends with 1 where that is
# more than 32. WORK (a folder with three times the room), THREADS and QUANTUNE (the binary) may be set.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
[[ $# -gt 0 ]] || { echo "usage: scripts/check/large_data.sh MODEL [MEGABYTES]" >&2; exit 2; }
quantune="${QUANTUNE:-${CARGO_TARGET_DIR:-$root/target}/release/quantune}"
work="$(mktemp -d "${WORK:-${TMPDIR:-/tmp}}/large.XXXXXX")"
trap 'rm -rf "$work"' EXIT
python3 - "$root" "$work" "$quantune" "$1" "${2:-2000}" "${THREADS:-2}" <<'PY'
import json, pathlib, random, re, resource, subprocess, sys, threading, time

root, work, quantune, model, megabytes, threads = sys.argv[1:]
words = []
for path in sorted(pathlib.Path(root).glob("src/**/*.rs")) + [pathlib.Path(root, "README.md")]:
    words += re.findall(r"[A-Za-z]+[,.]?", path.read_text())
print(f"{len(words)} words, {len(set(words))} different ones")


def make(path, megabytes):
    """Rows like those of people: questions, answers of several lengths, numbers between the words."""
    rng = random.Random(1)
    rows = 0
    with open(path, "w") as file:
        while file.tell() < megabytes * 1e6:
            lines = []
            for _ in range(500):
                start, count = rng.randrange(len(words) - 900), rng.randint(90, 700)
                text = words[start : start + count]
                text[count // 2] = str(rng.randrange(10**6))
                asked, answer = " ".join(text[:20]), " ".join(text[20:])
                lines.append(json.dumps({"messages": [{"role": "user", "content": f"{rng.random()} {asked}?"},
                                                      {"role": "assistant", "content": answer}]}))
            file.write("\n".join(lines) + "\n")
            rows += len(lines)
    return rows


def train(data, out, cache):
    """Seconds and highest private memory, in MB, of each phase."""
    command = [quantune, "sft", "--base", model, "--data", data, "--out", out, "--cache", cache, "--cache-from", "1MB",
               "--max-steps", "20", "--max-length", "256", "--gradient-accumulation-steps", "1", "--threads", threads,
               "--r", "8", "--allow", "cut,duplicates"]
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    phase, peaks, seconds = "reading", {}, {}

    def watch():
        while process.poll() is None:
            try:
                status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            found = re.search(r"RssAnon:\s+(\d+)", status)
            if found:
                peaks[phase] = max(peaks.get(phase, 0), int(found[1]) * 1024 / 1e6)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output = []
    for line in process.stderr:
        output.append(line)
        now = time.monotonic() - began
        for words, name in [("data: tokenizing", "tokenizing"), (" rows, ", "planning"), ("training ", "training")]:
            if words in line and name not in seconds:
                seconds[phase], phase = now - sum(seconds.values()), name
                seconds.setdefault(name, 0)
    watcher.join()
    seconds[phase] = time.monotonic() - began - sum(seconds.values())
    if process.wait():
        sys.exit("".join(output))
    return {name: (seconds[name], peaks.get(name, 0)) for name in seconds}


found = []
for name, size in [("small", int(megabytes) / 20), ("large", int(megabytes))]:
    data = f"{work}/{name}.jsonl"
    rows = make(data, size)
    print(f"{name}: {rows} rows, {pathlib.Path(data).stat().st_size / 1e6:.0f} MB", flush=True)
    runs = []
    for time_ in ("first", "second"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        runs.append(train(data, f"{work}/{name}-{time_}", f"{work}/{name}-cache"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        phases = ", ".join(f"{phase} {seconds:.1f} s, {peak:.1f} MB" for phase, (seconds, peak) in runs[-1].items())
        print(f"  {time_} start: {phases}; {cpu:.0f} s of CPU", flush=True)
    kept = sum(file.stat().st_size for file in pathlib.Path(f"{work}/{name}-cache").glob("*/*"))
    print(f"  on disk: {kept / 1e6:.0f} MB", flush=True)
    found.append((rows, runs))
    pathlib.Path(data).unlink()

(few, small), (many, large) = found
worst = 0
for time_, before, after in zip(("first", "second"), small, large):
    for phase in after:
        a_row = (after[phase][1] - before.get(phase, after[phase])[1]) * 1e6 / (many - few)
        print(f"{time_} start, {phase}: {a_row:.1f} bytes a row")
        worst = max(worst, a_row)
sys.exit(worst > 32)
PY
