# Every target is one line a person would type. By default it runs in .venv, which `make` creates with the
# packages for this machine. `make TARGET PY=python3` skips all set-up and runs that interpreter on src/.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Arguments for the command of a target, e.g. make bench ARGS="--help" or make test ARGS="-k jit -x".
ARGS ?=
PYTHON ?= python3
SANITIZER ?= compute-sanitizer
SANITIZER_LIMIT ?= 480
MINUTES ?= 5

ifdef PY
  RUN := PYTHONPATH=$(CURDIR)/src $(PY)
  base_env :=
  test_env :=
  plot_env :=
  notebook_env :=
else
  PY := .venv/bin/python
  RUN := $(PY)
  base_env := .venv/ready-base
  test_env := .venv/ready-test
  plot_env := .venv/ready-plot
  notebook_env := .venv/ready-notebook

  # CUDA version of the driver: 13, 12 or nothing. libcuda answers even where nvidia-smi is not installed.
  CUDA := $(shell $(PYTHON) -c "import ctypes; v = ctypes.c_int(); ctypes.CDLL('libcuda.so.1').cuDriverGetVersion(ctypes.byref(v)); print(v.value // 1000)" 2>/dev/null \
    || nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p')
  GPU_EXTRA := $(if $(filter 12,$(CUDA)),cuda12,$(if $(filter 13 14 15,$(CUDA)),cuda13))
  BASE_EXTRAS ?= $(GPU_EXTRA)
  TEST_EXTRAS ?= $(if $(GPU_EXTRA),test,dev)
endif

comma := ,

.PHONY: help
help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: bench
bench: $(base_env) ## Measure the kernels (where there is no GPU: emulate and check them)
	$(RUN) -m flashllm bench $(ARGS)

.PHONY: test
test: $(test_env) ## Run every test that this machine can run
	$(RUN) -m pytest -n 2 --dist loadfile $(ARGS)

.PHONY: lint
lint: $(test_env) ## Style (ruff) and types (mypy)
	$(RUN) -m ruff check .
	$(RUN) -m mypy

.PHONY: compile-all
compile-all: $(test_env) ## Compile every kernel for every architecture; needs no GPU
	$(RUN) -m flashllm compile --all $(ARGS)

.PHONY: gpu-test
gpu-test: $(test_env) ## Run the GPU tests; fails where there is no GPU
	FLASHLLM_REQUIRE_GPU=1 $(RUN) -m pytest -m gpu $(ARGS)

.PHONY: fuzz
fuzz: $(test_env) ## Read 100,000 damaged files; the seed is printed, ARGS="--seed N" repeats it
	$(RUN) tests/fuzz_containers.py $(ARGS)

ONLY ?= memcheck racecheck initcheck synccheck

.PHONY: sanitize
sanitize: $(test_env) $(ONLY:%=sanitize-%) ## Small GPU cases under compute-sanitizer; ONLY="memcheck racecheck" for some tools

# CuPy's memory pool hides out-of-bounds accesses, so it is off; a hang prints nothing, so there is a time limit.
# Racecheck gets kernels of its own: see cuda/flashllm/warp_arrival.cuh.
.PHONY: $(ONLY:%=sanitize-%)
$(ONLY:%=sanitize-%): sanitize-%: $(test_env)
	FLASHLLM_REQUIRE_GPU=1 FLASHLLM_NO_POOL=1 $(if $(filter racecheck,$*),FLASHLLM_RACECHECK=1) $(if $(filter PYTHONPATH=%,$(RUN)),PYTHONPATH=$(CURDIR)/src) \
	timeout $(SANITIZER_LIMIT) $(SANITIZER) --tool $* --error-exitcode 9 $(PY) -m pytest -m sanitize -x -q $(ARGS)

.PHONY: soak
soak: $(test_env) ## Random products with checks for MINUTES=5; on the emulator where there is no GPU
	$(RUN) tests/soak.py --minutes $(MINUTES) $(ARGS)

.PHONY: figures
figures: $(plot_env) ## Draw the figures from committed rows into build/figures, and print their tables; needs no GPU
	$(RUN) -m flashllm figures --from-results $(ARGS)

.PHONY: notebooks
notebooks: $(notebook_env) ## Execute and rewrite the notebooks of experiments/notebooks; ARGS="--check" writes nothing
	$(RUN) experiments/notebooks/run.py $(ARGS)

.PHONY: clean
clean: ## Remove .venv, build results and tool caches (not the kernel cache: `flashllm cache clear`)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready-base: pyproject.toml | .venv/bin/python
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".$(if $(BASE_EXTRAS),[$(BASE_EXTRAS)])"
	@touch $@

.venv/ready-test: pyproject.toml .venv/ready-base
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e ".[$(if $(BASE_EXTRAS),$(BASE_EXTRAS)$(comma))$(TEST_EXTRAS)]"
	@touch $@

.venv/ready-plot: pyproject.toml .venv/ready-base
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e ".[$(if $(BASE_EXTRAS),$(BASE_EXTRAS)$(comma))plot]"
	@touch $@

.venv/ready-notebook: pyproject.toml .venv/ready-base
	.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  -e ".[$(if $(BASE_EXTRAS),$(BASE_EXTRAS)$(comma))notebook]"
	@touch $@
