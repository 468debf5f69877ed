# fac_synthesis: the executable companion of "Less is Enough" (arXiv 2602.10388). `make` alone prints the targets.

# The stages in running order; after the colon, the numbers of the stages whose results each one reads.
# Notebooks that only define things are no stages.
define STAGES
01_planted_world:
02_corpora:                  01
03_backbone:                 01
11_sae_pretraining:          02 03
12_sae_checkpoints:          02 03 11
13_sae_benchmark:
20_feature_activations:      02 03 12
21_feature_interpretation:   02 03 20
22_task_relevance:           02 20 21
23_coverage:                 02 20 21 22
24_ground_truth:             01 02 20 22 23
30_contrastive_pairs:        02 03 12 20 23
31_covered_samples:          02 03 12 20 23 30
32_baselines:                02 03 12 20 23 30 31
33_diversity_metrics:        02 03 12 20 23 31 32
40_toxicity_detection:       02 03 20 22 23 31 32
41_reward_modeling:          02 03 31 32
42_behavior_steering:        02 03 31 32
43_instruction_following:    02 03 31 32
50_what_predicts_performance: 33 40 41 42 43
51_missing_features:         02 03 23 31 32 40 41 42 43
90_tables:                   02 21 22 31 40 41 42 43
91_claims:                   40 41 42 43 50 51 90
92_summary:                  02 03 12 20 23 31 40 41 42 43 91
endef

PROFILE = mini#   mini (any laptop), small (one GPU or patience, real data), paper (an 80 GB GPU)
ONLY    =#        run only these stages, and what depends on them: ONLY=23 or ONLY="23 40"
P       =#        parameters for the selected stages: P="-p delta 1.0 -p k 20"
JOBS    = 0#      stages at a time: 0 is one on a GPU, else up to four, by cores
export PROFILE ONLY P JOBS

PYTHON = python3
BIN    = .venv/bin
READY  = .venv/ready
CURRENT = $(BIN)/python -m fac_synthesis.run.export# notebooks that were edited reach the package first
SHELL  = /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env export test reproduce plan status lab html readme publish clean

help:        ## this list
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s%s\n", $$1, $$2}' Makefile
	@awk -F'#' '/^[A-Z]+ +=.*#/{split($$1, v, "="); gsub(/ /, "", v[1]); sub(/^ +/, "", $$2); printf "  %-16s%s\n", v[1] "=", $$2}' Makefile

env: $(READY)  ## make .venv with the pinned packages (every other target does so itself)

$(READY): constraints.txt settings.ini pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"{sys.executable} is Python {sys.version.split()[0]}, but 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	@echo "installing the pinned packages into .venv (once; torch alone is several hundred MB)"
	@began=$$(date +%s); \
	$(PYTHON) -m venv .venv && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" && \
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]" && \
	touch $(READY) && echo "installed in $$(( $$(date +%s) - began )) s"

export: $(READY)  ## write what was edited in nbs/ into fac_synthesis/, format, strip the notebooks' metadata
	@$(BIN)/ruff format -q && $(BIN)/nbdev_clean && $(CURRENT)

test: $(READY)  ## rules of the code, then all tests, with line coverage
	@$(CURRENT) && $(BIN)/ruff check -q && $(BIN)/ruff format -q --check && \
	$(BIN)/python -m pytest -n 2 --dist loadfile --cov --cov-report=term --cov-fail-under=85

reproduce: $(READY)  ## run every stage that is not up to date; PROFILE=, ONLY=, P=
	@$(CURRENT) && $(BIN)/python -m fac_synthesis.run.pipeline run --profile "$$PROFILE" --only="$$ONLY" --params="$$P" --jobs="$$JOBS"

plan: $(READY)  ## what `make reproduce` would run, why, and at which cost
	@$(CURRENT) && $(BIN)/python -m fac_synthesis.run.pipeline plan --profile "$$PROFILE" --only="$$ONLY" --params="$$P"

status: $(READY)  ## per stage: done, stale (why), failed, running, stopped or never ran
	@$(CURRENT) && $(BIN)/python -m fac_synthesis.run.pipeline status --profile "$$PROFILE" --only="$$ONLY" --params="$$P"

lab: $(READY)  ## open the notebooks in JupyterLab
	@cd nbs && ../$(BIN)/jupyter lab

html: $(READY)  ## the executed notebooks as pages that need no network, in results/PROFILE/html
	@$(CURRENT) && $(BIN)/python -m fac_synthesis.run.pages html --profile "$$PROFILE"

publish: $(READY)  ## copy the outputs of the executed mini notebooks into nbs/
	@$(CURRENT) && $(BIN)/python -m fac_synthesis.run.pages publish && $(BIN)/nbdev_clean

readme: $(READY)  ## write README.md from nbs/index.ipynb
	@$(CURRENT) && $(BIN)/python -m fac_synthesis.run.pages readme

clean:       ## remove this profile's results but its tables and figures (.venv stays)
	@rm -rf "results/$$PROFILE"/{artifacts,stages,notebooks,html} .pytest_cache .coverage htmlcov
