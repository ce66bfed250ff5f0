# Every target sets up what it needs; `make help` lists them.

PYTHON ?= python3.11
JOBS ?= 2
PYTEST = -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# The tests measure nothing by the clock, so one thread a process keeps $(JOBS) of them out of each
# other's way. No test may reach a model hub.
export OMP_NUM_THREADS = 1
export HF_HUB_OFFLINE = 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs wheel test-families test-newest test-vllm soak-vllm questions-vllm train-tiny train-tiny-llava \
	train-tiny-siglip train-tiny-siglip-tower model-card clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: .venv/ready  ## The main job on an embedded model: answers with all image tokens and with few
	env -u OMP_NUM_THREADS .venv/bin/vlmzip demo

test: .venv/ready  ## All tests, on the pinned versions (ARGS="-k llava" picks some)
	.venv/bin/python $(PYTEST) tests

lint: .venv/ready  ## ruff and a strict mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/ready  ## Rewrite the code as `make lint` wants it, as far as ruff can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/ready  ## Rewrite the tables of families and methods in docs/
	.venv/bin/python scripts/docs_tables.py

wheel: .venv/ready  ## Build dist/*.whl
	.venv/bin/python -m build --wheel --no-isolation --outdir dist .

test-families: .venv-families/ready  ## The tests of families whose processors need torchvision
	.venv-families/bin/python $(PYTEST) -m needs_torchvision tests

test-newest: .venv-newest/ready  ## All tests again, on the newest transformers 5
	.venv-newest/bin/pip uninstall --quiet --yes torchvision
	.venv-newest/bin/python $(PYTEST) tests
	.venv-newest/bin/pip install --quiet --no-deps torchvision==0.28.0
	.venv-newest/bin/python $(PYTEST) -m needs_torchvision tests

test-vllm: .venv-vllm/ready  ## The vLLM plugin's tests, on vLLM's CPU build
	.venv-vllm/bin/python -m pytest --timeout 900 $(ARGS) tests/vllm

soak-vllm: .venv-vllm/ready  ## A thousand requests, a fifth malformed, to a compressed server (ARGS=...)
	.venv-vllm/bin/python tests/vllm/soak.py $(ARGS)

questions-vllm: .venv-vllm/ready  ## 500 test questions to each embedded model, served and under transformers
	.venv-vllm/bin/python -m pytest --timeout 1200 -m long -s tests/vllm/test_vllm_tiny.py

TRAIN = .venv/bin/python -m vlmzip.tiny.train
SHIPPED = src/vlmzip/tiny/checkpoints

train-tiny: train-tiny-siglip  ## Train the embedded models anew; with -j2 on two cores (long; goes on where it stopped)

train-tiny-llava: .venv/ready
	$(TRAIN) tiny-llava --out $(SHIPPED)/tiny-llava

train-tiny-siglip: train-tiny-llava train-tiny-siglip-tower
	$(TRAIN) tiny-siglip --out $(SHIPPED)/tiny-siglip

train-tiny-siglip-tower: .venv/ready
	$(TRAIN) tiny-siglip --tower-only

model-card: .venv/ready  ## Measure the embedded models and fill the tables of docs/tiny-models.md
	env -u OMP_NUM_THREADS .venv/bin/python scripts/model_card.py runs/model-card

clean:  ## Remove virtual environments, builds and caches
	rm -rf .venv .venv-families .venv-newest .venv-vllm dist build
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmark -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Video and some image processors import torchvision for its Python part only. Its dependencies would
# drag in another build of torch, and its compiled part is not needed. SmolVLM's processor writes
# numbers in words.
.venv-families/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-families
	.venv-families/bin/pip install --quiet -c constraints.txt -e '.[dev]'
	.venv-families/bin/pip install --quiet --no-deps torchvision==0.28.0
	.venv-families/bin/pip install --quiet -c constraints.txt num2words
	touch $@

# transformers and what it may want newer versions of go free; the rest stays pinned.
.venv-newest/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-newest
	grep -vE '^(transformers|tokenizers|huggingface_hub|hf-xet|safetensors)==' constraints.txt \
		> .venv-newest/constraints.txt
	.venv-newest/bin/pip install --quiet --upgrade -c .venv-newest/constraints.txt \
		-e '.[dev]' 'transformers>=5.19,<6'
	.venv-newest/bin/pip install --quiet -c constraints.txt num2words
	touch $@

.venv-vllm/ready: pyproject.toml scripts/install_vllm.sh scripts/vllm-constraints.txt
	PYTHON=$(PYTHON) scripts/install_vllm.sh .venv-vllm
	touch $@
