# make run    installs what is missing into .venv, then simulates a training step of Llama-3-8B on 64 H100s
# make test   the tests                make lint   ruff and mypy --strict
# make bench  the benchmarks           make docs   the documentation site, into build/site
# make clean  removes everything that make made
#
# The package is installed so that edits of Python files hold at once; pip runs again only when pyproject.toml,
# constraints.txt or a native source changed. PYTHON names another interpreter (>= 3.11), COSIM_CUDA=OFF|ON overrules
# the search for nvcc.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
NATIVE := $(wildcard native/CMakeLists.txt native/*.cmake native/*.cpp native/*/*.cpp native/*/*.cu native/*/*.cuh native/*/*.h)
INPUTS := pyproject.toml constraints.txt $(NATIVE)
RUN    := reports/examples/llama3-8b-64xh100.yaml
CODE   := cosim hwmodels workloads native tests reports/site

export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.NOTPARALLEL:
.PHONY: run test lint bench docs clean
.DELETE_ON_ERROR:

run: $(VENV)/installed
	@mkdir -p build
	$(BIN)/cosim simulate $(RUN) --html build/llama3-8b-64xh100.html

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 -p no:benchmark

lint: $(VENV)/installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	MYPYPATH=reports/site $(BIN)/mypy reports/site/hooks.py reports/site/generators

bench: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/bench --benchmark-only -p no:xdist --quiet

# Runs the commands that its pages show; a broken link, anchor or command fails it.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet -f reports/site/mkdocs.yml
	@echo build/site/index.html

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cosim needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

# Holds what $(VENV)/installed holds, and the tools.
$(VENV)/installed-dev: $(INPUTS) | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build
