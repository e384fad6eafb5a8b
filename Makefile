# make demo   a federation of six devices on this machine, with a table of what each learnt at the end
# make test   the test suite
# make check  formatting, lint, types
# make lock   coordinator-lock.txt anew, by the versions of constraints.txt
# Each but the last sets up .venv first, once; it is done again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# One compute thread for each process: processes that each take every core run many times slower together.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lock setup clean

demo: setup
	$(BIN)/python -m examples.demo

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet "pip-tools>=7.5"
	CUSTOM_COMPILE_COMMAND="make lock" build/lock/bin/python -m piptools compile --quiet --generate-hashes \
		--extra coordinator --constraint constraints.txt --strip-extras --no-annotate \
		--no-emit-index-url --no-emit-options --output-file coordinator-lock.txt pyproject.toml

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is missing or older than 3.11; install Python 3.11 or newer, or run: make PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	@echo "Installing into $(VENV) (once; torch is large, so this takes a minute or more) ..."
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
