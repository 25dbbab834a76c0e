PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
SELECTED := -m 'not slow and not exhaustive'

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo distributed test test-all check tiles bench clean

help:  ## Say what can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 16

# The stamp is written last, so an interrupted installation starts again.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,demo]'
	touch $@

demo: $(INSTALLED)  ## Train a small language model; options go into ARGS="..."
	$(BIN)/python examples/train_lm.py $(ARGS)

distributed: $(INSTALLED)  ## Train on two processes and on one, and compare the losses
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 examples/train_distributed.py $(ARGS)

check: $(INSTALLED)  ## Lint, types, import directions and layout
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_structure.py

test-all: SELECTED := -m 'not exhaustive'
test-all: test  ## The checks, then every test, the slow ones too

# The second run has Triton's interpreter on, which must be decided before Triton is imported.
test: check  ## The checks, then the tests that are not slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(SELECTED) --durations=15 --ignore=tests/interpreter --ignore=tests/test_structure.py
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) $(SELECTED) --durations=15 tests/interpreter

tiles: $(INSTALLED)  ## Compile every tile of every kernel for four cards, which takes hours; ARGS="-k slot_gradient" takes some
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m exhaustive $(ARGS) tests/test_aot.py

bench: $(INSTALLED)  ## Time every operator on small sizes, then what has a target at its own size
	$(BIN)/python -m benchmarks --quick $(ARGS)
	$(BIN)/python -m benchmarks --sections rows --only '^(chunk_simple_gla|simple_gla_step_) .*float32$$'

clean:  ## Remove the environment and everything that is made
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
