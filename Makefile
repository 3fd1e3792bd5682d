.PHONY: demo studio test quality style docs

VENV := .venv
BIN := $(VENV)/bin

# `make demo` and `make test` make their own environment when it is missing. torch is installed first and by its exact
# version, so that a machine without a GPU gets no CUDA packages.
$(BIN)/latte-flow: setup.cfg pyproject.toml constraints.txt
	test -d $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/latte-flow
	$(BIN)/latte-flow demo

studio: $(BIN)/latte-flow
	$(BIN)/latte-flow studio

test: $(BIN)/latte-flow
	$(BIN)/python -m pytest

quality: $(BIN)/latte-flow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

style: $(BIN)/latte-flow
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(BIN)/latte-flow
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve
