# Two commands for a newcomer: `make demo` and `make test`. Each sets up .venv by itself, once.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test check docs clean

demo: .venv/runtime
	$(BIN)/parley demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

check: .venv/development
	$(BIN)/ruff check src tests tools labs benchmarks
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/build_docs.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The generated pages and notebooks, then the site in build/site.
docs: .venv/development
	$(BIN)/python tools/build_docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.venv/runtime: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[all]'
	@touch $@

.venv/development: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ .venv/runtime

clean:
	rm -rf .venv build dist src/*.egg-info
