# make run: everything from nothing. make test: the tests. make lint: style. All need Python 3.11+ and a C library.
# make soak: an hour of kills and outages, for release days.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed

.PHONY: install run system test soak lint clean

install: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "installing the locked dependencies into $(VENV); this takes a few minutes"
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q -r requirements.lock
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

run: install
	$(VENV)/bin/tuner run --study mvp13 --n-trials 50

# What the tests need beside Python: a browser, and `ip` for hosts on networks that can be cut.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
system:
	@command -v chromium >/dev/null && command -v ip >/dev/null || \
	    ($(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q --no-install-recommends chromium iproute2)

# One thread a process: two processes that share a core with several threads each are many times slower.
test: install system
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 --dist loadgroup

soak: install system
	OMP_NUM_THREADS=1 $(VENV)/bin/python -W ignore -m tests.soak

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) build *.egg-info
