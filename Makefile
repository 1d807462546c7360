# Every target sets itself up in a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint bench dist clean
.SECONDARY:

demo: $(VENV)/.examples    ## train LGLA beside its baselines on long-tailed digits
	$(RUN) examples/quickstart.py

test: $(VENV)/.test        ## all but the slow tests
	$(RUN) -m pytest

test-slow: $(VENV)/.test   ## compilers, four processes, built wheels
	$(RUN) -m pytest -m slow

lint: $(VENV)/.dev         ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.bench      ## what grouped experts cost against independent ones
	$(RUN) tests/torchvision_shim.py benchmarks/expert_layouts.py

dist: $(VENV)/.dev         ## the wheel and the source archive, checked for upload
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

$(VENV)/.%: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing lgla-losses[$*] and PyTorch into $(VENV), about a minute ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info
