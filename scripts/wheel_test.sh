#!/bin/sh
# Test what users install: wheel_test.sh PYTHON TORCH_REQUIREMENT [PYTEST_ARGUMENTS...]
# Builds the sdist and from it the wheel, installs the wheel in a clean environment and runs tests from a folder
# where the checkout cannot be imported. PYTHON needs the package `build`.
set -eu

python=$1
torch=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
case $python in /*) ;; *) python=$root/$python ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM

echo "== building the sdist and the wheel"
"$python" -m build --outdir "$work/dist" "$root"

echo "== installing the wheel in a clean environment"
PYTHON=$python sh "$root/scripts/setup_venv.sh" "$work/venv" "$torch" "$(echo "$work"/dist/*.whl)[test]"

# the tests alone, with pytest's settings, and nothing of the packages
mkdir "$work/tree"
cp -R "$root/tests" "$root/pyproject.toml" "$work/tree/"
cd "$work/tree"
unset PYTHONPATH

echo "== the command, from the wheel"
"$work/venv/bin/hf-mamba" env
"$work/venv/bin/hf-mamba" generate demo "The family of" --device cpu --max-new-tokens 16

echo "== the tests, against the wheel"
# the whole suite runs in the checkout; here the parts that packaging can break, to stay within CI's time:
# what is in the wheel, imports and layers, the command, each model family and one op
[ $# -gt 0 ] || set -- tests/test_packaging.py tests/test_layering.py tests/test_env.py tests/test_cli.py \
    tests/models/test_parity.py tests/ops/test_norm.py
HF_MAMBA_TEST_INSTALLED=1 OMP_NUM_THREADS=1 "$work/venv/bin/python" -m pytest \
    -m "not gpu and not checkout" -n "${JOBS:-2}" --dist worksteal "$@"
