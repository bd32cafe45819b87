# The commands of this repository. They need Python >= 3.11 and make; .venv is made by itself and
# installed again only when pyproject.toml or constraints.txt changed.
#
#   make serve [MODEL=folder-or-hub-name] [REVISION=] [HOST=] [PORT=] [DEVICE=] [DTYPE=] [CONFIG=]
#   make test       format, lint, types and tests
#   make test-long  the tests that take minutes
#   make test-clients  real clients against a real server, each in an environment of its own below
#                   build/clients: [ONLY=group,group]; minutes, needs the package registries and
#                   Node >= 20, without which it fails (ONLY= leaves openai-node out)
#   make check      format, lint, types and import direction
#   make fix        repair format and what lint can repair
#   make bench      time machine, engine and server: [MODEL=] [URL=of a running server] [QUICK=1]
#                   [ONLY=limits,engine,http,media] [LABEL=]; results in benchmarks/results
#   make demo-model train the embedded demo model again (hours): build/demo-model/export is what to
#                   copy to server/demo; run again, it goes on where it was stopped
#   make compatibility  write docs/compatibility.md again, from the code
#   make docker-check  replay the image's install and start steps without a container engine
#   make clean      remove the environment and what was built, but not build/demo-model

.DEFAULT_GOAL := help
.PHONY: help serve test test-long test-clients check fix bench demo-model compatibility docker-check clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_STAMP := $(VENV)/.installed-bench
CHECKED := server tests tools benchmarks

# The first interpreter that is new enough. PYTHON=... chooses another.
PYTHON ?= $(shell for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo $$candidate; break; fi; done)

# Only what stands on make's command line counts: HOST and PORT are set in many a shell.
# $(call given,VARIABLE,flag)
given = $(if $(filter command,$(origin $1)),--$2 '$($1)')
CONFIG := config.yaml

help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@if [ -z '$(PYTHON)' ]; then echo 'hcx-server needs Python 3.11 or newer; none was found.' >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'hcx-server needs Python 3.11 or newer; $(PYTHON) is older.' >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test,dev]'
	@touch $@

# What only the plot of a measurement needs.
$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

serve: $(STAMP)
	@$(BIN)/hcx-server serve --config '$(CONFIG)' $(call given,MODEL,model) \
		$(call given,REVISION,revision) $(call given,HOST,host) $(call given,PORT,port) \
		$(call given,DEVICE,device) $(call given,DTYPE,dtype)

check: $(STAMP)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

test: check
	$(BIN)/python -m pytest

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

test-clients: $(STAMP)
	@$(BIN)/python -m tests.clients.run $(call given,ONLY,only)

fix: $(STAMP)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

bench: $(BENCH_STAMP)
	@$(BIN)/python -m benchmarks $(call given,MODEL,model) $(call given,URL,url) \
		$(call given,ONLY,only) $(call given,LABEL,label) $(if $(QUICK),--quick)

demo-model: $(STAMP)
	$(BIN)/python -m tools.demo_model

compatibility: $(STAMP)
	$(BIN)/python -m tools.compatibility

docker-check:
	docker/replay.sh

clean:
	rm -rf $(VENV) build/lib build/bdist* build/clients dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find server tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
