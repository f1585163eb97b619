# `make demo` and `make test` each set up a fresh machine by themselves: Python 3.11+ is all they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes; each takes up to 5 GB.
JOBS ?= 2
SUITE := -n $(JOBS) --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-matrix test-newest test-slow durations check newest docs site models lint types clean

demo: $(INSTALLED)
	$(BIN)/hotlora demo --output runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest $(SUITE) --durations 15

# The suite with the oldest versions that pyproject.toml allows, with the pinned ones and with the newest.
test-matrix: $(INSTALLED) .venv-oldest/.installed newest
	failed=; for venv in .venv-oldest $(VENV) .venv-newest; do \
		echo "== $$venv =="; $$venv/bin/python -m pytest $(SUITE) || failed="$$failed $$venv"; \
	done; test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Some tests with the newest versions, for each change.
test-newest: $(INSTALLED)
	$(BIN)/python scripts/newest.py

durations: $(INSTALLED)
	$(BIN)/python -m pytest $(SUITE) --record-durations=tests/durations.json

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest --slow

check: lint types $(INSTALLED)
	$(BIN)/python scripts/docs.py --check
	$(BIN)/python scripts/papers.py --check
	$(BIN)/python -m pytest $(SUITE)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

models: $(INSTALLED)
	$(BIN)/python scripts/models.py

docs: $(INSTALLED)
	$(BIN)/python scripts/docs.py

# The docs as a site, in site/; what it needs is installed first, then nothing is fetched.
site: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(INSTALLED)

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e ".[dev]"
	touch $@

newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check \
		--upgrade --upgrade-strategy eager -e ".[dev]"

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-smoke runs site
