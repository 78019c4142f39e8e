# `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
SBOM := var/sbom.json

.DEFAULT_GOAL := help
.PHONY: help setup run test system screens reference slow soak chaos check format lint-lua lock sbom audit-dependencies client loadtest loadtest-headless bench

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv and install the locked packages

$(STAMP): requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

run: setup  ## start everything, with an open demo sale
	$(BIN)/reservation serve --demo-sale

# Three processes for two cores, since many tests wait for a server or a deadline. Each file of
# tests runs in one process, with the servers that it starts.
# `make test T="tests/lua -k race"` runs a part, in one process.
TEST_PROCESSES ?= $(shell $(PYTHON) -c "import os; print(min(8, (3 * os.cpu_count() + 1) // 2))")
# The tests start hundreds of processes: their bytecode is kept, whatever the environment says.
test system slow soak: export PYTHONDONTWRITEBYTECODE :=
IN_PARALLEL := --numprocesses $(TEST_PROCESSES) --dist loadfile
QUICK := -m "not system and not slow and not soak"
SYSTEM := -m "system and not slow and not soak"
test: setup  ## the quick tests, on real servers that they start themselves
	$(BIN)/python -m pytest $(or $(T),$(IN_PARALLEL) $(QUICK))

system: setup  ## the tests of seconds: whole services, under faults and in a browser
	$(BIN)/python -m pytest $(or $(T),$(IN_PARALLEL) $(SYSTEM))

# Needs a Chromium; check each picture before committing it.
screens: setup  ## take the pictures of docs/screens.md again
	SCREENS=docs/images $(BIN)/python -m pytest -m slow tests/e2e/browser/test_screenshots.py

reference: setup  ## generate docs/reference and the state diagram from the code
	$(BIN)/python -m docs.reference.generate

# The full counts, in hours; `.ci/run` draws a sample of each on every push.
soak: setup  ## the tests too long for a push: every mutant, every cut, ten thousand payments
	$(BIN)/python -m pytest -m soak $(T)

# `.ci/run` draws a sixth of their files on every push.
slow: setup  ## the tests of minutes, about an hour in all
	$(BIN)/python -m pytest -m "slow and not soak" $(or $(T),--numprocesses 2 --dist loadfile)

# `make chaos C="--minutes 60"`: longer; `C="--seed N"`: repeat the draw of a run;
# `C="--beside latest"`: two deployments that alternate between the last release and this tree;
# `C="--hosts sentinel"`, `C="--hosts cluster"`: each part on a host of its own, as root.
chaos: setup  ## run the fault-injection suite for nine minutes, and judge every answer
	$(BIN)/python -m tests.faults.chaos $(C)

check: setup lint-lua  ## the checks of CI except the tests: format, lint, types, imports, scripts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: setup  ## rewrite the code in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# No wheel contains luacheck; Debian's package is `lua-check`. Without it the tests still run every
# script on a real server.
lint-lua:  ## lint the Lua scripts, where luacheck is installed
	@if command -v luacheck >/dev/null; then luacheck --quiet --no-color scripts/lua; \
	else echo 'lint-lua: no luacheck here, skipped (apt-get install lua-check)'; fi

# `make loadtest L="--scenario stampede"`: more options for Locust. Without a running service it starts
# its own.
loadtest: setup  ## the load test with its web UI, on http://127.0.0.1:8089
	$(BIN)/python -m loadtests --users 200 --run-time 60s $(L)

loadtest-headless: setup  ## a spike of one minute; fails unless the verdict is clean
	$(BIN)/python -m loadtests --headless --only-summary --users 200 --run-time 60s --stock 300 \
	  --html var/loadtests/locust.html --json-file var/loadtests/statistics $(L)

# `make bench B="compare --quick"` runs a part; `make bench B=--help` lists them.
bench: setup $(BENCH_STAMP)  ## compare speed and memory with other implementations: about 100 minutes
	$(BIN)/python -m benchmarks $(B)

$(BENCH_STAMP): requirements/bench.txt $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements/bench.txt
	touch $@

# The warning is about dependencies among the packages, which a lock file does not have.
sbom: setup  ## write the service's runtime packages to var/sbom.json, as CycloneDX
	mkdir -p $(dir $(SBOM))
	$(BIN)/python -W ignore::UserWarning -m cyclonedx_py requirements requirements/run.txt \
	  --pyproject pyproject.toml --output-reproducible -o $(SBOM)

# Needs the network, and its result changes without a change here: so it is not part of `.ci/run`. A
# package without a result fails it as well.
audit-dependencies: setup  ## check the locked packages for known vulnerabilities (OSV)
	$(BIN)/pip-audit --strict --disable-pip --vulnerability-service osv \
	  $(foreach lock,run traces dev bench,-r requirements/$(lock).txt)

client: setup  ## write the blocking Python client again, from the one for asyncio
	$(BIN)/python -m scripts.sync_client

lock: pyproject.toml  ## resolve the dependencies again (needs uv)
	uv pip compile pyproject.toml --extra build --extra dev --extra load --extra traces --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header -o requirements/dev.txt
	uv pip compile pyproject.toml --extra build --universal --python-version 3.11 -c requirements/dev.txt \
	  --generate-hashes --no-emit-index-url --no-header -o requirements/run.txt
	uv pip compile pyproject.toml --extra build --extra traces --universal --python-version 3.11 -c requirements/dev.txt \
	  --generate-hashes --no-emit-index-url --no-header -o requirements/traces.txt
	uv pip compile pyproject.toml --extra bench --universal --python-version 3.11 -c requirements/dev.txt \
	  --generate-hashes --no-emit-index-url --no-header -o requirements/bench.txt
