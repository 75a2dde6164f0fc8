# Needs only Python 3.11 or newer, make and git: everything else is installed into .venv.
SHELL := /bin/bash
PYTEST_ARGS ?=
ARGS ?=
# Ends everything that a command has started, however the command ends.
WATCHED := .venv/bin/python -S tests/watcher.py .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help run test suite unit check chaos profile bench bench-limiter bench-gateway bench-limits clients suites audit canary setup-system lock clean

help:
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name what; do \
		printf '  make %-13s %s\n' "$$name" "$$what"; done

run: ## Start everything on http://localhost:8000; Ctrl-C stops it (ARGS="--api 2 --workers 2")
	@scripts/bootstrap.sh run && exec .venv/bin/python -m tidegate up $(ARGS)

test: ## Run the checks and the whole test suite (PYTEST_ARGS="tests/unit -k words")
	@scripts/bootstrap.sh dev
	@scripts/setup_system.sh
	@.venv/bin/python -S tests/watcher.py $(MAKE) --no-print-directory -j2 check suite

suite:
	@.venv/bin/python scripts/suite.py $(PYTEST_ARGS)

unit: ## Run the fast tests that need no server (PYTEST_ARGS="-k words")
	@scripts/bootstrap.sh dev
	@scripts/setup_system.sh
	@.venv/bin/python -m pytest tests/unit tests/property -n2 --dist worksteal -m "not (valkey or postgres or browser or slow)" $(PYTEST_ARGS)

check: ## Lint, format, types and import contracts
	@scripts/bootstrap.sh dev
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy
	@.venv/bin/lint-imports

chaos: ## Fault injection at full size: kills, pauses and network cuts, checked at the provider
	@scripts/bootstrap.sh dev
	@$(WATCHED) -m chaos.limiter --seconds 60
	@TIDEGATE_MODEL_STEPS=200000 TIDEGATE_MODEL_SEED=$$(date +%s) .venv/bin/python -m pytest tests/property -n0 -s
	@.venv/bin/python -m pytest tests/unit tests/contract -n0 -m hypothesis --hypothesis-profile=deep --timeout 1800
	@TIDEGATE_SCHEMA_EXAMPLES=300 .venv/bin/python -m pytest tests/integration/described -n0 -s --timeout 1800
	@.venv/bin/python -m pytest chaos -n0 -s $(PYTEST_ARGS)
	@$(WATCHED) -m chaos.soak --minutes 5

profile: ## CPU time of a call, a stream, a job and a batch's line, by package (ARGS="--only call --functions 30")
	@scripts/bootstrap.sh dev
	@$(WATCHED) -m bench.profile $(ARGS)

bench: ## Measure, and print the figures with the machine that they come from
	@scripts/bootstrap.sh dev
	@$(WATCHED) -m bench

bench-limiter: ## Measure the limiter beside its peers, in one run (ARGS="--only ours --scenario load-50-20")
	@scripts/bootstrap.sh dev
	@$(WATCHED) -m bench.limiter $(ARGS)

bench-gateway: ## Measure the relay and the job path beside other gateways, in one run (ARGS="--quick --only tidegate")
	@scripts/bootstrap.sh dev
	@scripts/setup_system.sh bench
	@$(WATCHED) -m bench.gateway $(ARGS)

bench-limits: ## Measure limits against emulated providers that count as the real ones do (ARGS="--only openai --window 10")
	@scripts/bootstrap.sh dev
	@$(WATCHED) -m bench.limits $(ARGS)

clients: ## Try real SDKs, frameworks and coding agents on a keyless gateway (ARGS="--only openai")
	@scripts/bootstrap.sh dev
	@.venv/bin/python -m clients $(ARGS)

suites: ## Run the SDKs' own tests through the gateway, on mocks of their APIs (ARGS="openai --json out.json")
	@scripts/bootstrap.sh dev
	@for suite in $(if $(ARGS),once,openai anthropic); do \
		.venv/bin/python -m clients.suites $(or $(ARGS),$$suite) || exit; \
	done

audit: ## Check all pinned versions for known vulnerabilities (needs a network)
	@scripts/bootstrap.sh dev
	@.venv/bin/python scripts/audit.py

canary: ## Run the contract tests on the newest releases of packages whose internals are used
	@scripts/bootstrap.sh dev
	@scripts/canary.sh $(PYTEST_ARGS)

setup-system: ## Install the system packages that the tests need, or name the missing ones
	@scripts/setup_system.sh

lock: ## Update uv.lock and requirements.txt after a change of pyproject.toml
	@scripts/bootstrap.sh dev
	@.venv/bin/uv lock --quiet
	@.venv/bin/uv export --quiet --frozen --all-extras --no-extra export --no-dev --no-hashes --no-header --output-file requirements.txt

clean: ## Remove the environment and all caches; your data stays
	@rm -rf .venv .canary .bench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
