# Each target makes what it needs: a virtual environment in .venv, then only what changed.
#
#   make demo          the worked example; options: make demo DEMO_ARGS="--quick"
#   make test          all tests; one file: make test PYTEST_ARGS="tests/native/test_trees.py"
#   make lint          ruff: rules and format
#   make types         pyright
#   make floors        import-linter: arrows only downward
#   make test-matrix   native tests on the newest and on the oldest supported JAX
#   make docs          HTML in docs/_build/html
#   make clean         remove all that the targets above made

# The first of these that really runs is taken. Name another: make test PYTHON=/path/to/python
PYTHON ?= python3.11 python3 python3.12 python3.13
PYTHON311 ?= python3.11 $(call pyenv_pythons,3.11) python3
PYTHON313 ?= python3.13 $(call pyenv_pythons,3.13) python3

DEMO_ARGS ?=
PYTEST_ARGS ?= -n 2

VENV := .venv
MATRIX := .venv-matrix
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

pyenv_pythons = $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(1).*/bin/python)

# $(call find_python,CANDIDATES,CONDITION ON v): a name on the path may be a shim for a version
# that is not there, or lack the modules that make an environment, so each candidate is run.
find_python = $(shell for python in $(1); do \
	"$$python" -c 'import sys, venv, ensurepip; v = sys.version_info[:2]; sys.exit(not ($(2)))' \
	>/dev/null 2>&1 && echo "$$python" && break; done)

# $(call make_venv,FOLDER,CANDIDATES,CONDITION ON v,VERSIONS,VARIABLE)
define make_venv
@python="$(call find_python,$(2),$(3))"; \
if [ -z "$$python" ]; then \
	echo "No working Python $(4) with venv and pip among: $(2)" >&2; \
	echo "Install one, or name it: make $(or $(MAKECMDGOALS),demo) $(5)=/path/to/python" >&2; \
	exit 1; \
fi; \
echo "$$python -m venv $(1)"; "$$python" -m venv --clear $(1)
endef

.PHONY: demo test lint types floors test-matrix test-newest test-oldest docs clean

demo: $(VENV)/.demo
	$(BIN)/python examples/maml_digits.py $(DEMO_ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/pyright

floors: $(VENV)/.test
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) $(MATRIX) build dist docs/_build .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is as new as the last install that went through. A broken link counts as absent, so an
# environment whose Python has gone is made again.
$(BIN)/python:
	$(call make_venv,$(VENV),$(PYTHON),(3,11) <= v < (3,14),3.11 to 3.13,PYTHON)

$(VENV)/.demo: extras := examples
$(VENV)/.test: extras := test,examples
$(VENV)/.docs: extras := docs
$(VENV)/.demo $(VENV)/.test $(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing jaxmeta[$(extras)] into $(VENV); the first time takes a minute or two."
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[$(extras)]"
	@touch $@

test-matrix: test-oldest test-newest

# No constraints here: the ranges in pyproject.toml are what is tested, at both of their ends.
test-newest:
	$(call make_venv,$(MATRIX)/newest,$(PYTHON313),v == (3,13),3.13,PYTHON313)
	$(MATRIX)/newest/bin/python -m pip install --quiet -e ".[test-native]"
	$(MATRIX)/newest/bin/python -m pytest $(PYTEST_ARGS) tests/native

test-oldest:
	$(call make_venv,$(MATRIX)/oldest,$(PYTHON311),v == (3,11),3.11,PYTHON311)
	$(MATRIX)/oldest/bin/python -c "$(oldest_pins)" > $(MATRIX)/oldest/pins.txt
	$(MATRIX)/oldest/bin/python -m pip install --quiet -c $(MATRIX)/oldest/pins.txt -e ".[test-native]"
	$(MATRIX)/oldest/bin/python -m pytest $(PYTEST_ARGS) tests/native

# "jax>=0.8.1,<1" in pyproject.toml becomes "jax==0.8.1".
oldest_pins = import tomllib; \
	project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	ranges = project['dependencies'] + project['optional-dependencies']['flax']; \
	print(*[r.split(',')[0].replace('>=', '==') for r in ranges], sep='\n')
