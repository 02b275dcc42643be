# The two commands of the README; both do all the set-up that is missing.
PYTHON ?= python3
VENV ?= .venv
RANKS ?= 2
WORKERS ?= 2
# One thread a rank: ranks share the cores, and sums of one thread do not depend on how many there are.
export OMP_NUM_THREADS ?= 1

.PHONY: train test test-fast test-slow lint format benchmark clean

train: $(VENV)/installed
	$(VENV)/bin/disttrain shards pack sklearn:digits data/digits --shards 4
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) -m disttrain fit --config recipes/digits.yaml

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not ranks"

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "slow and not gpu"

lint: $(VENV)/installed
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell disttrain recipes tests docs benchmarks slurm README.md CONTRIBUTING.md CHANGELOG.md

format: $(VENV)/installed
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

benchmark: $(VENV)/installed
	$(VENV)/bin/python benchmarks/reader.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
