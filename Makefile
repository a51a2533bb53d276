# make demo   set up and draw a grid of Chinese prompts with the shipped weights
# make test   set up and run the tests
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-peer lint

# Reused as long as pyproject.toml does not change.
.venv/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bdm needs Python 3.11 or newer; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/bdm demo --out demo.png

test: .venv/.ready lint
	$(BIN)/pytest

test-slow: .venv/.ready
	$(BIN)/pytest -m slow

# diffusers' own tests of pipelines, out of a checkout: make test-peer BDM_DIFFUSERS=FOLDER
test-peer: .venv/.ready
	@test -d "$(BDM_DIFFUSERS)/tests/pipelines" || { echo "give a checkout: make test-peer BDM_DIFFUSERS=FOLDER"; exit 2; }
	BDM_DIFFUSERS="$(BDM_DIFFUSERS)" $(BIN)/pytest -m peer tests/peer

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
