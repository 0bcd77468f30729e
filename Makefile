# make test, make demo: everything from a machine with Python >= 3.11, pip and make.
# The environment is made without its own pip, because Debian keeps what that takes in another package.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
export PYTHONUNBUFFERED := 1

.PHONY: install test lint demo demo-long clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; call make PYTHON=python3.11")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(RUN) install --quiet --requirement requirements.txt
	$(PYTHON) -m pip --python $(RUN) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

lint: install
	$(VENV)/bin/ruff check .

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile   # two processes; the tests of a file share what they set up

demo: install
	$(RUN) -m ahawam_jax demo --config=configs/demo.py --workdir=runs/demo

demo-long: install
	$(RUN) -m ahawam_jax demo --config=configs/demo_long.py --workdir=runs/demo_long

clean:
	rm -rf runs
