# One word each: setup, demo, test, check, perf. Everything lives in .venv.
# The first interpreter that runs, is of a version we support, and can make environments. The system's own comes
# first: distributions build it with profile-guided optimisation, version managers do not (docs/performance.md).
PYTHON ?= $(shell for p in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
  && { echo $$p; break; }; done)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-all check perf clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "medferry needs Python 3.11 to 3.13 with its venv module:" \
	  "apt-get install python3-venv, or set PYTHON=/path/to/python"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
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
