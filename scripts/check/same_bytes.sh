#!/usr/bin/env bash
# Compares what two commits compute, byte for byte: a fixed set of runs on tiny models, see scripts/check/same_bytes.py.
#
#   scripts/check/same_bytes.sh BASE_COMMIT [NEW_COMMIT]      [default of NEW_COMMIT: the working tree]
#   scripts/check/same_bytes.sh --binaries OLD NEW
#
# Builds each commit in a separate git worktree, with one target directory for both, in PROFILE [default: dev]. Prints a
# table of the runs and exits with 1 where bytes differ. ONLY (a word in the name of a run), THREADS [2] and KEEP=1 (keeps
# the work folder) may be set.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
root="$PWD"
usage() { sed -n 's/^#   //p' "${BASH_SOURCE[0]}" >&2; exit 2; }
[[ $# -gt 0 ]] || usage

if [[ "$1" == --binaries ]]; then
    [[ $# -eq 3 ]] || usage
    old="$(realpath "$2")" new="$(realpath "$3")"
else
    [[ $# -le 2 ]] || usage
    profile="${PROFILE:-dev}"
    target="${CARGO_TARGET_DIR:-$root/target}/same-bytes"
    folder="$profile"
    [[ "$profile" != dev ]] || folder=debug
    trees="$(mktemp -d)"
    trap 'git worktree remove --force "$trees/old" 2>/dev/null; git worktree remove --force "$trees/new" 2>/dev/null; rm -rf "$trees"' EXIT
    # Builds the sources in a folder and keeps the binary under a separate name.
    build() {
        (cd "$1" && CARGO_TARGET_DIR="$target" cargo build --quiet --profile "$profile" --bin quantune)
        cp "$target/$folder/quantune" "$trees/$2"
    }
    git worktree add --quiet --detach "$trees/old" "$1"
    build "$trees/old" quantune-old
    if [[ $# -eq 2 ]]; then
        git worktree add --quiet --detach "$trees/new" "$2"
        build "$trees/new" quantune-new
    else
        build "$root" quantune-new
    fi
    old="$trees/quantune-old" new="$trees/quantune-new"
fi
python3 scripts/check/same_bytes.py "$old" "$new"
