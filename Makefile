# Everything a newcomer needs: `make demo` and `make test`. `make help` lists the rest.

PYTHON ?= python3
# cpu: the torch that constraints.txt pins. cuda: the newest that pyproject.toml accepts. Remembered.
TORCH ?= $(if $(wildcard .venv/.setup-cuda),cuda,cpu)
# An extra package index for torch's own builds, where the default one has only CUDA's.
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-$(TORCH)
CODE := server/loraplex kernels/loraplex_kernels clients/loraplex_client
PROTOS := $(wildcard protos/loraplex_protos/v1/*.proto)

ifeq ($(TORCH),cuda)
CONSTRAINTS := $(VENV)/constraints-cuda.txt
else
CONSTRAINTS := constraints.txt
endif

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup demo test check format bench bench-peers bench-load bench-adapters kernels-report fuzz train protos proto-lint docker clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

setup: $(STAMP) ## make .venv with everything for running, testing and developing

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints-cuda.txt
	$(if $(filter cuda,$(TORCH)),$(BIN)/python -m pip uninstall -q -y torch triton)
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	    -c $(CONSTRAINTS) -e '.[server,test,dev]'
	rm -f $(VENV)/.setup-*
	touch $@

demo: setup ## start a server, upload the example adapters, ask all of them at once
	$(BIN)/loraplex demo

test: check ## the whole suite
	$(BIN)/pytest

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE) benchmarks tests

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## a load of 8 clients for 8 adapters on a server of its own (two minutes)
	$(BIN)/python benchmarks/serving.py --concurrency 8 --num-adapters 8 --warmup 8 --repeats 3

bench-peers: setup ## tokens a second beside vLLM, llama.cpp, PEFT and polylora (half an hour; installs them first)
	missed=; export $(if $(TORCH_INDEX),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX),PIP_EXTRA_INDEX_URL); \
	$(BIN)/python benchmarks/side_by_side.py --save side_by_side || missed=side_by_side; \
	$(BIN)/python benchmarks/side_by_side.py --batches 1 --adapters 0,1 --repeats 5 --peer-repeats 5 \
	    --save side_by_side_one || missed="$$missed side_by_side_one"; \
	test -z "$$missed" || { echo "limits missed: $$missed"; exit 1; }

bench-load: setup ## long prompts, floods, prefixes, drafts, memory, cost as work grows (half an hour)
	missed=; for name in step_profile long_prompt fairness prefix_cache speculative scaling memory; do \
	    $(BIN)/python benchmarks/$$name.py --save $$name || missed="$$missed $$name"; \
	done; test -z "$$missed" || { echo "limits missed:$$missed"; exit 1; }

bench-adapters: setup ## stalls, cold starts, thousands of adapters, mixed ranks (a quarter of an hour)
	for name in stall cold_start many_adapters mixed_ranks; do \
	    $(BIN)/python benchmarks/$$name.py --save $$name || exit 1; \
	done

kernels-report: setup ## compile every Triton kernel for six GPUs, and hold it to the gates
	$(BIN)/python benchmarks/kernel_report.py --save

fuzz: setup ## ten thousand random operations against servers of a tiny model (a quarter of an hour)
	$(BIN)/pytest tests/lifecycle --operations 11000 --timeout 3600 \
	    --run-log benchmarks/results/lifecycle.md

train: setup ## train the example adapters anew
	$(BIN)/python benchmarks/train_adapters.py

protos: ## make the stubs anew from the .proto files
	test -x build/protos-env/bin/python || $(PYTHON) -m venv build/protos-env
	build/protos-env/bin/python -m pip install -q --disable-pip-version-check -r protos/requirements.txt
	build/protos-env/bin/python -m grpc_tools.protoc -I protos \
	    --python_out=protos --pyi_out=protos --grpc_python_out=protos $(PROTOS)

proto-lint: ## buf's STANDARD rules (needs npx)
	cd protos && npx --yes @bufbuild/buf lint

docker: ## build the image
	docker build $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) -t loraplex .

clean: ## remove what the targets made, but not the caches in your home
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
