# Everything is set up on demand: system packages (apt, only what is missing), .venv, the compiled packet path.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WARM := .cache/warm
COMPILED := appliance/limits.py appliance/observe/counters.py appliance/supervisor/warm.py \
  $(shell find appliance/dataplane appliance/tables -name '*.py')

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' appliance/__init__.py)
BUNDLE := dist/edge-appliance-$(VERSION)-$(shell uname -m).tar
ANSIBLE := .venv/.ansible
INVENTORY ?= ansible/inventory/example.yml

.PHONY: help lab test check perf perf-results perf-smoke sequences config cli warm venv bundle rollout rollout-test packages clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 15

lab: $(WARM) ## a cluster, two nodes, one service with an instance on each, a client that calls it
	$(BIN)/appliance lab demo

test: $(WARM) ## all tests; those that need root are skipped, and counted, without it
	$(BIN)/pytest -n 2 --dist loadscope

check: $(INSTALLED) ## ruff, mypy, and that README and docs/benchmarks.md show what the result files have
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m perf pages --check

perf: $(WARM) ## direct routing, kernel VXLAN, the appliance and others that are installed; PERF=--quick
	$(BIN)/python -m perf run $(PERF)

# Quicker, and into another place: make perf-results REPEATS=1 SECONDS=1 RESULTS=/tmp/r FIGURES=/tmp/r PAGE=/tmp/r/page.md
RESULTS ?= perf/results
FIGURES ?= docs/figures
PAGE ?= docs/benchmarks.md
BASELINE ?= perf/baseline.json
REPEATS ?= 3
SECONDS ?= 2
RUN ?=
MODES ?= vxlan,appliance,modes
STORM ?=
STUDIES := calibrate path flows stream tables resync naming latency loss storm

perf-results: $(WARM) ## every result that docs/benchmarks.md shows, its figures and the baseline, anew: 35 minutes of a quiet machine
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[perf]'
	@failed=; \
	measured() { echo "== perf $$*"; $(BIN)/python -m perf "$$@" || failed="$$failed $$1"; }; \
	measured run $(RUN) --repeats $(REPEATS) --seconds $(SECONDS) --output $(RESULTS)/systems.json; \
	measured report $(RESULTS)/systems.json --into $(PAGE); \
	measured smoke --record $(RESULTS)/systems.json --baseline $(BASELINE); \
	measured run --systems $(MODES) --scenarios tcp1,udp64-flows,rr,connect --repeats $(REPEATS) \
	  --seconds $(SECONDS) --output $(RESULTS)/modes.json; \
	measured report $(RESULTS)/modes.json --into $(PAGE) --as modes; \
	for study in $(STUDIES); do \
	  test $$study = storm && options="$(STORM)" || options=; \
	  measured $$study $$options --output $(RESULTS)/$$study.json; \
	  measured report $(RESULTS)/$$study.json --into $(PAGE); \
	done; \
	test $(RESULTS) != perf/results || measured pages; \
	measured plot $$(ls $(RESULTS)/systems.json $(STUDIES:%=$(RESULTS)/%.json) 2> /dev/null) --into $(FIGURES); \
	test -z "$$failed" || { echo "perf-results: failed, all else is done:$$failed" >&2; exit 1; }

perf-smoke: $(WARM) ## fail if the appliance lost a fifth of its speed against VXLAN; PERF=--slow=spin shows that it would
	$(BIN)/python -m perf smoke $(PERF)

sequences: $(WARM) ## docs/sequences.md, from what a lab's nodes and cluster say to each other
	$(BIN)/python -m appliance.lab.trace > docs/sequences.new && mv docs/sequences.new docs/sequences.md

config: $(INSTALLED) ## config/appliance.toml, from the model
	$(BIN)/appliance config example > config/appliance.toml

cli: $(INSTALLED) ## docs/cli.md, from the commands' help
	$(BIN)/appliance cli-reference > docs/cli.md

warm: $(WARM) ## the compiled packet path

venv: $(INSTALLED) ## .venv with the appliance and what its development needs

bundle: $(BUNDLE) ## dist/…tar: the appliance's wheel and all that it needs, for hosts without the internet

rollout: $(BUNDLE) $(ANSIBLE) ## install on all hosts of an inventory, and verify with traffic: make rollout INVENTORY=fleet.yml
	cd ansible && ../$(BIN)/ansible-playbook -i $(abspath $(INVENTORY)) playbooks/install.yml playbooks/verify.yml

rollout-test: $(BUNDLE) $(ANSIBLE) $(WARM) ## the playbooks, against machines of network namespaces that boot Debian; minutes
	cd ansible && ../$(BIN)/ansible-lint -q
	$(BIN)/pytest -v ansible/tests

packages:
	@missing=$$(PYTHON=$(PYTHON) .ci/packages); test -z "$$missing" || { \
	  test "$$(id -u)" = 0 && command -v apt-get > /dev/null \
	    || { echo "expected root and apt-get to install:" $$missing >&2; exit 1; }; \
	  apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qy --no-install-recommends $$missing; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "expected Python 3.11 or later")'

$(INSTALLED): pyproject.toml | packages
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(ANSIBLE): $(INSTALLED)
	@missing=$$(.ci/packages rollout); test -z "$$missing" || { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	  apt-get install -qy --no-install-recommends $$missing; }
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[rollout]'
	@touch $@

$(BUNDLE): $(INSTALLED) $(shell find appliance -name '*.py')
	rm -rf build .cache/wheels && mkdir -p $(@D)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --wheel-dir .cache/wheels .
	tar -C .cache/wheels --sort=name --owner=0 --group=0 --mtime=@0 -cf $@.new . && mv $@.new $@

$(WARM): $(INSTALLED) $(COMPILED) | packages
	$(BIN)/appliance warm -c config/appliance.toml
	@mkdir -p $(@D) && touch $@

clean: ## remove all that make has made here, a running lab too
	@test ! -x $(BIN)/appliance || $(BIN)/appliance lab down
	rm -rf .venv .cache dist .ansible .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
