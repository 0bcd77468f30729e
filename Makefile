# make test, make demo: everything from a machine with Python >= 3.11, pip and make.
# Environments are made without a pip of their own, because Debian keeps what that takes in another package.
PYTHON ?= python3
VENV := .venv
RUN = $(VENV)/bin/python
INSTALL = $(PYTHON) -m pip --python $(RUN) install --quiet --no-warn-conflicts
# Two processes; the tests of a file share what they set up, and tests/conftest.py says which file comes first.
PYTEST = $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export PYTHONUNBUFFERED := 1
export PYTHONUTF8 := 1

# Installed without what they ask for: of gym-aloha the scene files are used, dm_control computes the physics to compare
# with. They bring labmaze, for which Python 3.13 has no wheel and bazel is wanted.
SCENES := gym-aloha==0.1.5
PHYSICS := dm_control==1.0.41

.PHONY: install install-dev test test-all test-isa test-newest lint chaos demo demo-long pins clean

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

define make_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; call make PYTHON=python3.11")'
	$(PYTHON) -m venv --without-pip $(VENV)
endef

$(VENV)/.installed: requirements.txt
	$(make_environment)
	$(INSTALL) --requirement requirements.txt
	$(INSTALL) --no-deps $(SCENES)
	$(INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(INSTALL) --requirement requirements-dev.txt
	$(INSTALL) --no-deps $(PHYSICS)
	@touch $@

lint: install-dev
	$(VENV)/bin/ruff check .

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

# What is computed, once more with the instructions of a processor of 2008: a bound that holds for one set of
# instructions alone holds by luck.
test-isa: export XLA_FLAGS := --xla_cpu_max_isa=SSE4_2
test-isa: export ATEN_CPU_CAPABILITY := default
test-isa: export MKL_ENABLE_INSTRUCTIONS := SSE4_2
test-isa: export ONEDNN_MAX_CPU_ISA := SSE41
test-isa: export OPENBLAS_CORETYPE := Nehalem
test-isa: install-dev
	$(PYTEST) -m "not slow" tests/models tests/towers tests/inference tests/verification tests/training/test_sharding.py \
	  tests/training/test_objective.py tests/test_flow_matching.py tests/test_sampling.py tests/export/twin tests/export/released

# The newest releases that pyproject.toml admits, in an environment of their own: JAX 0.12 needs Python 3.12.
test-newest: VENV := .venv-newest
test-newest:
	$(make_environment)
	$(INSTALL) --upgrade --upgrade-strategy eager --editable ".[export,tfds,study,parity,dev]"
	$(INSTALL) --no-deps $(SCENES) $(PHYSICS)
	$(RUN) -c 'import jax, sys; print("JAX", jax.__version__, "on Python", sys.version)'
	$(PYTEST)

# A tiny job of two processes is killed 20 times and stopped 20 times: what is left, and what comes out at last?
chaos: install-dev
	$(RUN) -m tests.training.chaos

# A training step allocates its temporaries anew; in pages of 2 MiB that takes a fraction of the page faults. glibc 2.35 or newer.
demo demo-long: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

demo: install
	$(RUN) -m ahawam_jax demo --config=configs/demo.py --workdir=runs/demo

demo-long: install
	$(RUN) -m ahawam_jax demo --config=configs/demo_long.py --workdir=runs/demo_long

# Can the pins be had as wheels? For every Python, with glibc 2.28 or newer on x86-64 and, the demo's part, on aarch64.
# Installs nothing.
GLIBC := 2014 $(addprefix _2_,$(shell seq 17 28))
pins:
	@set -e; for python in 3.11 3.12 3.13; do for case in "x86_64 requirements-dev.txt" "aarch64 requirements.txt"; do \
	  set -- $$case; echo "$$2 for Python $$python on $$1"; \
	  $(PYTHON) -m pip install --quiet --dry-run --ignore-installed --target build/pins --only-binary :all: \
	    --implementation cp --python-version $$python $(GLIBC:%=--platform manylinux%_$$1) --requirement $$2; done; done

clean:
	rm -rf runs
