# make demo   set up and train a small GPT in BF16 and in NVFP4
# make test   set up and run the fast tests
# TORCH chooses the build of PyTorch, for example TORCH="torch==2.13.0"; PYTHON the interpreter that makes the environment.

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest
PARALLEL = -n auto --dist worksteal

.PHONY: demo test test-slow test-exhaustive test-gpu lint docs docs-serve numerics benchmarks clean

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --no-build-isolation -e ".[demo,test,lint]"
	touch $@

$(VENV)/hf: $(VENV)/ready
	$(BIN)/pip install --quiet --no-build-isolation -e ".[hf]"
	touch $@

$(VENV)/browser: $(VENV)/ready
	$(BIN)/pip install --quiet --no-build-isolation -e ".[browser]"
	touch $@

$(VENV)/docs: $(VENV)/ready
	$(BIN)/pip install --quiet --no-build-isolation -e ".[docs]"
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/train_gpt.py

test: $(VENV)/ready
	$(PYTEST) $(PARALLEL)

test-slow: $(VENV)/ready $(VENV)/hf $(VENV)/browser
	$(PYTEST) $(PARALLEL) -m "slow and not gpu and not exhaustive"

test-exhaustive: $(VENV)/ready
	$(PYTEST) $(PARALLEL) -m exhaustive

test-gpu: $(VENV)/ready
	$(PYTEST) -m gpu

numerics: $(VENV)/ready
	$(BIN)/python benchmarks/numerics.py

benchmarks: $(VENV)/ready
	$(BIN)/python benchmarks/quantizers.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/roofline.py

# mypy reads the wheel, because the folders passes/ and kernels/ get their package names only when they are installed.
lint: $(VENV)/ready
	$(BIN)/ruff check .
	rm -rf build/lint && $(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/lint .
	cd build/lint && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml -p quartet_compile

# Without the announcement that the theme prints at each build; warnings about the pages are errors.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) build dist runs *.egg-info
