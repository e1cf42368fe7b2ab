# Two commands do everything on a fresh machine with Python 3.11, a compiler and make:
#   make demo      trains, evaluates, draws and exports on the shipped tiny model   (METHOD=crystal by default; sft, livr, lavit, valr, or a file of yours)
#   make test      the test suite
#   make test-oldest   a quick part of it with the oldest torch and transformers, in an environment of its own
#   make lint      ruff, mypy and clang-format, as pyproject.toml and .clang-format set them
# Both build the compiled operators of csrc/ first, as does `make setup`; CRYSTAL_CUDA=auto|1|0 chooses the GPU part (see setup.py).
PYTHON ?= python3
VENV ?= .venv
METHOD ?= crystal
BIN = $(VENV)/bin
# Threads that wait sleep: where another program takes one of two cores, spinning ones made a step five times as long.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test test-oldest lint clean
setup: $(VENV)/.ready
	@$(BIN)/python setup.py --quiet build_ext --inplace

$(VENV)/.ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "crystal needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV): once, a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	@$(BIN)/python -m crystal.demo --method $(METHOD)

test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# What touches torch and transformers: operators, the models' doors, training, exports.
OLDEST = .venv-oldest
QUICK = ops attention_functions latent_copy model families lora losses generate export adapter
test-oldest:
	@test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -r requirements-oldest.txt
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist worksteal $(QUICK:%=tests/test_%.py)

lint: setup
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m mypy
	@$(BIN)/clang-format --dry-run -Werror csrc/*.cpp csrc/*.h csrc/*.cu tests/*.h

clean:
	rm -rf $(VENV) $(OLDEST) build *.egg-info crystal/*.so
