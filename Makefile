# make demo: set up and run the whole chain on the embedded model. make test: set up and test. The rest is below.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# DeepSpeed looks for ninja on PATH.
IN_VENV := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: help setup demo test lint bench clean

help:
	@echo "make setup   a virtual environment in $(VENV) with everything in it"
	@echo "make demo    SFT, DPO and their figures on the embedded model: a few minutes on two cores"
	@echo "make test    the tests"
	@echo "make lint    ruff"
	@echo "make bench   DPO and reward models against TRL's trainers on this machine, and the speed of PPO"
	@echo "make clean   removes what the tests and the demo wrote, not the environment"

setup: $(STAMP)

# An environment cannot be moved: a stamp that names another folder came with a copy of the tree.
MADE_IN := $(shell cat $(STAMP) 2>/dev/null)
ifneq ($(MADE_IN),$(CURDIR))
.PHONY: $(STAMP)
endif
FRESH := $(if $(filter-out $(CURDIR),$(MADE_IN)),--clear,)

$(STAMP): pyproject.toml constraints.txt
	@found=; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3.10; do \
	  if $$candidate -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	  then found=$$candidate; break; fi; done; \
	if [ -z "$$found" ]; then echo "no Python 3.10 to 3.13 found; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 2; fi; \
	command -v c++ >/dev/null || command -v g++ >/dev/null || \
	  echo "note: no C++ compiler found; DeepSpeed on CPU ranks needs one (apt install g++)" >&2; \
	echo "making $(VENV) with $$($$found --version), a few minutes"; \
	$$found -m venv $(FRESH) $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@echo '$(CURDIR)' > $@

demo: setup
	$(IN_VENV) python -m align +recipe=sft_dpo

test: setup
	$(IN_VENV) python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .

bench: setup
	$(IN_VENV) python benchmarks/dpo.py
	$(IN_VENV) python benchmarks/reward.py
	$(IN_VENV) python benchmarks/ppo.py

clean:
	rm -rf runs multirun outputs dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
