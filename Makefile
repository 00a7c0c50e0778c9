# `make help` lists the targets. Everything runs in .venv; scripts/make_env.sh installs missing system libraries by apt-get.
VENV := .venv
BIN := $(VENV)/bin
LEROBOT := .venv-lerobot

.DEFAULT_GOAL := help
.PHONY: help env eval test test-fast test-gpu test-lerobot

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.complete  ## make the environment in .venv: locked versions, OpenGL library

# `.venv` is complete once the stamp is there; a changed lock or package description completes it anew.
$(VENV)/.complete: requirements.lock pyproject.toml scripts/make_env.sh
	scripts/make_env.sh $(VENV)
	@touch $@

eval: env  ## run the shipped policy in LIBERO, target alone, speculative, drafter alone: results/make-eval/report.html
	$(BIN)/rsd eval --compare --task-suite libero_spatial,libero_object_permuted --tasks 0-4 --num-trials 1 --videos all --max-videos 3 \
		--report --output results/make-eval --overwrite

# These start no simulator and no browser, and need no network.
test-gpu: env  ## what needs a CUDA GPU: recordings, compiled kernels, batches, training
	$(BIN)/pytest -m gpu tests/runtime tests/goldens tests/training/test_gpu_training.py tests/evaluation/test_batching.py \
		tests/tokenizer/test_action_tokenizer.py \
		tests/targets/openvla/test_engine.py tests/targets/openvla/test_openvla_rsd_policy.py

# Neither a simulator nor a browser, no graphs to export, no processes to wait for, no thousands of draws.
FAST := $(addprefix tests/,tokenizer models data targets/remote training/test_losses.py) \
	$(filter-out %/test_sampled_strategies.py,$(wildcard tests/decoding/test_*.py)) \
	$(patsubst %,tests/evaluation/test_%.py,statistics results rollout realtime tables lerobot) \
	$(patsubst %,tests/test_%.py,options policy episode_memory former exact nested conventions output checkpoint default_decoder)

test-fast: env  ## the pure, fast tests, for daily work
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not simulator" $(FAST)

# LeRobot's versions and the locked ones are not the same: an environment of its own, as docs/your_policy.md makes it.
$(LEROBOT)/.complete: pyproject.toml plugins/lerobot_policy_rsd/pyproject.toml
	python3 -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --quiet 'lerobot[smolvla]==0.4.4' --editable '.[serve,train,vla-eval]' \
		--editable plugins/lerobot_policy_rsd hypothesis pytest pytest-timeout
	@touch $@

test-lerobot: $(LEROBOT)/.complete  ## what needs the packages of LeRobot and vla-eval, in an environment of its own
	$(LEROBOT)/bin/python -m pytest tests/foreign_lerobot tests/foreign_vla_eval

test: env  ## lint, type-check and test, simulator included
	$(BIN)/python scripts/check_limits.py
	$(BIN)/ruff check src studies tests scripts plugins
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
