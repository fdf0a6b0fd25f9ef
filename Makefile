# make demo: set up, fine-tune a small AbSViT on the embedded corpus, evaluate it, leave a picture (under 8 minutes on 2 cores).
# make web: set up, and serve a web page where the model that comes with vlabs answers questions (no network).
# make test: set up and run the tests.
# make test-oldest: install the oldest versions that pyproject.toml allows, in .venv-oldest, and run the core of the tests.
# make docs: set up and build the site in site/.
#
# TORCH=cpu: PyTorch without CUDA, from its own index: a small part of the download. LOCKED=1: the exact versions that
# the tests ran with. Both are of the set-up, so of the first make in a checkout; they exclude each other.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo web test test-oldest lint docs lock setup clean

# What the demo needs; the page, and tests, lint and documentation, need more.
setup: .venv/.installed

PIP := $(BIN)/pip install -q --disable-pip-version-check
UV := $(PIP) uv && VIRTUAL_ENV=.venv $(BIN)/uv pip
ifdef LOCKED
install = $(UV) sync -q requirements.lock && VIRTUAL_ENV=.venv $(BIN)/uv pip install -q --no-deps -e .
else ifdef TORCH
install = $(UV) install -q --torch-backend=$(TORCH) -e '.$(1)'
else
install = $(PIP) -e '.$(1)'
endif

.venv/.installed: pyproject.toml
	@echo "== set-up: a virtual environment in .venv, and the packages (about 6 GB, most of it CUDA; TORCH=cpu takes less)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: vlabs needs Python 3.11 or later; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(call install,)
	@touch $@

.venv/.web: .venv/.installed
	$(call install,[web])
	@touch $@

.venv/.dev: .venv/.installed
	$(call install,[dev])
	@touch $@

demo: setup
	@$(BIN)/python -m vlabs.demo --out $(DEMO)

web: .venv/.web
	@$(BIN)/python -m vlabs.demo_page

test: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Models, checkpoints, what files of others may do, and a training, its evaluation and going on with it.
CORE := models backbones pretrained released hub damaged security registry data train resume lora prepare_datasets

.venv-oldest/.installed: pyproject.toml | .venv/.dev
	$(BIN)/uv venv -q --clear --seed --python $(BIN)/python .venv-oldest
	VIRTUAL_ENV=.venv-oldest $(BIN)/uv pip install -q --resolution lowest-direct -e '.[dev]'
	@touch $@

test-oldest: .venv-oldest/.installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n auto --dist loadfile $(wildcard $(CORE:%=tests/test_%.py))

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Exact versions of all that the tests need, for every platform; written from what is installed here.
lock: .venv/.dev
	$(BIN)/pip freeze --exclude-editable --exclude pip > .venv/constraints.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11.5 --generate-hashes --no-header \
	    --no-annotate --no-emit-index-url --quiet --constraints .venv/constraints.txt --output-file requirements.lock

# What make made: never outputs or data, and of the demo's folder only what the demo left there.
clean:
	rm -rf .venv .venv-oldest site
	@if [ "$$(cat '$(DEMO)/.vlabs' 2>/dev/null)" = demo ]; then \
	    cd '$(DEMO)' && rm -rf run evaluation grounding picture.png .vlabs .vlabs-lock; \
	    cd - >/dev/null && rmdir '$(DEMO)' 2>/dev/null || true; \
	fi
