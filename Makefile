# make setup, demo, test, faults, dev, bench, model, lint, docs, screenshot, clean. Everything runs in .venv, which is made where it is
# missing or old.

PYTHON ?= python3
PORT ?= 3000
BIN := .venv/bin
# What the demonstration and Dagster on a laptop need; and what the tests need besides: torch, which is large, and their tools.
RUNNABLE := .venv/.runnable
INSTALLED := .venv/.installed
PIP = $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
# The tests of one file share its servers.
TWO_AT_A_TIME := -n 2 --dist loadfile
# How the benchmarks and the faults run: `make bench ARGS=...`.
ARGS ?=

.PHONY: setup demo test faults dev bench lint model docs screenshot clean

setup: $(INSTALLED)

# pip, also where uv is there: uv does not read pip's configuration, and with it a machine's mirrors and wheel folders.
$(RUNNABLE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[local]'
	@touch $@

$(INSTALLED): $(RUNNABLE)
	$(PIP) --editable '.[dev]'
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target .venv/oracle --upgrade \
		--requirement qa_platform/tools/bench/reference.txt
	@touch $@

demo: $(RUNNABLE)
	@$(BIN)/qa-platform local run -- $(BIN)/python -m qa_platform.tools.demo

test: lint
	@status=0; \
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m 'not slow' --junitxml .qa/reports/fast.xml || status=1; \
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) -m slow --junitxml .qa/reports/slow.xml || status=1; \
	exit $$status

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

dev: $(RUNNABLE)
	@echo 'Dagster: http://127.0.0.1:$(PORT)'
	@QA_SENSOR_SECONDS=$${QA_SENSOR_SECONDS:-5} QA_HEARTBEAT_SECONDS=$${QA_HEARTBEAT_SECONDS:-30} $(BIN)/qa-platform local run -- $(BIN)/python -m qa_platform.tools.dev -w workspace.yaml --host 127.0.0.1 --port $(PORT)

faults: setup
	$(BIN)/python -m qa_platform_tests.faults $(ARGS)

bench: setup
	$(BIN)/python -m qa_platform.tools.bench $(ARGS)

# make model START=folder-of-all-MiniLM-L6-v2 DATA="a.json b.json" OUT=folder
model: setup
	$(BIN)/python -m qa_platform.training.train --start $(START) --data $(DATA) --out $(OUT) $(ARGS)

# The pages of docs/ that repeat the code, and the picture of Dagster in the README.
docs: setup
	@$(BIN)/python -m qa_platform.tools.documentation.reference

screenshot: setup
	rm -rf .qa/screenshot
	@QA_HEARTBEAT_SECONDS=5 $(BIN)/qa-platform local run --state .qa/screenshot -- $(BIN)/python -m qa_platform.tools.documentation.screenshot

clean:
	rm -rf .venv .qa build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
