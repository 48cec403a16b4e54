# Every target does its own set-up: a virtual environment in .venv with the tested versions of constraints.txt.
#   make demo PYTHON=/path/to/python3    another Python, 3.11 or newer
#   make test JOBS=8                     pytest processes
PYTHON ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# one process per core and no threads within it, or two test processes fight for two cores
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s%s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo.stamp ## learn a stream of corrections from start to end, no download of models, no GPU
	$(BIN)/ogpstream demo $(ARGS)

test: lint ## ruff, mypy and the tests
	$(THREADS) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(VENV)/test.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove the virtual environment, caches and build leftovers
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find kernels learner memory profiling tests \( -name __pycache__ -o -name .ruff_cache \) -type d -prune -exec rm -rf {} +

$(VENV)/demo.stamp: EXTRA := bench
$(VENV)/test.stamp: EXTRA := test
$(VENV)/demo.stamp $(VENV)/test.stamp: $(VENV)/torch.stamp pyproject.toml
	$(PIP) install -c constraints.txt -e '.[$(EXTRA)]'
	@touch $@

# torch goes first and without its dependencies: where there is no GPU the CPU build is taken if one can be had
# (the default Linux wheel draws gigabytes of CUDA libraries), and an index that does not answer costs half a
# minute at most. The second line does nothing when the first one found a build.
$(VENV)/torch.stamp: constraints.txt
	@python= ; for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  "$$p" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { python=$$p; break; }; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'make: no Python 3.11 or newer with its venv module in $(or $(PYTHON),PATH): install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; \
	fi; \
	"$$python" -m venv --clear $(VENV)
	@command -v nvidia-smi >/dev/null || $(PIP) install --no-deps --timeout 10 --retries 1 \
	  --extra-index-url $(TORCH_CPU_INDEX) -c constraints.txt torch || true
	$(PIP) install --no-deps -c constraints.txt torch
	@touch $@
