# make quickstart, make test and make test-lowest do all their own set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-lowest lint format clean python-is-new-enough

quickstart: $(VENV)/.installed
	$(BIN)/gatewise train recipes/quickstart.yaml --output runs/quickstart --overwrite

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The same tests with the lowest versions that pyproject.toml allows, in an environment of their own. On Linux with an Intel or AMD
# processor pip fetches PyTorch for CUDA: several gigabytes. Wheels of these versions exist for Python 3.11 to 3.13.
test-lowest: $(LOWEST)/.installed-dev
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

python-is-new-enough:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gatewise needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..."; exit 2; }

$(VENV)/bin/python $(LOWEST)/bin/python: | python-is-new-enough
	$(PYTHON) -m venv $(@:/bin/python=)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@ $(VENV)/.installed

$(LOWEST)/.installed-dev: pyproject.toml tools/lowest_requirements.py | $(LOWEST)/bin/python
	$(LOWEST)/bin/python tools/lowest_requirements.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[dev]' --constraint $(LOWEST)/lowest.txt
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
