# make install | train | test | lint | clean; README.md says what each does.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RECIPE ?= dlrm
OUT ?= runs/$(RECIPE)
NPROC ?= 2
DATA ?=
STEPS ?=
ARGS ?=
# CUDA where a driver answers, else CPU; make install DEVICE=cpu overrules it.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
DATA_AND_STEPS := $(if $(DATA),--data "$(DATA)") $(if $(STEPS),--steps "$(STEPS)")

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts
TORCHREC := torchrec==1.8.0
# torchx starts the torchrun that it finds first
export PATH := $(BIN):$(PATH)

# fbgemm-gpu and fbgemm-gpu-cpu break each other in one environment
refuse_other = [ ! -e $(VENV)/installed-$(1) ] || { echo "$(VENV) is installed for $(1): go on with DEVICE=$(1), or make clean first"; exit 1; }

.PHONY: install train test lint clean

install: $(VENV)/installed-$(DEVICE)

train: install
	torchx --log_level WARNING run -s local_cwd shardemb.train -j "1x$(NPROC)" --recipe "$(RECIPE)" -- --out "$(OUT)" $(DATA_AND_STEPS) $(ARGS) \
	  || { echo "make train failed: the line above that begins with error: says why" >&2; exit 1; }

test: $(VENV)/installed-dev
	python -m pytest

lint: $(VENV)/installed-dev
	ruff check .
	ruff format --check .
	mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v[:2] != (3, 11) and "shardemb is tested on Python 3.11, $(PYTHON) is %d.%d; try make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)

# TorchRec's wheel asks for fbgemm-gpu, the CUDA build, which breaks fbgemm-gpu-cpu; so on CPU it comes
# without its dependencies, which pyproject.toml lists.
$(VENV)/installed-cpu: pyproject.toml setup.py $(wildcard shardemb/native/*.[ch]) | $(VENV)/bin/python
	@$(call refuse_other,cuda)
	@echo "installing for CPU into $(VENV) (a minute or two)"
	$(PIP) --editable ".[cpu]"
	$(PIP) --no-deps "$(TORCHREC)"
	@rm -f $(VENV)/installed-dev
	@touch $@

$(VENV)/installed-cuda: pyproject.toml setup.py $(wildcard shardemb/native/*.[ch]) | $(VENV)/bin/python
	@$(call refuse_other,cpu)
	@echo "installing for CUDA into $(VENV) (several GB, some minutes)"
	$(PIP) --editable ".[cuda]"
	@rm -f $(VENV)/installed-dev
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-$(DEVICE)
	$(PIP) --editable ".[$(DEVICE),dev]"
	@touch $@
