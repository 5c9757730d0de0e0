# The few commands that people and CI run alike.
PYTHON_BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo paper test check gpu-check gpu-bench clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## create .venv and install everything (quick when already done)
	@scripts/setup.sh

demo: setup  ## serve recorded agent programs under several policies, on this machine
	$(PYTHON_BIN)/python -m bench.serve --demo

paper: setup  ## the paper's figures, simulated, as one page: bench/out/paper.html
	$(PYTHON_BIN)/python -m bench.paper

check: setup  ## ruff and mypy --strict
	$(PYTHON_BIN)/ruff check .
	$(PYTHON_BIN)/ruff format --check .
	$(PYTHON_BIN)/mypy

test: check  ## setup, check and all tests
	$(PYTHON_BIN)/python -m pytest

gpu-check: setup  ## kernel tests and swap benchmark; needs an NVIDIA GPU
	@PYTHON=$(PYTHON_BIN)/python scripts/gpu_check.sh

gpu-bench: setup  ## stock orders against ours at Llama-3.1-8B's shapes; needs an NVIDIA GPU
	$(PYTHON_BIN)/python -m bench.gpu

clean:  ## remove everything that can be made again, .venv included
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench/out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
