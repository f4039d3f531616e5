# make check: everything CI runs, from a fresh clone; it makes its own .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: check lint test bench images clean

check: lint test

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: .venv/ready
	$(BIN)/pytest -n 4 --cov=ota_server --cov=ota_fleet --cov-fail-under=95

# Takes a quarter of an hour and two cores; bench/README.md says which programs it wants.
bench:
	$(PYTHON) -m bench

images: .venv/ready
	$(BIN)/python -m tests.data.make_images examples/firmware

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

clean:
	rm -rf .venv .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
