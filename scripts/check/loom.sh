#!/usr/bin/env bash
# Model-checks the worker pool (src/ops/worker_pool/regions.rs) with loom: every interleaving, and every
# value that a weak memory model lets a load return, of small models. Takes about a minute; two preemptions of a thread per run, as loom's authors advise.
set -euo pipefail
cd "$(dirname "$0")/loom"
LOOM_MAX_PREEMPTIONS="${LOOM_MAX_PREEMPTIONS:-2}" cargo test --release "$@"
