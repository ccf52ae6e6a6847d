#!/usr/bin/env bash
# Memory errors in the code that reads files of strangers: memory maps, casts, block types, tokenizers, templates.
#
#   scripts/check/sanitizers.sh [DIR]
#
# Runs the tests of weights/, quant/, data/ and text/ with their hostile inputs under valgrind's memcheck (Debian: valgrind), then the
# files of DIR, if given, through the binary: `*.gguf` and `*.safetensors` by `inspect`, `*.json` as a tokenizer.json by
# `tokenizer encode`, `*.jinja` as a chat template by `data`. An error of memory, a panic or a signal fails; a reported error does not.
#
# Memcheck has no AVX-512: kernels run on the ISA level QUANTUNE_ISA, avx2 unless set. SANITIZER=address runs the same under
# AddressSanitizer instead, through RUSTC_BOOTSTRAP; that rebuilds every dependency. TESTS replaces the filters of the library's
# tests, INTEGRATION those of the integration tests ("" skips them).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$root"
export QUANTUNE_ISA="${QUANTUNE_ISA:-avx2}" RAYON_NUM_THREADS="${RAYON_NUM_THREADS:-2}" PROPTEST_CASES="${PROPTEST_CASES:-16}"
tests="${TESTS-quant:: data:: weights:: text:: ops::row_dot ops::worker_pool}"
integration="${INTEGRATION-weights:: data:: text::}"
target="${CARGO_TARGET_DIR:-$root/target}" build=(cargo test --no-run --message-format=json) under=()
if [[ "${SANITIZER:-}" == address ]]; then
    triple="$(rustc -vV | sed -n 's/^host: //p')"
    export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address" ASAN_OPTIONS="detect_leaks=0"
    build+=(--target "$triple")
    target="$target/$triple"
else
    command -v valgrind >/dev/null || { echo "valgrind is not installed" >&2; exit 2; }
    under=(valgrind --quiet --error-exitcode=99 --leak-check=no --trace-children=yes)
fi

# The test binary of a cargo target; builds it first.
binary() { "${build[@]}" "$@" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1; }

failed=0
check() { # what it is, then the command
    local name="$1" rc=0 log
    shift
    log="$(mktemp)"
    "${under[@]}" "$@" >"$log" 2>&1 </dev/null || rc=$?
    if ((rc == 99 || rc >= 101)) || { [[ "$name" == tests* ]] && ((rc)); } || grep -q 'AddressSanitizer' "$log"; then
        echo "FAILED ($rc): $name"
        tail -n 60 "$log"
        failed=1
    else
        echo "ok: $name: $(grep -E '^test result|^error|^Error' "$log" | tail -n 1)"
    fi
    rm -f "$log"
}

library="$(binary --lib)"
# shellcheck disable=SC2086 # filters are words
check "tests of the library: $tests" "$library" --test-threads 2 $tests
if [[ -n "$integration" ]]; then
    # shellcheck disable=SC2086
    check "tests of files: $integration" "$(binary --test integration)" --test-threads 2 $integration
fi

if [[ $# -gt 0 ]]; then
    "${build[@]}" --bin quantune >/dev/null
    cargo build --quiet ${triple:+--target "$triple"} --bin quantune
    quantune="$target/debug/quantune"
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    echo 'Hello, 1234 naïve world! <|im_start|>' >"$work/text"
    echo '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}' >"$work/rows.jsonl"
    while IFS= read -r file; do
        rm -rf "$work/model"
        cp -r tests/golden/model/llama-tiny "$work/model"
        case "$file" in
            *.gguf | *.safetensors) check "$file" timeout 600 "$quantune" inspect "$file" ;;
            *.json)
                cp "$file" "$work/model/tokenizer.json"
                check "$file" timeout 600 "$quantune" tokenizer encode --base "$work/model" --text "$work/text"
                ;;
            *.jinja)
                cp "$file" "$work/model/chat_template.jinja"
                check "$file" timeout 600 "$quantune" data --base "$work/model" --data "$work/rows.jsonl"
                ;;
        esac
    done < <(find "$1" -type f | sort)
fi
exit "$failed"
