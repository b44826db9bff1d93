# hexswarm: everything a person runs, from a fresh checkout on.
#
# Needs Python 3.11 or later with venv, gcc and make. PYTHON names another interpreter:
#     make demo PYTHON=python3.12
# pip obeys its own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, pip.conf). On Linux, PyPI's torch
# is the CUDA build (gigabytes); for the CPU build name PyTorch's index of CPU wheels:
#     make env TORCH_INDEX=https://...

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
EDITABLE := --no-build-isolation --config-settings editable_mode=strict -e
PACKAGES := swarm swarm/transports peer peer/groups peer/models router router/placement simulator kernels bootstrap
NATIVE := setup.py $(wildcard kernels/*.c kernels/*.h router/*.c router/*.h)
FILES := $(sort $(NATIVE) $(wildcard $(addsuffix /*.py,$(PACKAGES)) $(addsuffix /py.typed,$(PACKAGES))))

# As typed, without make's view of "$": the prompt reaches the demo through its environment.
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env demo test unit end-to-end lab world lint typecheck bench clean force

help:
	@echo 'make env        create $(VENV) with the tested versions and hexswarm itself'
	@echo 'make demo       a swarm of real processes on this machine answers PROMPT="..."'
	@echo 'make test       the test suite; ARGS="-k name" chooses; its halves are unit and end-to-end'
	@echo 'make lab        tests on an emulated wide-area network; needs root and netlab, else skips'
	@echo 'make world      a thousand seeds of the simulated world, in which everything goes wrong'
	@echo 'make lint       ruff: rules and format'
	@echo 'make typecheck  mypy --strict on the parts that are held to it'
	@echo 'make bench      measure against plain transformers on this machine'
	@echo 'make clean      remove what was made, $(VENV) too'

env: $(VENV)/installed

demo: env
	@if [ -n "$$PROMPT" ]; then exec $(BIN)/hexswarm demo -- "$$PROMPT"; \
	else exec $(BIN)/hexswarm demo; fi

test: unit end-to-end

# Two processes: the machines that run this have two cores. Status 5 says that ARGS chose none.
unit: env
	$(BIN)/pytest -n 2 --dist loadfile -m 'not end_to_end and not slow and not lab and not gpu' $(ARGS) \
	    || [ $$? -eq 5 ]

# Two as well, file by file: swarms are shared within a file. What a busy neighbour may make late is
# measured by benchmarks, not by these tests.
end-to-end: env
	$(BIN)/pytest -n 2 --dist loadfile -m 'end_to_end and not slow and not lab and not gpu' $(ARGS) || [ $$? -eq 5 ]

# netlab is found by HEXSWARM_NETLAB, on PATH, or as shared/netlab beside the checkout.
lab: env
	$(BIN)/pytest -m lab tests/lab $(ARGS)

world: env
	$(BIN)/python tests/simulation/run.py --seeds $(or $(SEEDS),0:1000) --jobs 2

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: env
	$(BIN)/python tests/typecheck.py

bench: env
	$(BIN)/python benchmarks/loopback.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/*.so router/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find swarm peer router simulator kernels bootstrap tests benchmarks -name __pycache__ -prune \
	    -exec rm -rf {} +

# The editable install is a tree of links to the files that exist at that moment, so it is made
# again when the *list* of files changes, and not when a file does, except for what is compiled.
$(VENV)/files: force | $(VENV)/dependencies
	@echo '$(FILES)' | cmp -s - $@ || echo '$(FILES)' > $@

$(VENV)/installed: $(VENV)/files $(VENV)/dependencies pyproject.toml $(NATIVE)
	$(PIP) install --quiet --no-deps $(EDITABLE) .
	@touch $@

$(VENV)/dependencies: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt $(EDITABLE) '.[dev]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'hexswarm needs Python 3.11 or later: name it with PYTHON=...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo 'Python lacks venv; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
