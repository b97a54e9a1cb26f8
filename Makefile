# make setup | train | test | test-full | check | bench. Each makes the virtual environment first if it is missing or outdated.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= glyphs
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := setup
BENCH  ?= runs/benchmarks
JOBS   ?= 2
.PHONY: setup train test test-full check bench clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(STAMP)

train: $(STAMP)
ifeq ($(DATA),omniglot)
	$(BIN)/imaml prepare omniglot --out data/omniglot $(if $(OMNIGLOT),--source '$(OMNIGLOT)')
else
	$(BIN)/imaml prepare $(DATA) --out data/$(DATA)
endif
	$(BIN)/imaml train pipelines/configs/$(DATA).yaml --run-dir runs/$(DATA)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Storage under faults has the machine for itself, for it is about seconds. A part that fails does not spare the others.
define run_tests
@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(1) tests/unit tests/architecture; parts=$$?; \
$(BIN)/python -m pytest $(1) tests/faults/test_storage*.py; parts=$$((parts | $$?)); \
$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations=15 $(1) tests/integration tests/faults \
	--ignore-glob='*/faults/test_storage*'; exit $$((parts | $$?))
endef

test: $(STAMP)
	$(call run_tests,-m 'not slow and not netns and not gpu')

test-full: $(STAMP)
	$(call run_tests)

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@mkdir -p $(BENCH)
	$(BIN)/python benchmarks/meta_gradient.py --repeats 5 --json $(BENCH)/meta_gradient.json
	$(BIN)/python benchmarks/memory.py --runs 1 --inner 1 16 100 --heaps apart --json $(BENCH)/memory.json --png $(BENCH)/memory.png
	$(BIN)/python benchmarks/cost_of_accuracy.py --json $(BENCH)/cost_of_accuracy.json --png $(BENCH)/cost_of_accuracy.png
	$(BIN)/imaml prepare glyphs --out data/glyphs
	$(BIN)/python benchmarks/scaling.py --repeats 5 --json $(BENCH)/scaling.json
	$(BIN)/python benchmarks/reduction.py --json $(BENCH)/reduction.json
	$(BIN)/python benchmarks/data.py --json $(BENCH)/data.json
	$(BIN)/python benchmarks/recovery.py --data data/glyphs --json $(BENCH)/recovery.json
	$(BIN)/python benchmarks/tracking.py --data data/glyphs --json $(BENCH)/tracking.json
	$(BIN)/python benchmarks/dual_solve.py --json $(BENCH)/dual_solve.json
	$(BIN)/python benchmarks/activations.py --json $(BENCH)/activations.json

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache
