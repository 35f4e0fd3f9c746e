# make demo   set up and run the main job
# make test   set up and run the tests
PYTHON ?= python3
# Where torch comes from: auto (CPU wheel where no NVIDIA driver is), default (pip's own choice),
# or the address of an index.
TORCH_INDEX ?= auto
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test check env-demo env-dev protos clean

demo: env-demo
	$(BIN)/fedtune demo

test: env-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: env-dev
	$(BIN)/python scripts/check.py

protos: env-dev
	$(BIN)/python scripts/protos.py

env-demo:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extra demo --torch-index $(TORCH_INDEX)

env-dev:
	@$(PYTHON) scripts/setup_env.py --venv $(VENV) --extra dev --torch-index $(TORCH_INDEX)

clean:
	rm -rf $(VENV) build dist runs
