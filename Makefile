# What continuous integration runs, and what you run: each target installs what it needs into .venv first.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Composer wants older releases of other packages than the rest: it has an environment of its own.
COMPOSER := .venv-composer
# The tools beside which we measure want many packages that nothing else here needs.
PEERS    := .venv-bench
# Pinned wherever they are installed: the tests are written against them.
TORCH    := torch==2.13.0
MOSAICML := mosaicml==0.32.1

# Python compiles what is imported when it is first imported, a small part of what pip would compile.
INSTALL := -m pip --disable-pip-version-check --no-input --quiet install --no-compile

# The tests start hundreds of processes: each would compile all of mandapa where the environment forbids to keep that.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo demo-composer test lint soak soak-hour bench bench-training bench-peers clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo           train, kill, resume, check and restore a small model (half a minute)'
	@echo 'make demo-composer  the same with Composer and an S3 server, killed in the second epoch'
	@echo 'make test           lint, then all tests but the slow ones'
	@echo 'make lint           ruff, mypy, import-linter'
	@echo 'make soak           the slow tests, and the proof with larger counts (hours)'
	@echo 'make soak-hour      the proof with ever new seeds until an hour is over (or SECONDS=600), and the figures'
	@echo 'make bench          the benchmarks of commits and restores'
	@echo 'make bench-training what a run costs a training, beside what Composer and W&B cost it (7 minutes)'
	@echo 'make bench-peers    real training series in mandapa and in other tools (15 minutes, and six once to train)'
	@echo 'make clean          remove what make made, but no repository'

demo: $(VENV)/.demo
	@$(BIN)/mandapa demo

demo-composer: $(COMPOSER)/.made
	@$(COMPOSER)/bin/python examples/composer_demo.py

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test:
	@$(MAKE) --no-print-directory --jobs 3 lint $(VENV)/.azurite $(COMPOSER)/.made
	$(BIN)/python -m pytest -n 3 --dist worksteal -m 'not slow' --doctest-modules tests src --ignore-glob '*/trainers/composer*'
	$(COMPOSER)/bin/python -m pytest -n 2 --dist worksteal -m 'not slow' tests/composer

soak: $(VENV)/.test $(VENV)/.azurite $(COMPOSER)/.made
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --timeout 3600 tests
	$(COMPOSER)/bin/python -m pytest -m slow tests/composer
	MANDAPA_SOAK=1 $(BIN)/python -m pytest -n 2 --timeout 7200 tests/proof tests/repository/test_machine.py \
	  tests/repository/test_mirror_faults.py tests/repository/test_mirror_histories.py tests/run/test_kills.py \
	  tests/run/test_dying_uploaders.py

soak-hour: $(VENV)/.test
	@$(BIN)/python tests/proof/soak.py --seconds $(or $(SECONDS),3600)

bench: $(VENV)/.test
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python $$script || exit; done

bench-training: $(COMPOSER)/.made
	@$(COMPOSER)/bin/python benchmarks/training

bench-peers: $(PEERS)/.made
	@$(PEERS)/bin/python benchmarks/peers $(ARGS)

clean:
	rm -rf $(VENV) $(COMPOSER) $(PEERS) demo-out dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -rf tests/azurite/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -- environments ------------------------------------------------------------------------------------------------------

new_enough = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo 'mandapa needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }

$(VENV)/.pip:
	@$(new_enough)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: $(VENV)/.pip pyproject.toml
	$(BIN)/python $(INSTALL) $(TORCH) -e '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.pip pyproject.toml
	$(BIN)/python $(INSTALL) $(TORCH) -e '.[aws,demo]' --group test --group lint
	@touch $@

# Azure's emulator needs node; where there is none, its tests say that they are skipped.
$(VENV)/.azurite: $(VENV)/.pip $(wildcard tests/azurite/package.json)
	@if command -v npm >/dev/null && test -f tests/azurite/package.json; then \
	  npm install --prefix tests/azurite --no-package-lock --no-audit --no-fund --silent || \
	    echo 'azurite could not be installed: the tests that need it are skipped' >&2; \
	fi
	@touch $@

# torch first, so that nobody chooses another one; then what Composer needs, and Composer itself, which asks for an old
# torch and an old torchvision. tests/composer/torchvision-stub stands where it imports the latter.
$(COMPOSER)/.made: pyproject.toml $(shell find tests/composer/torchvision-stub -name '*.py' -o -name '*.toml')
	@$(new_enough)
	test -x $(COMPOSER)/bin/python || $(PYTHON) -m venv $(COMPOSER)
	$(COMPOSER)/bin/python $(INSTALL) --upgrade 'pip>=25.1'
	$(COMPOSER)/bin/python $(INSTALL) $(TORCH)
	$(COMPOSER)/bin/python $(INSTALL) $(TORCH) -e . --group composer
	$(COMPOSER)/bin/python $(INSTALL) --no-deps $(MOSAICML)
	$(COMPOSER)/bin/python $(INSTALL) --no-deps --force-reinstall ./tests/composer/torchvision-stub
	@touch $@

# restic and borg are the system's: where they are not installed, they are left out. So is ZipNN where it cannot be built.
$(PEERS)/.made: pyproject.toml
	@$(new_enough)
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) --upgrade 'pip>=25.1'
	$(PEERS)/bin/python $(INSTALL) $(TORCH) -e . --group bench
	$(PEERS)/bin/python $(INSTALL) 'zipnn>=0.5' || echo 'zipnn could not be built: it is left out' >&2
	@touch $@
