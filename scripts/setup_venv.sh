#!/bin/sh
# Create or update a virtual environment: setup_venv.sh FOLDER TORCH_REQUIREMENT PIP_INSTALL_ARGUMENTS...
# PYTHON chooses the interpreter; without it, the first Python >= 3.10 on the path is taken.
set -eu

venv=$1
torch=$2
shift 2

fail() {
    printf '\nerror: %s\n' "$1" >&2
    exit 1
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON=$PYTHON: there is no such program."
    recent_enough "$PYTHON" ||
        fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1); hf_mamba needs Python 3.10 or newer. Give another one: make ... PYTHON=python3.12"
    python=$PYTHON
else
    python=
    for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
        if command -v "$candidate" >/dev/null 2>&1 && recent_enough "$candidate"; then
            python=$candidate
            break
        fi
    done
    [ -n "$python" ] || fail "no Python 3.10 or newer was found on the path (python3 is $(python3 --version 2>&1 || echo missing)).
Install one and name it: make ... PYTHON=/path/to/python3.12"
fi

if [ -x "$venv/bin/python" ] && [ -n "${PYTHON:-}" ]; then
    # another interpreter was asked for: the packages inside would not fit it
    wanted=$("$python" -c 'import sys; print(*sys.version_info[:3])')
    [ "$("$venv/bin/python" -c 'import sys; print(*sys.version_info[:3])' 2>/dev/null)" = "$wanted" ] || rm -rf "$venv/bin" "$venv/lib"
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "[1/3] creating $venv with $("$python" --version 2>&1)"
    "$python" -m venv "$venv" || fail "$python cannot create virtual environments.
On Debian and Ubuntu: sudo apt-get install python3-venv"
else
    echo "[1/3] $venv exists: $("$venv/bin/python" --version 2>&1)"
fi

echo "[2/3] installing $torch (on Linux the default torch brings its GPU libraries: some gigabytes)"
"$venv/bin/python" -m pip install --disable-pip-version-check "$torch" ||
    fail "pip could not install $torch. Choose another: make ... TORCH=torch==2.13.0"

echo "[3/3] installing $*"
"$venv/bin/python" -m pip install --disable-pip-version-check "$@" ||
    fail "pip could not install $*; its own message stands above."
echo "$venv is ready"
