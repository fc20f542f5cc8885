# Every target does its own set-up in the checkout. `make` alone lists them.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN := runs/demo
JOBS ?= auto

# The CUDA operators take minutes to compile, and the targets use them only where there is a GPU.
ifndef DCNZOO_CUDA
export DCNZOO_CUDA := $(shell nvidia-smi --list-gpus >/dev/null 2>&1 && echo auto || echo 0)
endif

# Photos for the tests, where they lie beside the checkout; the tests that need them are skipped elsewhere.
ifndef DCNZOO_TEST_DATA
ifneq ($(wildcard ../shared/data/.),)
export DCNZOO_TEST_DATA := $(abspath ../shared/data)
endif
endif

YOLO_LOWEST := 8.3.240
YOLO_TESTS := tests/integrations/ultralytics tests/commands/test_yolo.py

.PHONY: help demo test test-all test-lowest test-yolo cuda fuzz sanitize sanitize-brief lint format clean

help:
	@echo 'make demo         install into $(VENV), train dcnv4_atto on handwritten digits, classify images it never saw'
	@echo 'make test         install into $(VENV) and run the tests'
	@echo 'make test-all     the same with the tests that take minutes'
	@echo 'make test-lowest  run the tests on the oldest supported versions, in $(VENV)-lowest'
	@echo 'make test-yolo    run all tests of YOLO models on the oldest and on the newest supported ultralytics'
	@echo 'make cuda         compile and link the CUDA operators, which takes nvcc and no GPU, and check their registers'
	@echo 'make fuzz         ten thousand random calls of each operator against its specification'
	@echo 'make sanitize     run the tests of the operator on a library with AddressSanitizer and UBSan;'
	@echo '                   `make sanitize-brief` is the part that every run of CI has'
	@echo 'make lint         check style with ruff; `make format` repairs it'
	@echo 'make clean        remove what was built, the virtual environments too; runs/ stays'

demo: $(VENV)/.native $(VENV)/.demo
	@echo '==> 1/3 Exporting the handwritten digits of scikit-learn as images'
	@rm -rf $(RUN)
	$(BIN)/dcnzoo digits $(RUN)/data --holdout $(RUN)/holdout
	@echo '==> 2/3 Training dcnv4_atto on them, about two minutes on two cores'
	$(BIN)/python -m train --config configs/digits_atto.yaml --data.root $(RUN)/data --run.output $(RUN) --run.cpu true
	@echo '==> 3/3 Classifying the held-out images with the best checkpoint'
	$(BIN)/dcnzoo predict $(RUN)/holdout --model $(RUN)/best --truth
	@echo '==> The checkpoint is in $(RUN)/best, the results of training in $(RUN)/summary.json'

test: $(VENV)/.native $(VENV)/.test
	@echo '==> Running the tests; the last line says how many passed and how many were skipped'
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 -m 'not slow'

test-all: $(VENV)/.native $(VENV)/.test
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8

test-lowest: $(VENV)-lowest/.installed
	$(VENV)-lowest/bin/python -m pytest -n $(JOBS) --maxprocesses 8 -m 'not slow'

# The oldest shares the dependencies of the newest and lies in a folder of its own.
test-yolo: $(VENV)/.native $(VENV)/.test
	$(BIN)/python -m pip install --upgrade --no-deps --target build/ultralytics-$(YOLO_LOWEST) ultralytics==$(YOLO_LOWEST)
	PYTHONPATH=build/ultralytics-$(YOLO_LOWEST) $(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 $(YOLO_TESTS)
	$(BIN)/python -m pip install --upgrade ultralytics
	$(BIN)/python -m pytest -n $(JOBS) --maxprocesses 8 $(YOLO_TESTS)

cuda: $(VENV)/.test
	@echo '==> Compiling the CUDA operators'
	DCNZOO_CPU=0 DCNZOO_CUDA=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/cuda --build-temp build/cuda.temp
	@echo '==> Checking that no specialised kernel spills registers'
	$(BIN)/python -m pytest -m slow tests/gpu/test_build.py

fuzz: $(VENV)/.native $(VENV)/.test
	$(BIN)/python -m pytest tests/ops/test_properties.py tests/ops/test_deform_attn_properties.py --hypothesis-profile=fuzz

sanitize: $(VENV)/.test
	$(BIN)/python tests/sanitize.py

sanitize-brief: $(VENV)/.test
	$(BIN)/python tests/sanitize.py --brief

lint: $(VENV)/.test
	@echo '==> Checking style'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-lowest build dist *.egg-info dcnzoo/*.so dcnzoo/*.pyd

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: pyproject.toml | $(VENV)/.torch
	@echo '==> Installing dcnzoo with what its $* needs'
	DCNZOO_CPU=0 DCNZOO_CUDA=0 $(BIN)/python -m pip install --no-build-isolation --editable '.[$*]'
	@touch $@

# Compiled apart from the installation, so that only what changed is compiled again. Where no compiler was found nothing
# is stamped: the next make looks for one again.
$(VENV)/.native: setup.py $(wildcard csrc/*.* csrc/*/*.*) | $(VENV)/.torch
	@echo '==> Compiling the operators'
	@touch $@.begun
	$(BIN)/python setup.py --quiet build_ext --inplace --force
	@if [ -n "$$(find dcnzoo -name '*.so' -newer $@.begun)" ]; then mv $@.begun $@; fi

# The lower bounds of pyproject.toml themselves, and a NumPy that the interpreter of the Triton beside them knows. What is
# compiled here serves every later PyTorch too.
$(VENV)-lowest/.installed: setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*.*)
	@echo '==> Installing the oldest supported versions in $(VENV)-lowest'
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install uv
	$(VENV)-lowest/bin/uv pip install --python $(VENV)-lowest/bin/python --resolution lowest-direct \
		--requirements pyproject.toml --extra test 'setuptools>=77' 'ninja>=1.11' 'numpy>=2.3,<2.4'
	$(VENV)-lowest/bin/python setup.py --quiet build_ext --inplace --force
	@touch $@

# First, since compiling needs it; an isolated build would fetch a second one.
$(VENV)/.torch:
	@echo '==> Making a virtual environment in $(VENV)'
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("dcnzoo needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@echo '==> Installing PyTorch, a few GB: one to three minutes'
	$(BIN)/python -m pip install 'torch>=2.10' torchvision 'setuptools>=77' ninja
	@touch $@
