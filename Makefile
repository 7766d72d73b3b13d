# One word each: setup, demo, test, check, perf. Everything lives in .venv.
PYTHON ?= $(shell command -v python3.13 || command -v python3.12 || command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-all check perf clean

setup: $(STAMP)

# Debian's python3 comes without ensurepip unless python3-venv is installed; virtualenv is the way round it.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "medferry needs Python 3.11 to 3.13; set PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	  || { echo "no venv module: apt-get install python3-venv (or set PYTHON to another Python)"; exit 2; }
	$(BIN)/python -m pip install --quiet --editable '.[test,check,perf]'
	@touch $@

demo: setup
	$(BIN)/medferry demo

# The quick suite. A test whose peer is not installed says so and skips.
test: setup
	$(BIN)/python -m pytest -m "not slow" tests

test-all: setup
	$(BIN)/python -m pytest --timeout 1800 tests

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

perf: setup
	$(BIN)/python -m perf.dicom
	$(BIN)/python -m perf.rtc

clean:
	rm -rf $(VENV) build *.egg-info
