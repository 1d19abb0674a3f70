# The virtual environment is made on first use, and again when pyproject.toml or its pinned versions change.
PYTHON ?= python3
VENV := .venv
PINS := requirements.lock
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-quick test-all test-oldest test-newest lint docs bench soak lock clean

demo: $(READY)            ## the whole job on a subject of the tiny world, into demo/
	rm -rf demo
	$(BIN)/etherdiff demo --output demo

test: lint test-quick     ## style, types and the quick tests

test-quick: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-oldest:              ## the quick tests with the lowest versions that pyproject.toml allows, in .venv-oldest
	$(MAKE) test-quick VENV=.venv-oldest PINS="requirements-oldest.txt --exactly"

test-newest:              ## the quick tests with the newest versions that pyproject.toml allows, in .venv-newest
	rm -f .venv-newest/.ready
	$(MAKE) test-quick VENV=.venv-newest PINS=

test-all: $(READY) lint   ## the slow proofs as well
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)            ## build the documentation and serve it on http://127.0.0.1:8000
	$(BIN)/python scripts/make_reference.py
	$(BIN)/python -m sphinx -W -q -b html docs build/docs
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory build/docs 8000

bench: $(READY)           ## what an adapter costs, beside its peers (about 15 minutes on 2 cores)
	$(BIN)/python benchmarks/adapter_step.py --json adapter_step.json

soak: $(READY)            ## kill, corrupt and resume a tiny run 50 times (about 20 minutes); KILLS=5 for a short one
	$(BIN)/python benchmarks/soak.py --kills $(or $(KILLS),50)

lock:                     ## what pip would install now, and the lowest bounds: requirements.lock, requirements-oldest.txt
	$(PYTHON) scripts/environment.py lock

$(READY): pyproject.toml $(firstword $(PINS))
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python scripts/environment.py install $(PINS)
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest demo build *.egg-info
