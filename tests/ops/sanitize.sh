#!/bin/sh
# Runs the tests of the compiled operations under AddressSanitizer and UndefinedBehaviorSanitizer. Needs g++ with both.
#     tests/ops/attention/sanitize.sh [pytest arguments]
set -eu
cd "$(dirname "$0")/../../.."
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export TORCH_EXTENSIONS_DIR="$cache"
export CXX="g++ -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0  # Python itself keeps what it allocates
export UBSAN_OPTIONS=print_stacktrace=1
# Left out: torch.compile, whose own compiler runs would be sanitized too, Triton's interpreter, which is not ours, and
# the tests of building and of memory use.
PYTHONPATH=.:tests "${PYTHON:-python}" -m pytest -q -p no:cacheprovider \
    tests/ops/attention/test_fused_accuracy.py tests/ops/attention/test_fused_dropout.py tests/ops/attention/test_fused_op.py \
    tests/ops/test_dropout.py tests/ops/test_gelu.py tests/ops/test_products.py \
    -k "not compile and not interpreter" "$@"
