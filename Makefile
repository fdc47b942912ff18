# Each target creates a virtual environment, and installs only if pyproject.toml or constraints.txt changed.
#
#     make demo | test | lint | docs | tutorials | clean
#     make test PYTHON=python3.12           another interpreter (3.10 or newer; `make clean` first)
#     make test ARGS="-k grid -x"           arguments for pytest; ARGS="-n 0" uses a single process
#     make test CONSTRAINTS=                the newest versions of all packages, instead of the tested ones

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
CONSTRAINTS ?= constraints.txt

SHELL := /bin/sh
py := $(VENV)/bin/python
pip := $(py) -m pip --disable-pip-version-check --no-input
export MPLBACKEND ?= Agg

.PHONY: help demo test lint format docs tutorials clean
.NOTPARALLEL:

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/.installed-video
	$(py) -m captum_staa demo --out demo --overwrite

test: $(VENV)/.installed-test
	$(py) -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.installed-test
	$(py) -m ruff format --check .
	$(py) -m ruff check .
	$(py) -m mypy

format: $(VENV)/.installed-test
	$(py) -m ruff format .
	$(py) -m ruff check --fix .

docs: $(VENV)/.installed-docs
	$(py) -m sphinx -q -W --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# Runs every notebook and stores its outputs; ARGS="01 03" runs some of them.
tutorials: $(VENV)/.installed-docs
	$(py) tutorials/build.py $(ARGS)

clean:
	rm -rf $(VENV) build dist demo docs/_build docs/api docs/jupyter_execute .mypy_cache .pytest_cache .ruff_cache
	find captum_staa tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- the environment: one stamp file per set of extras ----

$(VENV)/.installed-video: extras := video
$(VENV)/.installed-test: extras := test,video,supervoxels
$(VENV)/.installed-docs: extras := docs,video

$(VENV)/.installed-%: pyproject.toml $(wildcard $(CONSTRAINTS)) | $(VENV)/.made
	@echo "installing captum_staa[$(extras)] into $(VENV) (minutes the first time)"
	@$(pip) install --quiet $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$(extras)]'
	@touch $@

# The stamp, not bin/python, shows that the environment is complete: a failed venv may leave bin/python behind.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 10) and f"captum_staa needs Python 3.10 or newer, and $(PYTHON) is {v}: make PYTHON=python3.11 ...")'
	@echo "making $(VENV) with $$($(PYTHON) -c 'import sys; print(sys.executable, sys.version.split()[0])')"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@
