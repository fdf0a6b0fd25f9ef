# make demo: set up, fine-tune a small AbSViT on the embedded corpus, evaluate it, leave a picture (under 8 minutes on 2 cores).
# make web: set up, and serve a web page where the model that comes with vlabs answers questions (no network).
# make test: set up and run the tests.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo web test lint setup clean

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@echo "== set-up: a virtual environment in .venv, and the packages (about 6 GB, some minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: vlabs needs Python 3.11 or later; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/python -m vlabs.demo --out $(DEMO)

web: setup
	@$(BIN)/python -m vlabs.demo_page

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv $(DEMO) outputs data
