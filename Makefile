# Two commands set everything up: `make quickstart` and `make test`. Both install into .venv from pinned versions.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard src/lapis/*/*.c src/lapis/*/*.h)
export LAPIS_TEST_MODELS ?= $(CURDIR)/$(VENV)/lapis-test-home

# Cheap ones first; `serving` starts every peer that bench-peers has installed.
BENCHMARKS ?= data data_tokens kernels sampling train_step checkpoint cold_start fairshare gateway_load quality serving

.PHONY: help install quickstart test test-long test-cluster test-slurm test-postgres test-browser lint bench bench-peers clean

help:
	@echo "make quickstart   install, then go the whole way: raw text, training, release, served answer"
	@echo "make test         install what tests need, then run all tests"
	@echo "make test-long    the long campaigns as well, but for those with a target of their own below"
	@echo "make test-cluster the tests on a small Ray cluster, after installing Ray and Daft (400 MB)"
	@echo "make test-postgres the tests of what the database holds, on PostgreSQL"
	@echo "make test-browser the console in a real Chromium, after installing Chromium and Playwright"
	@echo "make test-slurm   the tests on a Slurm cluster of this host's own; installs Debian's Slurm, needs root"
	@echo "make bench        speed, side by side with named peers"
	@echo "make bench-peers  install the peers that make bench measures too, in .peers (up to 30 minutes, 6 GB)"
	@echo "make lint         format and type checks"

install: $(VENV)/.installed

$(VENV)/.installed: $(SOURCES)
	@echo "Installing Lapis into $(VENV): one to three minutes the first time."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 $@" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@$(BIN)/lapis doctor --brief
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@LAPIS_HOME=$(LAPIS_TEST_MODELS) $(BIN)/lapis pull smollm2-135m-instruct || echo "SmolLM2 could not be fetched: the tests that need it will be skipped."
	@touch $@

quickstart: $(VENV)/.installed
	@$(BIN)/lapis quickstart

# Types are checked while the tests' workers start and end: there is a core to spare.
test: $(VENV)/.installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports
	@$(BIN)/mypy > $(VENV)/mypy.log 2>&1 & types=$$!; \
		$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long"; tests=$$?; \
		wait $$types; typed=$$?; cat $(VENV)/mypy.log; test $$tests = 0 -a $$typed = 0

test-long: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "long or not long" --ignore tests/browser --ignore tests/slurm

test-cluster: $(VENV)/.installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cluster]'
	@$(BIN)/python -m pytest tests/integration/test_data_cluster.py

# Debian's PostgreSQL, that of a wheel, or a server named by LAPIS_TEST_POSTGRES=postgresql://user@host/postgres
test-postgres: $(VENV)/.installed-dev
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[postgres]'
	@$(BIN)/python -m tests.postgres || apt-get install -qy postgresql || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'pgserver>=0.1.4'
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" --postgres

# Debian's Chromium, driven by Playwright; axe-core looks at every page. NiceGUI makes its pages once in a process, so
# each file, which has a server of its own, is run in one of its own.
test-browser: $(VENV)/.installed-dev
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@test -f $(VENV)/axe.min.js || { cd $(VENV) && npm pack --silent axe-core@4.14.1 && tar -xzf axe-core-4.14.1.tgz --strip-components=1 package/axe.min.js; } || echo "axe-core could not be fetched: its checks will be skipped."
	@for file in tests/browser/test_*.py; do $(BIN)/python -m pytest -m "long or not long" $$file || exit 1; done

# Whatever daemons the packages start on a host with systemd: the tests have their own, with their own key, database and ports.
SLURM := slurmctld slurmd slurmdbd slurm-client munge mariadb-server
test-slurm: $(VENV)/.installed-dev
	@command -v slurmctld mariadbd munged >/dev/null || { apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
		apt-get -qq install -y --no-install-recommends $(SLURM); } || echo "Slurm cannot be installed: its tests are skipped."
	@$(BIN)/python -m pytest -rs -s -m "long or not long" --timeout 900 tests/slurm

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python benchmarks/$$script.py || exit 1; done

bench-peers: $(VENV)/.installed-dev
	@$(BIN)/python benchmarks/peers.py $(PEERS)

clean:
	rm -rf $(VENV) build src/lapis.egg-info
