# LatentForge. `make help` lists what there is; every target sets up what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?= python3
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
TEST_JOBS ?= $(shell n=$$(nproc); echo $$((n > 4 ? 4 : n)))

DATA ?= data/packed
CKPT_DIR ?= checkpoints
AE_CONFIG ?= configs/ae_default.yaml
TOKEN_MODEL_CONFIG ?= configs/token_model_default.yaml
STUDENT_CONFIG ?= configs/student_default.yaml
AE_CKPT ?= $(CKPT_DIR)/ae.pt
STUDENT_CKPT ?= $(CKPT_DIR)/student.pt
PROMPT ?= import os
MAX_TOKENS ?= 128
ifneq ($(origin TEMP),command line)
TEMP := 0.8# of the environment's own TEMP, a folder, nothing is taken
endif
TOP_P ?= 0.95
SEED ?=
PORT ?= 7860
TEACHER ?= Qwen/Qwen3-0.6B
TEACHER_PORT ?= 8001

# The folder of a checkpoint to write; its name is the trainer's to give. make takes a path with spaces for several: one word of it.
space := $(subst ,, )
whole = $(subst $(space),|,$($(1)))
folder = $(if $(filter $(2),$(notdir $(whole))),$(subst |,$(space),$(dir $(whole))),$(error $(1)=$($(1)): expected a path that ends in /$(2), as it is written under that name))
# A variable left empty leaves the config file's value alone; 0 and no switch off.
flag = $(if $($(1)),--$(2) $($(1)))
switch = $(if $(filter-out 0 no false,$($(1))),--$(2))
TRAIN_FLAGS = --data "$(DATA)" $(call flag,SEED,seed) $(call flag,EPOCHS,epochs) $(call flag,BATCH_SIZE,batch_size) $(if $(RUN_DIR),--run_dir "$(RUN_DIR)") $(call switch,RESUME,resume) $(ARGS)
KD_FLAGS = $(call flag,CE_W,ce_w) $(call switch,USE_KD,use_kd) $(call flag,KD_W,kd_w)

override PROMPT := $(value PROMPT)# as it was typed, with any $ in it
export PROMPT PYTHONUNBUFFERED := 1
export PYTHONWARNINGS ?= ignore

.PHONY: help setup demo distill-demo data train-ae train-token-model train-student infer serve evaluate bench check-api harvest serve-teacher test test-tokenizer test-ae test-student test-server test-kd clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: K D EPOCHS DATA BATCH_SIZE MSE_W CE_W KD_W USE_KD=1 AE_CKPT STUDENT_CKPT CKPT_DIR RUN_DIR PROMPT MAX_TOKENS TEMP TOP_P SEED PORT TEST_JOBS"
	@echo "             AE_CONFIG TOKEN_MODEL_CONFIG STUDENT_CONFIG RESUME=1 QUICK=1 ARGS (more flags)"

setup: $(VENV)/installed ## make .venv with the pinned requirements

$(VENV)/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys, venv, ensurepip; assert sys.version_info >= (3, 10)' 2>/dev/null || \
		{ echo "error: $(PYTHON) must be Python 3.10 or newer with venv (Debian: apt install python3-venv); or set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --editable .
	@touch $@

demo: setup ## train and measure the whole chain on the standard library, 17 to 32 minutes on 2 cores with AVX512-BF16; QUICK=1: a few
	@$(PY) tools/demo.py $(call switch,QUICK,quick) $(ARGS)

distill-demo: setup ## distill from the demo's token-level model over HTTP, with and without its soft targets (after `make demo`)
	@$(PY) tools/distill_demo.py $(ARGS)

data: setup ## the default corpus: standard library -> tokenizer -> packed data in DATA (ARGS: of the packing)
	$(PY) tools/get_corpus.py --output data/corpus.jsonl
	$(PY) tools/train_tokenizer.py --input data/corpus.jsonl --output data/tokenizer --vocab_size 4096
	$(PY) tools/data_packing.py --input data/corpus.jsonl --output "$(DATA)" --tokenizer data/tokenizer $(call flag,K,k) $(ARGS)

train-ae: setup ## train the autoencoder on DATA (K, D, EPOCHS, BATCH_SIZE)
	$(PY) ae/train_ae.py --config "$(AE_CONFIG)" $(TRAIN_FLAGS) --checkpoint_dir "$(call folder,AE_CKPT,ae.pt)" $(call flag,K,k) $(call flag,D,latent_dim)

train-token-model: setup ## train the token-level model of the student's backbone, the baseline (flags as train-student)
	$(PY) student/baseline.py --config "$(TOKEN_MODEL_CONFIG)" $(TRAIN_FLAGS) --checkpoint_dir "$(CKPT_DIR)" $(call flag,K,k) $(KD_FLAGS)

train-student: setup ## train the student on DATA from AE_CKPT (EPOCHS, BATCH_SIZE, CE_W, MSE_W; USE_KD=1, KD_W)
	$(PY) student/train_student.py --config "$(STUDENT_CONFIG)" $(TRAIN_FLAGS) --ae_ckpt "$(AE_CKPT)" \
		--checkpoint_dir "$(call folder,STUDENT_CKPT,student.pt)" $(call flag,K,k) $(call flag,D,latent_dim) $(call flag,MSE_W,mse_w) $(KD_FLAGS)

infer: setup ## continue PROMPT with the student (MAX_TOKENS, TEMP, TOP_P, SEED)
	@$(PY) infer.py --student "$(STUDENT_CKPT)" --prompt="$$PROMPT" --max_new_tokens $(MAX_TOKENS) \
		--temperature $(TEMP) --top_p $(TOP_P) --seed $(or $(SEED),0) --stream $(ARGS)

serve: setup ## serve STUDENT_CKPT over HTTP at PORT: /generate, OpenAI's dialect, a page (docs/serving.md)
	@STUDENT_CHECKPOINT="$(STUDENT_CKPT)" $(PY) server.py --port $(PORT) $(ARGS)

evaluate: setup ## figures of AE, token-level model and student on DATA's validation text
	$(PY) tools/evaluate.py --ae "$(AE_CKPT)" --student "$(STUDENT_CKPT)" --baseline "$(CKPT_DIR)/token_model.pt" --data "$(DATA)" $(ARGS)

bench: setup ## race the student against the token-level model (MAX_TOKENS)
	$(PY) bench.py --ae "$(AE_CKPT)" --student "$(STUDENT_CKPT)" --baseline "$(CKPT_DIR)/token_model.pt" --max_new_tokens $(MAX_TOKENS) $(ARGS)

test: setup ## all tests, TEST_JOBS at a time [the cores, 4 at most]
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_JOBS) --dist worksteal $(ARGS)

test-tokenizer: setup ## tests of tokenizer and packing
	$(PY) -m pytest tests/test_tokenizer.py tests/test_data_packing.py $(ARGS)

test-ae: setup ## tests of the autoencoder
	$(PY) -m pytest tests/test_ae.py $(ARGS)

test-student: setup ## tests of student, sampler and metrics
	$(PY) -m pytest tests/test_student.py tests/test_local_decoder.py tests/test_sampler.py tests/test_brier.py $(ARGS)

test-server: setup ## tests of server and page (openai, lm-eval, schemathesis: .ci/requirements.txt; the page: chromium)
	$(PY) -m pytest tests/test_server.py tests/test_server_load.py tests/test_page.py $(ARGS)

check-api: setup ## can the server in .env be a teacher? (make ends with 2 for a restriction, too: for exit codes run tools/verify_api.py)
	@$(PY) tools/verify_api.py $(ARGS)

harvest: setup ## ask the teacher in .env for text with logprobs (ARGS="--data DIR --n_tokens N --budget_usd X --dry_run")
	$(PY) kd/harvest.py $(ARGS)

serve-teacher: setup ## serve TEACHER (a causal LM's folder or hub name) with logprobs at TEACHER_PORT
	$(PY) kd/local_teacher.py --model "$(TEACHER)" --port $(TEACHER_PORT) $(ARGS)

test-kd: setup ## tests of teacher, store, client and their faults
	$(PY) -m pytest tests/test_local_teacher.py tests/test_kd_*.py tests/test_verify_api.py $(ARGS)

clean: ## remove .venv, caches and the demos' runs; never .env, data/, checkpoints/ or a teacher store
	rm -rf .venv runs/demo runs/demo-quick *.egg-info build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './data/*' -prune -exec rm -rf {} +
