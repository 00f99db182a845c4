# make demo      install if needed, train and evaluate on toy data, draw a picture
# make test      install if needed, run the whole test suite
# make coverage  the same suite, and which lines of the package it runs
# make evidence  train eleven attentions on the cue task (docs/evidence.md)
# make gpu       accept the package on a GPU (needs torch, Triton and mmengine only)
# make lint      check style; `make format` mends what can be mended
# make install   only install; MMCV_OPS=1 compiles mmcv's ops (20 minutes on 2 cores)

PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV ?= .venv
BIN := $(VENV)/bin
# Nothing is installed for `make gpu`.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
PIP := $(BIN)/pip --disable-pip-version-check install -c requirements/versions.txt

# The compiled mmcv stays in use once it is installed.
ifneq ($(MMCV_OPS)$(wildcard $(VENV)/.installed-mmcv),)
MMCV := mmcv
else
MMCV := mmcv-lite
endif
# Written last: an interrupted installation goes on where it was.
INSTALLED := $(VENV)/.installed-$(MMCV)

.PHONY: install demo test coverage evidence gpu lint format

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python tools/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest

coverage: $(INSTALLED)
	$(BIN)/python -m pytest --cov=clustr_mm --cov-report=term-missing

evidence: $(INSTALLED)
	$(BIN)/python tools/evidence.py quick
	$(BIN)/python tools/evidence.py quick --table --figure

gpu:
	PYTHONPATH=. $(GPU_PYTHON) tools/analysis_tools/gpu_acceptance.py $(GPU_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(INSTALLED): requirements/versions.txt requirements/openmmlab.txt setup.py pyproject.toml
	rm -f $(VENV)/.installed-*
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel cython
	$(PIP) torch torchvision numpy opencv-python
	$(BIN)/pip uninstall --quiet --yes $(filter-out $(MMCV),mmcv mmcv-lite)
	CFLAGS="-g0 $(CFLAGS)" MMCV_WITH_OPS=$(if $(filter mmcv,$(MMCV)),1,0) $(PIP) --no-build-isolation $(MMCV) -r requirements/openmmlab.txt
	$(PIP) --editable '.[export,test]'
# The same OpenCV without its windows, which need system libraries (libGL).
	$(PIP) --no-deps --force-reinstall opencv-python-headless
# For `mim test mmdet` with mmcv-lite, see docs/faq.md.
	$(BIN)/python -m clustr_mm.compat on
	touch $@
