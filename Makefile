# One line each. `make demo` and `make test` need nothing but Python >= 3.11, a C++20 compiler and the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch comes first: the build asks the environment for it.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test bench lint install clean

demo: install            ## train two tiny models on real text and decode with both
	$(BIN)/edlm demo

test: install            ## every test, on the installed package
	$(BIN)/python -m pytest

bench: install           ## the sampling kernel against eager torch
	$(BIN)/python benchmarks/ops/bench_sampling.py

lint: $(VENV)/.tools     ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

install: $(VENV)/.installed

# Rebuilt when a source of the package changes, appears or goes (a folder is newer then).
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find python csrc cmake -not -name __pycache__ -not -path '*/__pycache__/*' 2>/dev/null)
$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(INSTALL) torch
	$(INSTALL) ".[test]"
	touch $@

$(VENV)/.tools: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "ruff>=0.14,<0.15"
	touch $@

clean:
	rm -rf $(VENV) build dist
