#!/bin/sh
# Runs the tests of everything that is compiled under AddressSanitizer and UndefinedBehaviorSanitizer: with the compiler
# in CXX, or with each of g++ and clang++ that is here. Then CALLS random calls, or 500.
#     tests/ops/sanitize.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/../.."
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
flags="-g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

first_file() { # of the names that a compiler knows the place of
    compiler=$1
    shift
    for name; do
        path=$($compiler -print-file-name="$name")
        if [ -e "$path" ]; then echo "$path"; return; fi
    done
    echo "$compiler has none of: $*" >&2
    return 1
}

sanitized() {
    LD_PRELOAD=$runtime TORCH_EXTENSIONS_DIR=$cache PYTHONPATH=.:tests ASAN_OPTIONS=detect_leaks=0 \
        UBSAN_OPTIONS=print_stacktrace=1 "${PYTHON:-python}" "$@" # Python itself keeps what it allocates
}

run() {
    # The runtime must be loaded before Python. Clang's holds that of UndefinedBehaviorSanitizer too.
    if $1 --version | grep -q clang; then
        export CXX="$1 $flags -shared-libsan"
        runtime=$(first_file "$1" libclang_rt.asan.so "libclang_rt.asan-$(uname -m).so")
    else
        export CXX="$1 $flags"
        runtime="$(first_file "$1" libasan.so) $(first_file "$1" libubsan.so)"
    fi
    shift
    echo "== $CXX"
    # Left out: torch.compile, whose own compiler runs would be sanitized too; Triton's interpreter, which is not ours;
    # what is about building or about how much memory is used; and forks beside running threads, for which the
    # sanitizers' own allocators deadlock.
    sanitized -m pytest -q -n 0 -p no:cacheprovider tests/ops --ignore tests/ops/test_build.py \
        --ignore tests/ops/attention/test_triton.py --ignore tests/ops/attention/test_fused_memory.py \
        -k "not compile and not interpreter and not child_process" "$@"
    sanitized tests/fuzz_ops.py --n "${CALLS:-500}"
}

if [ -n "${CXX:-}" ]; then
    run "$CXX" "$@"
else
    found=
    for compiler in g++ clang++; do
        if command -v $compiler >/dev/null; then found=yes; run $compiler "$@"; CXX=; fi
    done
    [ -n "$found" ] || { echo "there is neither g++ nor clang++" >&2; exit 1; }
fi
