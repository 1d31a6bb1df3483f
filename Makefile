# Everything runs in .venv, which every target makes for itself from any Python >= 3.12 on the PATH.
SHELL := /bin/bash
PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.14 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
RUN := .venv/bin/python
# libtpu, which compiles the kernels ahead of time in the tests, is made for Linux on x86-64 alone.
COMMA := ,
X86_LINUX := $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -))
EXTRAS := dev,docs$(if $(X86_LINUX),$(COMMA)tpu)
# The compiler for GPUs stays out of .venv, where JAX would look for a GPU with it: its tests run .venv-gpu/bin/python, and are
# left out, with the reason, where it cannot be installed.
GPU_COMPILER := $(if $(X86_LINUX),.venv-gpu/tried)
# Triton is a gigabyte, which only the slow tests need; where it cannot be installed, its tests are left out with the reason.
TRITON := $(if $(X86_LINUX),.venv/triton)
# Where there is no accelerator, libtpu would look for one at every start and complain at length.
ifeq ($(wildcard /dev/accel* /dev/vfio/[0-9]* /dev/nvidia[0-9]*),)
export JAX_PLATFORMS ?= cpu
endif

.PHONY: demo test test-slow test-oldest lint format docs peers bench-cpu bench-gpu check-gpu tpu-schedule gpu-schedule accuracy clean

demo: .venv/installed  ## train the tiny DeltaNet on real text, show bits per byte and a sample
	$(RUN) -m experiments.demo

test: .venv/installed  ## the test suite
	$(RUN) -m pytest -n 2 --dist loadgroup -m "not slow"

test-slow: .venv/installed $(GPU_COMPILER) $(TRITON)  ## what cannot be quicker: many processes, interpreted kernels at more sizes
	$(RUN) -m pytest -n 2 --dist loadgroup -m slow

test-oldest: .venv-oldest/installed  ## the op's tests on the oldest supported JAX
	.venv-oldest/bin/python -m pytest tests/ops tests/gpu

lint: .venv/installed  ## formatting, linting, types
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

format: .venv/installed
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

docs: .venv/installed  ## the documentation's site, in build/site; needs no network
	PATH="$(CURDIR)/.venv/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

peers: .venv/installed  ## the libraries the CPU benchmark compares with, each in an environment of its own
	benchmarks/peers/setup.sh $(RUN)

bench-cpu: .venv/installed  ## speed and memory on this machine's CPU, beside the installed peers
	$(RUN) -m benchmarks.cpu --sweep

bench-gpu:  ## speed and memory on this machine's Hopper GPU, beside the installed peers; needs JAX with CUDA in PYTHON
	$(PYTHON) -m benchmarks.gpu

check-gpu:  ## whether the GPU kernels are right on this machine's Hopper GPU, in minutes; needs JAX with CUDA in PYTHON
	$(PYTHON) -m benchmarks.gpu_check

tpu-schedule: .venv/installed  ## what the TPU compiler makes of the kernels, on a CPU host
	$(RUN) -m benchmarks.tpu_schedule

gpu-schedule: .venv-gpu/installed  ## what NVIDIA's compiler makes of the GPU kernels, without a GPU
	.venv-gpu/bin/python -m benchmarks.gpu_schedule --output docs/benchmarks

accuracy: .venv/installed  ## the float64 error table in docs
	$(RUN) -m benchmarks.accuracy

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.12 or newer is needed on the PATH (or make PYTHON=/path/to/python)."; exit 2; }
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

.venv/triton: .venv/installed
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[triton]' || \
	    echo "Going on without Triton."
	touch $@

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install -q --disable-pip-version-check 'jax==0.11.2' beartype pytest -e .
	touch $@

# The packages of .venv, and the compiler; 750 MB.
.venv-gpu/installed: .venv/installed
	$(RUN) -m venv .venv-gpu
	.venv-gpu/bin/python -c 'import pathlib, sys, sysconfig; \
	    pathlib.Path(sysconfig.get_path("purelib"), "base.pth").write_text(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
	    "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	.venv-gpu/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[gpu-compiler]'
	touch $@

.venv-gpu/tried: .venv/installed
	$(MAKE) .venv-gpu/installed || echo "Going on without the compiler for GPUs."
	mkdir -p $(@D) && touch $@

clean:
	rm -rf .venv .venv-* build dist runs .pytest_cache .mypy_cache .ruff_cache
