# make demo            set up and draw a grid of Chinese prompts with the shipped weights
# make test            set up, check style and types, run the tests
# make test-slow       the tests that take minutes
# make test-peer       diffusers' own tests of pipelines, out of a checkout (BDM_DIFFUSERS=FOLDER)
# make test-comfyui    the nodes in ComfyUI itself, out of a checkout (BDM_COMFYUI=FOLDER, BDM_COMFYUI_PYTHON=PYTHON)
# make test-versions   the tests with the oldest and with the newest packages that pyproject.toml allows
# make gpu             the tests and benches that need a GPU, in under eight minutes; the last line is JSON
# make docs            build the documentation into docs/_build
# make lint            check style and types
# make dist            a wheel and a source archive in dist/
# make lock            lock every package anew (make lock UPGRADE=--upgrade: to its newest release)
PYTHON ?= python3
UPGRADE ?=
BIN := .venv/bin
UV := .venv-tools/bin/uv

.PHONY: help demo test test-slow gpu test-peer test-comfyui test-versions test-oldest test-newest docs lint dist lock

help:
	@sed -n 's/^# //p' Makefile

# Reused as long as what it is made from does not change. constraints.txt names the version of everything that is
# installed, and of what builds it.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bdm needs Python 3.11 or newer; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[dev]'
	touch $@

.venv-tools/.ready: constraints.txt
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install --quiet --constraint constraints.txt pip uv
	touch $@

demo: .venv/.ready
	$(BIN)/bdm demo --out demo.png

# A file's tests stay in one process: they share what is made once a file, such as the built pages.
test: .venv/.ready lint
	$(BIN)/pytest --numprocesses 2 --dist loadfile

test-slow: .venv/.ready
	$(BIN)/pytest -m slow

gpu: .venv/.ready
	$(BIN)/bdm bench gpu configs/bench/gpu.yaml

test-peer: .venv/.ready
	@test -d "$(BDM_DIFFUSERS)/tests/pipelines" || { echo "give a checkout: make test-peer BDM_DIFFUSERS=FOLDER"; exit 2; }
	BDM_DIFFUSERS="$(BDM_DIFFUSERS)" $(BIN)/pytest -m peer tests/peer

test-comfyui: .venv/.ready
	@test -f "$(BDM_COMFYUI)/comfy/controlnet.py" || { echo "give a checkout: make test-comfyui BDM_COMFYUI=FOLDER"; exit 2; }
	BDM_COMFYUI="$(BDM_COMFYUI)" $(BIN)/pytest -m peer -rP tests/comfyui

# Environments of their own, made anew. Old releases warn of each other, so warnings are no errors there.
test-versions: test-oldest test-newest

test-oldest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-oldest test-newest: test-%: .venv-tools/.ready
	$(UV) venv --quiet --clear --python $(PYTHON) .venv-$*
	$(UV) pip install --quiet --python .venv-$* --resolution $(RESOLUTION) --editable '.[dev,samplers]'
	$(UV) pip list --quiet --python .venv-$*
	.venv-$*/bin/pytest -W default

docs: .venv/.ready
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

dist: .venv-tools/.ready
	$(UV) build --build-constraints constraints.txt

lock: .venv-tools/.ready
	$(UV) pip compile --quiet --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock" \
		$(UPGRADE) pyproject.toml --extra dev --group setup --output-file constraints.txt
