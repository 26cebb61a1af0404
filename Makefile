# `make test`, `make lint`, `make demo` and `make bench` set up what they need by themselves: see CONTRIBUTING.md.
# ARGS="..." is passed on:  make test ARGS="tests/core -k retransmit"

PYTHON ?=
ARGS ?=
BIN := .venv/bin
# An environment that forbids .pyc files makes each `netstack run` compile itself anew, which is most of its start-up.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup packages lint fmt test coverage demo bench clean distclean

help: ## what can be made
	@sed -n 's/^\([a-z]*\):[^#]*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-16s %s\n", $$1, $$2 }'

setup: .venv/.ready packages ## the whole set-up: .venv, and where root the Debian packages

.venv/.ready: pyproject.toml scripts/constraints.txt scripts/setup-venv.sh
	@PYTHON='$(PYTHON)' scripts/setup-venv.sh

packages:
	@scripts/setup-debian.sh

lint: .venv/.ready ## ruff (format and rules), mypy --strict, pyright, shellcheck
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/shellcheck scripts/*.sh .ci/run netstack/control/agent/agent.sh

fmt: .venv/.ready ## formats the code and mends what ruff can mend safely
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

test: setup ## all tests that this machine can run; says what it leaves out (HYPOTHESIS_PROFILE=deep: hours)
	$(BIN)/python -m pytest $(ARGS)

coverage: setup ## the tests, and what they did not run
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

demo: setup ## boots a Linux guest in QEMU behind netstack and shows its network at work
	$(BIN)/python -m examples.demo $(ARGS)

bench: setup ## netstack against its peers; writes benchmarks/ (some minutes)
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## removes what the tools left, but keeps .venv
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov artifacts
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## removes .venv and the unpacked kernel too
	rm -rf .venv .cache
