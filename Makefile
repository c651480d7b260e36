# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# 2.14 and later are not covered; on a machine without CUDA the range takes what the index offers for it
TORCH ?= torch>=2.11,<2.14
# tests interpret kernels on CPUs and compile them for GPUs that are not there; block-scaled products need 3.8
TRITON ?= triton>=3.9,<3.10

# tests run in as many processes as there are cores, each with one thread of torch's
WORKERS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 1, 8))")
# of `make explore`
SEED := $(or $(SEED),$(shell date +%s))

.PHONY: demo test lint types unit explore gpu bench teacher students clean

$(BIN)/.ready: pyproject.toml
	# a PyTorch that is there already (a CUDA build, say) is used; pip takes the rest from the index
	$(PYTHON) -m venv $$($(PYTHON) -c "import torch" 2>/dev/null && echo --system-site-packages) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[test]" "$(TRITON)"
	touch $@

demo: $(BIN)/.ready
	$(BIN)/ditc demo

test: lint types unit

lint: $(BIN)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(BIN)/.ready
	$(BIN)/mypy

unit: $(BIN)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
	# interpreting and compiling in one process is not possible
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/triton

# the property tests with examples never drawn before: `make explore SEED=7`
explore: $(BIN)/.ready
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --explore $(SEED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) tests/kernels/triton --explore $(SEED)

bench: $(BIN)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks step-latency
	$(BIN)/python -m benchmarks guard-overhead

# trains the demo's model anew; about an hour on two cores
teacher: $(BIN)/.ready
	$(BIN)/python -m ditc.examples.digits.train --steps 3200 --seed 0

# trains the demo's students anew, by their recorded commands; about 80 minutes on two cores
students: $(BIN)/.ready
	$(BIN)/ditc distill method=dmd2 model=digits steps=4 method.guidance=1.25 run.batch=8 run.updates=800 out=out/dmd2
	$(BIN)/ditc distill method=dmd2 model=digits steps=2 method.guidance=1.5 run.batch=8 run.updates=1000 out=out/dmd2-two
	$(BIN)/ditc distill method=perflow model=digits steps=4 method.starts=teacher method.times=start method.shift=2.5 \
		method.parts=2 run.batch=3 run.updates=800 run.learning_rate=5e-4 run.decay=0.5 run.ema=0.99 out=out/perflow

# with whatever torch and triton the machine's own python has: nothing is installed but ditc itself
gpu:
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(PYTHON) -m pytest -m gpu tests
	$(PYTHON) -m pytest tests/kernels/triton
	$(PYTHON) -m benchmarks step-latency
	$(PYTHON) -m benchmarks guard-overhead

clean:
	rm -rf $(VENV) out build dist .mypy_cache .ruff_cache .pytest_cache
