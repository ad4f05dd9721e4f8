# `make demo` and `make test` need nothing but Python 3.11 or newer: both make .venv from the lock file first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test quick check clean

demo: $(STAMP)
	$(BIN)/synthward simulate --phantom 150 --sites 3 --out runs/demo
	@echo "open runs/demo/report.html"

test: check
	$(BIN)/pytest

# Everything but the long ones.
quick: check
	$(BIN)/pytest -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, found " + sys.version)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

clean:
	rm -rf .venv build *.egg-info
