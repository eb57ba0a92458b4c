# make demo, make test: each makes its own virtual environment, in .venv unless VENV names another folder.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test test-slow

$(BIN)/accelerate: requirements.txt
	$(PYTHON) -m venv $(VENV) || { echo "no virtual environment: apt install python3-venv, then again"; exit 1; }
	$(BIN)/pip install -q -r requirements.txt
	touch $@

$(BIN)/ruff: requirements-test.txt $(BIN)/accelerate
	$(BIN)/pip install -q -r requirements-test.txt
	touch $@

demo: $(BIN)/accelerate
	$(BIN)/python cmo.py --overwrite --p-mix 0 --output-dir runs/demo/ce
	$(BIN)/python cmo.py --overwrite --drw --output-dir runs/demo/cmo
	$(BIN)/python -m tools.compare runs/demo/ce runs/demo/cmo

test: $(BIN)/ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(BIN)/ruff
	$(BIN)/python -m pytest -n 2 -m slow
