# make run: everything from nothing to the result table. make test: the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: run test check install clean

run: install
	$(BIN)/dvc repro
	@$(BIN)/pipeline show
	@echo
	@echo "Review every run:  $(BIN)/pipeline ui"

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

install: $(INSTALLED)

# uv installs in seconds what takes pip minutes; pip stays as the way that always works. Compiled, as pip leaves it: else
# every process compiles what it imports where PYTHONDONTWRITEBYTECODE is set, 12 s of it (benchmarks/RESULTS.md).
$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv || echo "no uv here: going on with pip"
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install --system-certs --quiet --compile-bytecode --python $(BIN)/python -e '.[install,dev]' \
		|| $(BIN)/python -m pip install --quiet -e '.[install,dev]'
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) data models plots runs tuning tuned.json metrics.json predictions.csv report.md
