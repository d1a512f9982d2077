# `make train` and `make test` do all set-up themselves; both may be repeated.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real torch_npu over a stand-in for CANN: for tests without an NPU.
NPU := .venv-npu
NPU_TESTS := tests/npu tests/conformance
# The tools that build and check a release, away from the packages of the tests.
RELEASE := .venv-release
# Extras of the installation that `make sbom` describes, such as EXTRAS=torch,data.
EXTRAS ?=
VERSION = $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' moeport/version.py)
# The image that `make image` builds, further options of its engine, and the engine: the first of these that is there.
IMAGE ?= cpu
IMAGE_OPTIONS ?=
ENGINE ?= $(shell for each in docker podman buildah; do command -v $$each && break; done)
# The clients of experiment trackers, which do not go with MindSpore.
TRACKERS := .venv-trackers
# The release the tests run with. Options of pip, such as another index, go in PIP_INSTALL_OPTIONS.
TORCH ?= torch==2.13.0
PIP_INSTALL_OPTIONS ?=
export NO_MKDOCS_2_WARNING = 1
# Tests start hundreds of processes; without bytecode each would compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_OPTIONS)
# Two test processes, each with one thread of arithmetic. A file's tests share what they build, so one process runs them.
JOBS ?= 2
PYTEST_OPTIONS = -n $(JOBS) --dist loadfile --no-loadscope-reorder
PYTEST = $(BIN)/python -m pytest $(PYTEST_OPTIONS)

.PHONY: help train check test test-ranks test-npu test-trackers test-all lint format generate docs docs-serve bench \
  notebook dist sbom notices image clean

help:
	@echo "make train     install into $(VENV) and train the quickstart"
	@echo "make check     lint and the tests that need neither other processes nor MindSpore: minutes"
	@echo "make test      install what the suite needs and run it"
	@echo "make test-ranks only the part of it that starts processes or needs MindSpore"
	@echo "make test-npu  only the part of it that runs torch_npu without an NPU, in $(NPU)"
	@echo "make test-trackers  the clients of W&B, MLflow and SwanLab, offline, in $(TRACKERS)"
	@echo "make test-all  the whole suite with the slow sweeps"
	@echo "make lint      ruff, mypy, import contracts, docs in strict mode"
	@echo "make versions  try releases of Python, PyTorch and numpy, each in an environment of its own: hours"
	@echo "make format    rewrite the sources in the project's format"
	@echo "make generate  update the generated parts of the documentation and sources"
	@echo "make docs      build the documentation into site/"
	@echo "make bench     print the benchmarks"
	@echo "make notebook  run the notebook in examples/ and store its outputs"
	@echo "make dist      build the sdist and the wheel in dist/, and check both"
	@echo "make sbom      list the components of an installation, in dist/*.cdx.json"
	@echo "make notices   update THIRD_PARTY.md, the licences of the packages that moeport depends on"
	@echo "make image     build containers/$(IMAGE) with docker, podman or buildah; IMAGE=cuda and IMAGE=cann are the others"
	@echo "make clean     delete $(VENV), $(NPU), $(TRACKERS), $(RELEASE) and all build outputs; runs/ stays"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("moeport needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Use: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: $(BIN)/python
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[torch,tensorboard]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) -e ".[torch,mindspore,dev]"
	@touch $@ $(VENV)/.train

train: $(VENV)/.train
	$(BIN)/moeport train configs/quickstart.yaml --resume

check: lint
	$(PYTEST) -m "not slow and not ranks and not mindspore and not npu"

test: $(VENV)/.dev
	$(PYTEST) -m "not slow and not npu"
	@$(MAKE) --no-print-directory test-npu

test-ranks: $(VENV)/.dev
	$(PYTEST) -m "(ranks or mindspore) and not slow and not npu"

test-all: $(VENV)/.dev
	$(PYTEST) -m "not npu"
	@$(MAKE) --no-print-directory test-npu NPU_MARKS=npu

# Makes nothing, and says why, where torch_npu cannot be installed.
$(NPU)/.ok: $(VENV)/.dev tests/npu/environment.py tests/npu/standin/build.py tests/npu/standin/cann.c
	@$(BIN)/python -m tests.npu.environment $(NPU) $(PIP_INSTALL_OPTIONS)

NPU_MARKS = npu and not slow
# Where there is no $(NPU)/.ok, pytest skips the tests and says so.
test-npu: $(NPU)/.ok
	@if [ -e $(NPU)/.ok ]; then \
	  echo "real torch_npu front end, emulated kernels"; \
	  MOEPORT_FAKE_CANN="$(CURDIR)/$(NPU)/cann" $(NPU)/bin/python -m pytest $(PYTEST_OPTIONS) -m "$(NPU_MARKS)" $(NPU_TESTS); \
	else \
	  $(BIN)/python -m pytest -m npu $(NPU_TESTS); \
	fi

$(TRACKERS)/.ok: pyproject.toml
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_OPTIONS) "$(TORCH)"
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_OPTIONS) \
	  -e ".[torch,tensorboard,wandb,mlflow,swanlab]" "pytest>=8.3" "pytest-timeout>=2.3"
	@touch $@

test-trackers: $(TRACKERS)/.ok
	$(TRACKERS)/bin/python -m pytest tests/training/test_trackers.py tests/training/test_tracker_clients.py

# Not mkdocs build --quiet, which hides the warnings that --strict counts.
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: versions
# Options of pip are read from its environment variables, such as PIP_INDEX_URL.
versions: $(VENV)/.dev
	$(BIN)/python -m tests.versions
	$(BIN)/python docs/generate

generate: $(VENV)/.dev
	$(BIN)/python docs/generate

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.dev
	$(BIN)/mkdocs serve

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/abstraction_tax.py

notebook: $(VENV)/.dev
	$(BIN)/python examples/execute.py examples/routers.ipynb

$(RELEASE)/.ok: $(BIN)/python pyproject.toml
	$(BIN)/python -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_OPTIONS) -e ".[release]"
	@touch $@

# The wheel is built from the sdist, so that one that lacks a file fails here.
dist: $(RELEASE)/.ok
	rm -rf build dist
	$(RELEASE)/bin/python -m build
	$(RELEASE)/bin/twine check --strict dist/*.tar.gz dist/*.whl
	$(RELEASE)/bin/check-wheel-contents dist/*.whl

sbom: dist
	$(RELEASE)/bin/python -m venv --clear build/sbom
	build/sbom/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_INSTALL_OPTIONS) \
	  "$$(ls dist/*.whl)$(if $(EXTRAS),[$(EXTRAS)])"
	build/sbom/bin/python -m pip uninstall --quiet --yes pip setuptools
	sed 's/^dynamic = .*/version = "$(VERSION)"/' pyproject.toml > build/pyproject.toml
	$(RELEASE)/bin/cyclonedx-py environment --pyproject build/pyproject.toml --mc-type library --output-reproducible \
	  --output-file dist/moeport-$(VERSION).cdx.json build/sbom/bin/python

notices: $(VENV)/.dev $(RELEASE)/.ok
	$(RELEASE)/bin/python docs/generate/notices.py $(BIN)/python $(RELEASE)/bin/python

image:
	@test -e containers/$(IMAGE)/Containerfile || { \
	  echo "IMAGE=$(IMAGE): there is no containers/$(IMAGE)/Containerfile; expected $(sort $(notdir $(wildcard containers/*)))" >&2; exit 2; }
	@test -n "$(ENGINE)" || { echo "make image needs docker, podman or buildah, and none of them is installed;" \
	  "install one, such as with: apt-get install podman" >&2; exit 2; }
	@$(MAKE) --no-print-directory dist
	$(ENGINE) build --file containers/$(IMAGE)/Containerfile --tag moeport:$(VERSION)-$(IMAGE) \
	  --label org.opencontainers.image.version=$(VERSION) \
	  --label org.opencontainers.image.revision=$(shell git describe --always --dirty --abbrev=40 --exclude=*) \
	  $(IMAGE_OPTIONS) .

clean:
	rm -rf $(VENV) $(NPU) $(TRACKERS) $(RELEASE) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	rm -rf .venv-versions
