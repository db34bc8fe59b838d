# make demo: set up and watch a prior being made and two new prompts resumed from it (CPU, embedded model)
# make test: set up and run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FACE := data/tiny_wan_i2v/inputs/mila.png

.PHONY: demo test lint browser
demo: $(VENV)/installed
	set -e; \
	prior=$$($(BIN)/python generate_prior.py --model tiny --image $(FACE) --prompt "she stays still"); \
	left=$$($(BIN)/python infer_from_prior.py --prior_dir "$$prior" --prompt "she moves to the left"); \
	talk=$$($(BIN)/python infer_from_prior.py --prior_dir "$$prior" --prompt "she speaks"); \
	printf '%s\n' "prior: $$prior/output_full.mp4" "two new prompts:" "$$left" "$$talk"

test: $(VENV)/installed-tests lint browser
	$(BIN)/python -m pytest tests

# Chromium, in which a sweep's page is tested; who can't install it goes without these tests
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium chromium-driver; } || \
	echo "no chromium and chromedriver: the page of a sweep is not tested in a browser" >&2

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@
