# make demo            environment, dependencies, then example.py on the shipped model
# make demo MODEL=dir  the same on a checkpoint of yours
# make test            dependencies, then lint, types and tests
# make fuzz            100,000 random serving traces through every scheduler and block manager
# make mutants         plants bugs and sees whether the tests of the parts catch them
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?=
# torch from the default index brings gigabytes of CUDA libraries. Without an NVIDIA driver, the
# CPU wheels are taken instead if their index can be reached.
CPU_WHEELS ?= https://download.pytorch.org/whl/cpu

.PHONY: demo test lint types unit-parts unit-rest unit-fuzz fuzz mutants bench clean

demo: $(VENV)/.run
	$(BIN)/python example.py $(if $(MODEL),--model $(MODEL))

bench: $(VENV)/.run
	$(BIN)/python bench.py

# Side by side on two cores; one after the other they took seven minutes, on one core at a time. With two
# threads each they took 7:36 and 7:15 on two busy cores, with one 6:16 and 5:53.
test: lint
	OMP_NUM_THREADS=1 $(MAKE) -j 2 --output-sync=target types unit-parts unit-rest unit-fuzz

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy .

unit-parts: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/contracts tests/engine tests/kernels --ignore=tests/contracts/test_fuzz.py

unit-rest: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests --ignore=tests/contracts --ignore=tests/engine --ignore=tests/kernels

# A minute of random traces, when one of the halves has ended.
unit-fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest -q tests/contracts/test_fuzz.py

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

clean:
	rm -rf $(VENV)
