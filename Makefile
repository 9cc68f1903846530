# `make help` lists what there is. PYTHON=python3.12 picks the interpreter, ARGS="k=v ..." goes to the command.
.DEFAULT_GOAL := help
.PHONY: help setup rollout bench bench-full bench-core test test-unit coverage lint format lock clean

VENV ?= .venv
export VENV PYTHON

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

setup:  ## .venv with every pin of requirements/lock-cpu.txt; a no-op when nothing changed
	@requirements/setup.sh

rollout: setup  ## train the tiny policy (once), then roll out toy SWE tasks: ARGS="rollout.n=8 ..."
	$(VENV)/bin/python recipes/tiny_policy/train.py
	$(VENV)/bin/thunder-rollout rollout $(ARGS)

bench: setup  ## compare the scheduling policies on two real CPU engines (25 min)
	$(VENV)/bin/thunder-rollout bench $(ARGS)

bench-full: setup  ## the same for all policies, workloads and model sizes, not each with each (3 h); goes on where it was stopped
	$(VENV)/bin/thunder-rollout bench plan=full $(ARGS)

bench-core: setup  ## CPU time of the scheduler's decisions: 10,000 programs on 512 backends (half a minute)
	$(VENV)/bin/thunder-rollout bench-core $(ARGS)

test: setup  ## everything this machine can test: unit, docker, ray, vllm, verl
	@$(VENV)/bin/python -m pytest tests $(ARGS)

test-unit: setup  ## the quick ones, without Ray, vLLM or Docker: a minute or two
	@$(VENV)/bin/python -m pytest tests/unit -m "not slow" $(ARGS)

coverage: setup  ## branch coverage of the core by its own unit tests
	@$(VENV)/bin/python -m pytest tests/unit/core -q -m "not slow" --cov --cov-report=term

lint: setup  ## ruff, mypy, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: setup  ## rewrite in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lock: setup  ## resolve requirements/cpu.in again: ARGS=--upgrade moves every pin forward
	$(VENV)/bin/python requirements/lock.py $(ARGS)

clean:  ## what can be made again, .venv included; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage
