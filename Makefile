# Two commands from a fresh clone: `make demo` and `make test`. Everything else is in `make help`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(shell cd proto && find kitemq -name '*.proto' | sort)
SERVICES := $(shell cd proto && grep -l '^service' $(PROTOS))
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy \
	--plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc

.PHONY: bench bench-growth soak-store help env demo test check format stubs clean

help: ## What can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

env: $(READY) ## The project's own environment, in .venv

$(READY): requirements-dev.txt client_sdk/pyproject.toml services/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "KiteMQ needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e ./client_sdk -e ./services
	touch $@

stubs: OUT ?= client_sdk/src
stubs: $(READY) ## Generate the protobuf stubs
	mkdir -p $(OUT)
	$(PROTOC) --python_out=$(OUT) --mypy_out=quiet:$(OUT) $(PROTOS)
	$(PROTOC) --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) $(SERVICES)

demo: $(READY) ## Real events through a broker that is killed on the way; FILE=access.log for your own
	$(BIN)/python -m examples.demo $(if $(FILE),--file "$(FILE)")

check: $(READY) ## Format, lint, types, layers, stubs
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy client_sdk/src services/src tests examples
	$(BIN)/lint-imports
	rm -rf build/stubs && $(MAKE) -s stubs OUT=build/stubs && for file in $$(cd build/stubs && find . -name '*.py*'); do \
		diff -q build/stubs/$$file client_sdk/src/$$file || { echo "stale stubs: run 'make stubs'"; exit 1; }; done

test: check ## Every check and test
	$(BIN)/pytest -q

soak-store: $(READY) ## Random crash histories of the store, N=100000 of them; SEED=n for where to begin
	$(BIN)/python -m tests.crash.soak --count $(or $(N),20000) $(if $(SEED),--seed $(SEED))

bench: $(READY) ## Speed and memory against bare gRPC, some 7 minutes; JSON=FILE: the rows too
	$(BIN)/kitemq bench suite --data build/bench $(if $(JSON),--json $(JSON))

bench-growth: $(READY) ## The same with big logs, many queues, many clients: some 15 minutes, 32 GB of disk
	$(BIN)/kitemq bench growth --data build/bench $(if $(JSON),--json $(JSON))

format: $(READY) ## Format the code
	$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

clean: ## Remove what was made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
