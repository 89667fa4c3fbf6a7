#!/usr/bin/env bash
# The supported range: pytest with the lowest and with the newest of everything that pyproject.toml admits, on each
# Python; a line a pair. The environments are new, of several GB each, and gone afterwards.
#
#     tests/matrix.sh [-p "3.10 3.11 3.12 3.13"] [-v "lowest newest"] [ARGUMENTS OF PYTEST]
set -uo pipefail
cd "$(dirname "$0")/.."
pythons="3.10 3.11 3.12 3.13" versions="lowest newest"
while getopts p:v: option; do
    case $option in p) pythons=$OPTARG ;; v) versions=$OPTARG ;; *) exit 2 ;; esac
done
shift $((OPTIND - 1))
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH

lowest='
import pathlib, re
from pip._vendor.packaging.requirements import Requirement
for text in re.findall(r"^    \"([a-z_-]+>=[^\n]*)\",", pathlib.Path("pyproject.toml").read_text(), re.MULTILINE):
    requirement = Requirement(text.replace("\\\"", "\""))
    if requirement.marker is None or requirement.marker.evaluate():
        print(f"{requirement.name}{requirement.specifier}".replace(">=", "=="))
'
shown='
from importlib.metadata import version
names = "torch", "transformers", "numpy", "safetensors", "tiktoken", "tyro", "huggingface_hub", "tqdm"
print(*[f"{version(name).split(chr(43))[0]:<15}" for name in names], sep=" | ")
'

failed=0
printf '| Python | %-15s | %-15s | %-15s | %-15s | %-15s | %-15s | %-15s | %-15s | pytest |\n' \
    torch transformers numpy safetensors tiktoken tyro huggingface_hub tqdm
for python in $pythons; do
    interpreter=
    for candidate in "python$python" "$HOME/.pyenv/versions/$python."*/bin/python; do
        if "$candidate" -c "" 2>/dev/null; then interpreter=$candidate; break; fi # a shim of pyenv's may fail
    done
    [[ -n $interpreter ]] || { echo "| $python | is not on this machine |"; continue; }
    for version in $versions; do
        environment=$folder/$python-$version log=$folder/log
        result="not installed" versions_found=
        if "$interpreter" -m venv "$environment" && : >"$folder/bounds" &&
            { [[ $version == newest ]] || "$environment/bin/python" -c "$lowest" >"$folder/bounds"; } &&
            "$environment/bin/pip" install -qq --no-cache-dir -c "$folder/bounds" -e '.[test]' >"$log" 2>&1; then
            versions_found=$("$environment/bin/python" -c "$shown")
            "$environment/bin/python" -m pytest -q -p no:cacheprovider "$@" >"$log" 2>&1 || failed=1
            result=$(tail -1 "$log")
        else
            failed=1
        fi
        echo "| $python   | $versions_found | $result |"
        grep -E '^(FAILED|ERROR)' "$log" | head -20
        rm -rf "$environment"
    done
done
exit $failed
