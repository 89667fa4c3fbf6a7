#!/usr/bin/env bash
# A user without a checkout: builds the wheel, installs it into the new virtual environment ENVIRONMENT with what it
# asks for, and trains, generates, plans and measures in an empty folder.
#
#     tests/wheel.sh ENVIRONMENT [PYTHON]
set -euo pipefail
[[ $# -ge 1 && ! -e $1 ]] || { sed -n '2,5p' "$0" >&2; exit 2; }
checkout=$(cd "$(dirname "$0")/.." && pwd)
"${2:-python3}" -m venv "$1"
environment=$(cd "$1" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
"$environment/bin/pip" wheel -qq --no-deps --wheel-dir "$folder/wheel" "$checkout"
"$environment/bin/pip" install -qq "$folder"/wheel/*.whl
mkdir "$folder/empty" && cd "$folder/empty"
minigpt2=$environment/bin/minigpt2
"$environment/bin/python" -c "import minigpt2; print('installed:', minigpt2.__file__)"
"$minigpt2" info
"$minigpt2" train --max-steps 3 --n-layer 2 --n-head 2 --n-embd 32 --length 64 --out run
"$minigpt2" generate --model run --prompt "import " --max-new-tokens 20
"$minigpt2" plan --model run --batch 2 --length 64
"$minigpt2" bench step --model small --batch 1 --length 32 --steps 2
