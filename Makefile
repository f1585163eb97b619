# `make demo` and `make test` each set up a fresh machine by themselves: Python 3.11+ is all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes; each takes up to 5 GB.
JOBS ?= 2
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow check docs models lint types clean

demo: $(INSTALLED)
	$(BIN)/hotlora demo --output runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest --slow

check: lint types $(INSTALLED)
	$(BIN)/python scripts/docs.py --check
	$(BIN)/python scripts/papers.py --check
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

models: $(INSTALLED)
	$(BIN)/python scripts/models.py

docs: $(INSTALLED)
	$(BIN)/python scripts/docs.py

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) runs
