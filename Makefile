# make demo   the whole pipeline on the embedded teacher, on a CPU, in minutes; shows the result
# make test   style and tests
# make tables every method on the embedded benchmark, about four hours on 2 cores; goes on where it was; writes docs/RESULTS.md
# Both create the environment (.venv) first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo tables test test-slow test-gpu teacher clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

$(VENV)/ready: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/ready
	$(PY) -m studies.storymath.demo

tables: $(VENV)/ready
	$(PY) -m studies.storymath.tables
	$(PY) -m studies.storymath.tables --ablations --seeds 1
	$(PY) -m studies.storymath.tables --blocks 8 --seeds 1
	$(PY) -m studies.storymath.tables --blocks 4,8 --seeds 1 --analysis

test: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

test-slow: $(VENV)/ready
	$(PY) -m pytest -m slow

test-gpu: $(VENV)/ready
	$(PY) -m pytest -m gpu -rs

# Train the embedded teacher from scratch and put it in place. Took 49 minutes on one core of a busy machine.
teacher: $(VENV)/ready
	$(PY) -m studies.storymath --sft --init models/embedded-init
	$(PY) train/self_ddo_sdar_full.py config=configs/demo/teacher.yaml experiment.run_name=teacher experiment.resume=auto
	rm -rf models/embedded-teacher
	cp -r experiments/embedded-init/math/teacher/teacher/ckpt/optimized models/embedded-teacher

clean:
	rm -rf experiments/demo $(VENV)
