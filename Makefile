# The virtual environment is made on first use, and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-all lint bench soak clean

demo: $(READY)            ## the whole job on a subject of the tiny world, into demo/
	rm -rf demo
	$(BIN)/etherdiff demo --output demo

test: $(READY) lint       ## style, types and the quick tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(READY) lint   ## the slow proofs as well
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)           ## what an adapter costs, beside its peers (about 15 minutes on 2 cores)
	$(BIN)/python benchmarks/adapter_step.py --json benchmarks/adapter_step.json

soak: $(READY)            ## kill, corrupt and resume a tiny run 50 times (about 20 minutes); KILLS=5 for a short one
	$(BIN)/python benchmarks/soak.py --kills $(or $(KILLS),50)

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo build *.egg-info
