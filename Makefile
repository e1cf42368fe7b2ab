# Two commands do everything on a fresh machine with Python 3.11, a compiler and make:
#   make demo      trains, evaluates, draws and exports on the shipped tiny model   (METHOD=crystal by default; sft, livr, lavit, valr, or a file of yours)
#   make test      the test suite
PYTHON ?= python3
VENV ?= .venv
METHOD ?= crystal
BIN = $(VENV)/bin

.PHONY: setup demo test clean
setup: $(VENV)/.ready

$(VENV)/.ready: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "crystal needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV): once, a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	@$(BIN)/python -m crystal.demo --method $(METHOD)

test: setup
	@$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build *.egg-info
