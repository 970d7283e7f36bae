# make venv       a virtual environment in .venv with everything pinned in requirements-dev.txt
# make build      the Hub variants, in build/
# make check      compare build/ with its digests and with this tree, and the version with the changelog, card and tag
# make lint       ruff, mypy, and zizmor for the workflows
# make test       everything that needs no GPU: lint, build, tests
# make properties thousands of random layers, new ones each time; `make test` draws a few hundred, always the same
# make aot        every kernel and tile for every GPU family, with the oldest and the newest Triton: docs/gpus.md
# make test-gpu   the tests and the script that need a GPU; skipped, loudly, where there is none
# make docs       docs/api.md, from the docstrings
# make finetune   the fine-tuning example, on the kernel just built
# make publish    build/ to the Hub; PUBLISH_ARGS=--dry-run only tells what it would do (docs/releasing.md)
# make clean      remove what these made
#
# To use an existing Python with everything installed, and no .venv:  make test PYTHON_RUN=python3

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
PYTHON_RUN ?= $(VENV_PYTHON)

# The arguments of the fine-tuning example.
FINETUNE_ARGS ?=
# The arguments of the publishing script.
PUBLISH_ARGS ?=

STAMP := $(VENV)/installed
ifeq ($(PYTHON_RUN),$(VENV_PYTHON))
READY := $(STAMP)
endif

# `kernels` takes the folder that holds build/, not build/ itself.
LOCAL := LOCAL_KERNELS="org/scattermoe-lora=$(CURDIR)"

.PHONY: venv build check lint test properties aot test-gpu docs finetune publish clean

venv: $(STAMP)

# Without bytecode, which takes 40 s of 2:25: Python makes that of what it imports.
# Torch goes first, as a build of it that brings its own Triton (CUDA) allows no other: there our pin is left out.
$(STAMP): requirements.txt requirements-dev.txt
	test -x $(VENV_PYTHON) || $(PYTHON) -m venv $(VENV)
	$(VENV_PYTHON) -m pip install -q --no-compile "$$(grep '^torch==' requirements.txt)"
	left_out=$$($(VENV_PYTHON) -c 'from importlib.metadata import requires; \
		print("/^triton==/d;" if "triton" in " ".join(requires("torch")) else "")'); \
	sed "$$left_out/^-r /d" requirements.txt requirements-dev.txt > $(VENV)/requirements.txt
	$(VENV_PYTHON) -m pip install -q --no-compile -r $(VENV)/requirements.txt
	touch $@

build: $(READY)
	$(PYTHON_RUN) scripts/build.py

check: $(READY)
	$(PYTHON_RUN) scripts/build.py --check
	$(PYTHON_RUN) scripts/version.py

lint: $(READY)
	$(PYTHON_RUN) -m ruff check .
	$(PYTHON_RUN) -m ruff format --check .
	$(PYTHON_RUN) -m mypy torch-ext scripts
	"$$($(PYTHON_RUN) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"/zizmor --offline --quiet .github

# Newer than our pin, which is the newest that takes the pinned kernels: without use_kernels, what kernelize does.
NEWEST_TRANSFORMERS := $(VENV)/transformers-5.24.0
$(NEWEST_TRANSFORMERS):
	$(PYTHON_RUN) -m pip install -q --no-compile --no-deps --target $@ transformers==5.24.0

test: lint build $(NEWEST_TRANSFORMERS)
	$(PYTHON_RUN) scripts/build.py --check
	$(PYTHON_RUN) scripts/version.py
	$(LOCAL) $(PYTHON_RUN) -m pytest tests -n 2
	$(LOCAL) $(PYTHON_RUN) -m pytest tests --device interpreter -n 2
	PYTHONPATH=$(NEWEST_TRANSFORMERS) $(LOCAL) $(PYTHON_RUN) -m pytest -n 2 \
		tests/test_distributed.py tests/test_families.py tests/test_transformers.py tests/test_ways_in.py

properties: build
	$(LOCAL) $(PYTHON_RUN) -m pytest tests/test_properties.py --hypothesis-profile many -n 2
	$(LOCAL) $(PYTHON_RUN) -m pytest tests/test_properties.py --hypothesis-profile many --device interpreter -n 2

# The oldest Triton that torch 2.11 brings; it compiles for GPUs without the torch that it came with.
OLDEST_TRITON := $(VENV)/triton-3.6.0
$(OLDEST_TRITON):
	$(PYTHON_RUN) -m pip install -q --no-deps --target $@ triton==3.6.0

aot: build $(OLDEST_TRITON)
	$(PYTHON_RUN) tests/aot.py --report docs/gpus.md
	PYTHONPATH=$(OLDEST_TRITON) $(PYTHON_RUN) tests/aot.py --report docs/gpus.md

test-gpu: $(READY)
	@gpu=$$($(PYTHON_RUN) -c 'import torch; print(torch.accelerator.is_available())') || exit 1; \
	if [ "$$gpu" = False ]; then \
		echo "=================================================="; \
		echo "SKIPPED: this machine has no GPU. Nothing was tested."; \
		echo "=================================================="; \
	else \
		set -ex; \
		$(PYTHON_RUN) scripts/build.py; \
		$(LOCAL) $(PYTHON_RUN) -m pytest tests --device cuda -m every_device -n 8; \
		$(LOCAL) $(PYTHON_RUN) -m pytest tests --device cuda -m gpu; \
		$(LOCAL) $(PYTHON_RUN) -m pytest tests --device cuda -m every_device -n 8 --code-for sm_80; \
		$(LOCAL) $(PYTHON_RUN) scripts/gpu_check.py; \
	fi

docs: $(READY)
	$(PYTHON_RUN) scripts/api_docs.py

finetune: build
	$(LOCAL) $(PYTHON_RUN) scripts/finetune.py $(FINETUNE_ARGS)

publish: $(READY)
	$(PYTHON_RUN) scripts/publish.py $(PUBLISH_ARGS)

clean:
	rm -rf build .build-* $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
