#!/usr/bin/env bash
# Updates .venv to uv.lock: `bootstrap.sh run` for the product with all its extras, `bootstrap.sh
# dev` also for the development tools. It is fast if nothing has changed: a stamp in .venv contains
# the digest of what was installed.
set -euo pipefail
cd "$(dirname "$0")/.."

UV_VERSION=0.13.9
want=${1:-run}

fail() {
    echo "tidegate: $1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

has_venv() {
    "$1" -c 'import ensurepip, venv' >/dev/null 2>&1
}

# Prefers 3.13 and 3.12 to 3.11, which needs more CPU time for the same work.
find_python() {
    local name
    if [[ -n ${PYTHON:-} ]]; then
        new_enough "$PYTHON" || fail "needs Python 3.11 or newer, and PYTHON=$PYTHON is not that"
        echo "$PYTHON"
        return
    fi
    for name in python3.13 python3.12 python3 python3.11 python3.14; do
        if new_enough "$name" && has_venv "$name"; then
            echo "$name"
            return
        fi
    done
    for name in python3 python3.11; do
        if new_enough "$name"; then
            echo "$name" # its own message says what it lacks
            return
        fi
    done
    fail "needs Python 3.11 or newer, and found none as python3 or python3.11 to python3.14"
}

usable() {
    # After a folder was moved, its scripts point to the old place.
    new_enough .venv/bin/python && grep -qF "$PWD/.venv" .venv/bin/activate 2>/dev/null
}

# Settings of the caller's shell that would install packages, or uv itself, elsewhere. Settings of
# where packages come from (indexes, proxies, certificates) stay in force.
unset VIRTUAL_ENV PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
unset UV_PYTHON UV_PROJECT UV_WORKING_DIRECTORY UV_LOCKED UV_NO_DEV UV_NO_DEFAULT_GROUPS
unset UV_NO_SYNC UV_NO_EDITABLE UV_NO_GROUP
export UV_PROJECT_ENVIRONMENT=.venv

usable || {
    python=$(find_python)
    rm -rf .venv
    echo "tidegate: making .venv with $("$python" --version)" >&2
    problem=$("$python" -m venv .venv 2>&1) || {
        rm -rf .venv
        echo "$problem" >&2
        fail "$python cannot make a virtual environment (on Debian: apt install python3-venv)"
    }
}

digest=$(.venv/bin/python -c '
import hashlib, pathlib, sys
files = b"".join(pathlib.Path(name).read_bytes() for name in ("uv.lock", "pyproject.toml"))
print(hashlib.sha256(files + sys.version.encode()).hexdigest())
')

installed() {
    [[ $(cat ".venv/.installed-$1" 2>/dev/null) == "$digest" ]]
}

if installed dev || { [[ $want == run ]] && installed run; }; then
    exit 0
fi

[[ $(.venv/bin/uv --version 2>/dev/null) == "uv $UV_VERSION"* ]] ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "uv==$UV_VERSION" ||
    fail "pip could not install uv $UV_VERSION: is the package index reachable?"

groups=(--no-dev --no-extra export) # pyarrow is large, and for one command
[[ $want == dev ]] && groups=(--group dev)
# --inexact keeps uv and pip, which are in .venv and in no lock file.
.venv/bin/uv sync --quiet --frozen --inexact --compile-bytecode --all-extras "${groups[@]}" ||
    fail "uv could not install what uv.lock names: see its message above"
# Compile our own modules once for all processes, even if PYTHONDONTWRITEBYTECODE is set.
.venv/bin/python -m compileall -q -j 0 src
echo "$digest" >".venv/.installed-$want"
