# Every target sets itself up in a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow lint bench bench-gpu bench-layouts dist clean
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

bench: $(VENV)/.bench      ## the losses beside their peers and the physical limit, on whatever device there is
	$(RUN) benchmarks/losses.py

bench-layouts: $(VENV)/.bench  ## what grouped experts cost against independent ones
	$(RUN) tests/torchvision_shim.py benchmarks/expert_layouts.py

# On a machine with a GPU, whose own PyTorch is used: PYTHON must have it. The C library is built in place.
bench-gpu:                 ## the tests on CUDA, then every benchmark there
	$(PYTHON) -c "from setuptools import setup; setup()" --quiet build_ext --inplace
	$(PYTHON) -m pytest -m "not slow" tests/test_engines.py tests/test_triton.py tests/test_fused.py tests/test_linear.py \
		tests/test_loss.py tests/test_weighting.py tests/test_precision.py tests/test_gradients.py tests/test_compile.py
	$(PYTHON) benchmarks/losses.py --device cuda
	$(PYTHON) benchmarks/expert_layouts.py --device cuda

dist: $(VENV)/.dev         ## the wheel and the source archive, checked for upload
	rm -rf dist
	$(RUN) -m build
	$(RUN) -m twine check --strict dist/*

$(VENV)/.%: pyproject.toml constraints.txt lgla_losses/kernels/native.c lgla_losses/kernels/native_rows.h | $(VENV)/bin/python
	@echo "Installing lgla-losses[$*] and PyTorch into $(VENV), about a minute ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist *.egg-info lgla_losses/kernels/_native*
