#!/usr/bin/env bash
# Runs the contract tests with the newest release of each package whose internals are used, beyond
# the bounds in pyproject.toml: a failure here would occur when the bound is raised. The project is
# not changed; the environment is .canary.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=(uvicorn google-genai httpx2 redis prometheus-client)
tests=(
    tests/contract
    tests/integration/http_input
    tests/integration/servers
    tests/unit/upstream
    tests/unit/test_tally.py
)

uv=$PWD/.venv/bin/uv
[[ -x .canary/bin/python ]] || "$uv" venv --quiet --python .venv/bin/python .canary
UV_PROJECT_ENVIRONMENT=.canary "$uv" sync --quiet --frozen --all-extras --group dev
"$uv" pip install --quiet --python .canary/bin/python --upgrade "${packages[@]}"
for package in "${packages[@]}"; do
    .canary/bin/python -c 'import sys; from importlib.metadata import version
print(f"  {sys.argv[1]} {version(sys.argv[1])}")' "$package"
done
exec .canary/bin/python -m pytest -n 2 -q "${tests[@]}" "$@"
