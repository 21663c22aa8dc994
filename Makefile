# One line each. `make demo` and `make test` need nothing but Python >= 3.11, a C++20 compiler and the package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch comes first: the build asks the environment for it.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: demo test bench gpu lint tidy sanitize install clean

demo: install            ## train two tiny models on real text and decode with both
	$(BIN)/edlm demo

test: install            ## every test, on the installed package
	$(BIN)/python -m pytest

bench: install           ## the ops against eager torch, about a minute
	$(BIN)/edlm bench ops

gpu:                     ## on a machine with a GPU: build, compare with the CPU, time, test, sanitize, profile; nine minutes
	benchmarks/gpu.sh

lint: $(VENV)/.tools     ## ruff: rules and format
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

tidy: install            ## clang-tidy over every C++ source, once an instruction set
	$(INSTALL) "clang-tidy>=23,<24"
	$(BIN)/cmake -S . -B build/tidy -G Ninja -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) > /dev/null
	$(BIN)/clang-tidy --quiet -p build/tidy csrc/*.cpp csrc/cpu/*.cpp

# An environment of its own, whose CPU library is built with both sanitizers. torch is not: its own leaks are not ours to report.
SAN := build/sanitize/venv
sanitize:                ## the tests of the ops under AddressSanitizer and UndefinedBehaviorSanitizer
	test -x $(SAN)/bin/python || $(PYTHON) -m venv $(SAN)
	$(SAN)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt torch
	$(SAN)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt ".[test]" \
	  -C cmake.define.EDLM_SANITIZE=ON -C build-dir=build/sanitize/cmake
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  $(SAN)/bin/python -m pytest -s -q tests/ops

install: $(VENV)/.installed

# Rebuilt when a source of the package changes, appears or goes (a folder is newer then).
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find python csrc cmake benchmarks -not -name __pycache__ -not -path '*/__pycache__/*' -not -path 'benchmarks/results*' 2>/dev/null)
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
