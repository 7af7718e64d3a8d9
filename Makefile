# Every target installs what it needs into $(VENV); `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOG ?= examples/shop/events.ndjson
IMAGE ?= docker.io/eventprojector/eventprojector:0.1.0
CLUSTER ?= ../shared/cluster
CLUSTER_HOME ?= $(HOME)/.cache/cluster
EXTRAS := operator tracing image embedded docs dev

.DEFAULT_GOAL := help
.PHONY: help install demo test faults lint format lock chart dashboards pictures docs e2e bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9_-]+:.*## /{printf "  %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## a virtual environment from the hashed locks

$(VENV)/.installed: requirements/dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r requirements/dev.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

demo: install ## append a log over HTTP to a real MongoDB and show the read models; LOG=FILE for another log
	$(BIN)/python -m examples.demo $(LOG)

test: install ## unit, integration, acceptance, chart and rules tests (under 10 minutes)
	$(BIN)/pytest -m "not faults and not e2e"

faults: install ## the long fault-injection suites
	$(BIN)/pytest -m faults

lint: install ## format, lint, types, import directions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## apply format and safe fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: install ## write requirements/*.txt anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 pyproject.toml -o requirements/base.txt
	for extra in $(EXTRAS); do \
	  $(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 --extra $$extra pyproject.toml -o requirements/$$extra.txt || exit 1; \
	done
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
	  | $(BIN)/uv pip compile --quiet --generate-hashes --universal --python-version 3.11 - -o requirements/build.txt

chart: install ## the chart's schema and README from its values.yaml
	$(BIN)/python deploy/chart.py

dashboards: install ## write the chart's Grafana dashboards anew from deploy/observability
	$(BIN)/python -m deploy.observability.dashboards

pictures: install ## draw the dashboards anew from a run of faults against a real Prometheus
	PICTURES=docs/images $(BIN)/pytest -m faults tests/acceptance/test_observability.py

docs: install ## write the generated pages anew and build the site, strictly, into site/
	$(BIN)/python -m deploy.observability.pages
	$(BIN)/mkdocs build --quiet --strict

# A kubeconfig of the environment is not taken: it may be that of a cluster which is no place for tests.
ifeq ($(origin KUBECONFIG),command line)
e2e: install ## the chart on a real cluster; KUBECONFIG=FILE for a cluster of yours, IMAGE=… for an image that it can pull
	KUBECONFIG=$(KUBECONFIG) IMAGE=$(IMAGE) $(BIN)/pytest -m e2e tests/e2e
else
e2e: install
	$(CLUSTER)/build
	$(CLUSTER)/up
	$(CLUSTER)/image base
	$(CLUSTER)/image build $(IMAGE) .
	PATH=$(CLUSTER_HOME)/bin:$$PATH KUBECONFIG=$(CLUSTER_HOME)/kubeconfig IMAGE=$(IMAGE) OWN_CLUSTER=true \
	  $(BIN)/pytest -m e2e tests/e2e
endif

bench: install $(BIN)/vegeta ## the benchmarks, each beside its peers on the same mongod
	$(BIN)/python -m bench

$(BIN)/vegeta: $(VENV)/.installed
	GOBIN=$(abspath $(BIN)) go install github.com/tsenart/vegeta/v12@v12.13.0

clean: ## remove what the targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
