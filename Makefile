# Every target sets itself up in a local virtual environment.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow test-torch sanitize lint docs hero bench gpu bench-class-parallel bench-learning-rate bench-prediction bench-methods bench-layouts paper-smoke paper-cpu paper-gpu dist clean
# What says that an extra is installed is kept.
.SECONDARY:

# What an installation is made from; Python files are used as they are.
SOURCES := pyproject.toml setup.cfg setup.py constraints.txt lgla_losses/kernels/native.c lgla_losses/kernels/native_rows.h

demo: $(VENV)/.examples    ## train LGLA beside its baselines on long-tailed digits
	$(RUN) examples/quickstart.py

# Two processes of one thread each; a file's tests, and a page's blocks, stay in one.
test: $(VENV)/.test        ## all but the slow tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.test $(VENV)/.release  ## compilers, four processes, killed runs, built wheels
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow -n 2 --dist load

# Any version from 2.6 on. Most have no wheel for CPUs alone: what is installed is a build for CUDA, several GB.
TORCH ?= 2.11.0
test-torch: .venv-torch-$(TORCH)/.test  ## the tests, without the pages, on another PyTorch: TORCH=2.6.0
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n 2 --dist loadfile tests

sanitize: $(VENV)/.test    ## random calls of the C library under ASan and UBSan; a part of test-slow
	$(RUN) -m pytest -m slow tests/engines/test_sanitize.py

lint: $(VENV)/.dev         ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(VENV)/.docs        ## the site, into docs/_build/html; a warning is an error
	$(RUN) -m sphinx -W --keep-going -j auto docs docs/_build/html
	$(RUN) docs/check_links.py docs/_build/html

hero: $(VENV)/.docs        ## README's first picture
	$(RUN) docs/images/hero.py

bench: $(VENV)/.bench      ## the losses beside their peers and the physical limit, on whatever device there is
	$(RUN) benchmarks/losses.py

bench-class-parallel: $(VENV)/.bench  ## classes spread over ranks: memory, numbers sent, time
	$(RUN) benchmarks/class_parallel.py

bench-learning-rate: $(VENV)/.bench  ## what the usual learning rate makes of three experts; DATA=cifar10.npz for images
	$(RUN) benchmarks/learning_rate.py $(if $(DATA),--data "$(DATA)")

bench-prediction: $(VENV)/.examples  ## calibrated prediction on real data: DATA is the folder of benchmarks/real_data.py
	$(RUN) benchmarks/prediction.py "$(DATA)" --picture docs/images/prediction.png

bench-methods: $(VENV)/.examples  ## which method wins on real data; what is done stays in runs/methods
	$(RUN) benchmarks/methods.py "$(DATA)" --picture docs/images/methods.png $(if $(MINUTES),--minutes $(MINUTES))

bench-layouts: $(VENV)/.bench  ## what grouped experts cost against independent ones
	$(RUN) tests/helpers/torchvision_shim.py benchmarks/expert_layouts.py

# The runs of these three stand in examples/paper/suites.toml, as do the files that TINY and CIFAR10 replace:
# make paper-cpu TINY=tiny_imagenet_lt.npz CIFAR10=cifar10.npz
TRAIN_PAPER := tests/helpers/torchvision_shim.py examples/train_paper.py
PAPER_FILES = --files $(addprefix tiny=,$(TINY)) $(addprefix cifar10=,$(CIFAR10))
RECORDS := benchmarks/results/paper

SMOKE := runs/smoke
paper-smoke: $(VENV)/.test  ## the paper's ablation on scikit-learn's digits, from recipe to page, in minutes on a CPU
	mkdir -p $(SMOKE)
	$(RUN) examples/make_data.py digits $(SMOKE)/digits.npz --imbalance 50
	$(RUN) $(TRAIN_PAPER) --suite smoke --files digits=$(SMOKE)/digits.npz --runs $(SMOKE) --records $(SMOKE)/records
	$(RUN) examples/paper_results.py --records $(SMOKE)/records --runs $(SMOKE) --page $(SMOKE)/results.md
	cat $(SMOKE)/results.md

# With one thread, as the records of docs/results.md were made.
paper-cpu: $(VENV)/.test   ## what docs/results.md shows, in about six hours
	OMP_NUM_THREADS=1 $(RUN) $(TRAIN_PAPER) --suite cpu $(PAPER_FILES) --records $(RECORDS)
	OMP_NUM_THREADS=1 $(RUN) examples/sweep_tau.py --output benchmarks/results/sweep_tau_digits.json
	$(RUN) examples/paper_results.py --runs runs/paper

# PYTHON is one with a CUDA build of PyTorch, torchvision and torchmetrics:
# make paper-gpu PYTHON=python TINY=tiny_imagenet_lt.npz CIFAR10=cifar10.npz
paper-gpu:                 ## the paper's recipes in full, with 3 seeds
	$(PYTHON) examples/train_paper.py --suite gpu $(PAPER_FILES) --records $(RECORDS)
	$(PYTHON) examples/paper_results.py --runs runs/paper

# On a machine with a GPU and no network: PYTHON is one with a CUDA build of PyTorch, and nothing is installed. Each
# section has a share of SECONDS_LEFT, or the time said behind it; DATA is what train needs, and DEVICE=cpu a dry run.
# make gpu DATA=cifar10_lt.npz SECTIONS="check=120 bench=100 train" SECONDS_LEFT=600 OUT=runs/gpu
DEVICE ?= cuda
OUT ?= runs/gpu
SECTIONS ?= check bench layouts train
SECONDS_LEFT ?= 600
DATA ?=
gpu:                       ## tests, benchmarks and training on a GPU; all that they give in OUT/gpu.tar.gz
	$(PYTHON) benchmarks/gpu.py --device $(DEVICE) --out "$(OUT)" --sections $(SECTIONS) --seconds $(SECONDS_LEFT) \
		$(if $(DATA),--data "$(DATA)")

# On Linux: the source archive, and from it a wheel without the C library for every system and one with it. The latter
# gets the oldest tag that its needs allow; an index refuses the tag linux_x86_64 that it has before. DIST is not taken
# from the environment, because the folder is removed.
DIST = dist
dist: $(VENV)/.release     ## wheels and source archive, checked for upload
	rm -rf "$(DIST)"
	LGLA_LOSSES_PURE=1 $(RUN) -m build --outdir "$(DIST)"
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir "$(DIST)/linux" "$(DIST)"/*.tar.gz
	PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m auditwheel repair --wheel-dir "$(DIST)" "$(DIST)"/linux/*.whl
	rm -r "$(DIST)/linux"
	$(RUN) -m twine check --strict "$(DIST)"/*

# Without PyTorch: packages are built in environments of their own.
REQUIRED := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["release"], sep="\n")
$(VENV)/.release: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -c '$(REQUIRED)' | $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -r /dev/stdin
	@touch $@

$(VENV)/.%: $(SOURCES) | $(VENV)/bin/python
	@echo "Installing lgla-losses[$*] and PyTorch into $(VENV), about a minute ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
	@touch $@

# With torch 2.x.y goes torchvision 0.(x + 15).y; triton comes along with torch, and its interpreter before 3.7
# needs numpy < 2.4.
MINOR = $(word 2,$(subst ., ,$*))
PATCH = $(word 3,$(subst ., ,$*))
.venv-torch-%/.test: $(SOURCES)
	@echo "Installing lgla-losses[test] and PyTorch $* into $(@D), minutes ..."
	$(PYTHON) -m venv $(@D)
	grep -Ev "^(torch|torchvision|triton|numpy|setuptools)==" constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt \
		torch==$* torchvision==0.$$(($(MINOR) + 15)).$(PATCH) "numpy<2.4" -e ".[test]"
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:                     ## remove what the other targets installed and built, but for runs
	rm -rf $(VENV) .venv-torch-* build dist *.egg-info lgla_losses/kernels/_native*
