# `make` prints the targets. Each target first sees to it that .venv is there and up to date.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env book pdf test mutants bench notebooks format lint clean

VENV  := .venv
BIN   := $(VENV)/bin
# Written last, so that a half-made .venv is never taken for a finished one.
READY := $(VENV)/.ready

# The Python that makes .venv: the first of these that runs, is new enough and can make one.
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

# pytest's worker processes: `make test WORKERS=0` runs everything in one.
WORKERS ?= auto

NOTEBOOKS = $(wildcard book/*.ipynb)
CXX_FILES = $(shell find convt_lab book -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY)  ## make .venv from requirements.txt, or bring it up to date

$(READY): requirements.txt pyproject.toml
	@python="$(PYTHON)"; \
	$${python:-false} -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' || { \
		echo "convt_lab needs Python 3.11 or newer that can make a virtual environment."; \
		echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one:"; \
		echo "    make PYTHON=/path/to/python3.12"; \
		exit 1; \
	} >&2; \
	if test -e $(READY); then \
		echo "Updating $(VENV): requirements.txt or pyproject.toml has changed."; \
		quiet=--quiet; \
	else \
		echo "Making $(VENV) with $$($$python --version); this takes a few minutes, once."; \
		$$python -m venv --clear $(VENV) || exit; \
	fi; \
	$(BIN)/python -m pip install --disable-pip-version-check $$quiet -r requirements.txt
	@touch $(READY)
	@echo "$(VENV) is ready."

book: $(READY)  ## execute every notebook and render the book; warnings are errors
	@$(BIN)/python tools/book.py

pdf: book  ## render the book and print it into one PDF; needs Chromium
	@$(BIN)/python tools/pdf.py

test: book  ## render the book, then run the tests and check every notebook's stored outputs
	$(BIN)/python -m pytest @tools/nbval.args -n $(WORKERS) --dist loadscope tests $(NOTEBOOKS)

mutants: $(READY)  ## make the package wrong in many ways, and list which test notices each
	@$(BIN)/python -m tests.mutants

bench: $(READY)  ## measure everything on this GPU and write its record to records/
	@$(BIN)/python -m convt_lab bench

notebooks: $(READY)  ## execute the notebooks in place and write them in their normal form
	@$(BIN)/python tools/notebooks.py $(NOTEBOOKS)

format: $(READY)  ## format Python with ruff, CUDA and C++ with clang-format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

lint: $(READY)  ## the same as checks; changes nothing
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

clean:  ## remove the built book and all caches; .venv stays (rm -rf .venv to make it anew)
	rm -rf _build build .pytest_cache .ruff_cache .hypothesis
	find book convt_lab tests tools -name __pycache__ -prune -exec rm -rf {} +
	find book -name .ipynb_checkpoints -prune -exec rm -rf {} +
