PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := torch,openvino,dicom,interop,search,dev
READY := $(VENV)/.ready

.PHONY: demo test fast lint docs clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(READY)

# The main job on a real slide: ends by naming what it made.
demo: $(READY)
	$(BIN)/eosin demo --out demo

# Everything CI runs: the fast tests side by side, then the slow ones (kills, timings, docs) each alone.
test: lint fast
	$(BIN)/python -m pytest -m slow

# What to run while working.
fast: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4

lint: $(READY)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/typos
	$(BIN)/lint-imports
	$(BIN)/pyright
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) demo site build dist
