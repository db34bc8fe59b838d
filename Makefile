# make demo: set up, make a prior and three new clips from it, and print the page to open (CPU, embedded model)
# make test: set up, lint, run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FACE := data/tiny_wan_i2v/inputs/mila.png

.PHONY: demo test lint browser
demo: $(VENV)/installed
	@set -e; \
	prior=$$($(BIN)/python generate_prior.py --model tiny --image $(FACE) --prompt "she stays still"); \
	sweep=$$($(BIN)/python infer_from_prior.py --prior_dir "$$prior" \
	    --prompt "she moves to the left" "she speaks" "she comes closer"); \
	printf '%s\n' "the prior and three new clips, side by side; open this page:" "$$sweep/index.html"

test: $(VENV)/installed-tests lint
	$(BIN)/python -m pytest -rs -n auto --dist loadfile

# Chromium, in which the tests open a sweep's page; without it they are skipped
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium chromium-driver; } || \
	{ echo "chromium and chromedriver are not here, and could not be installed (that needs apt-get and root)" >&2; \
	exit 1; }

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-tests: tests/requirements.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@
