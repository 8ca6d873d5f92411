# The first of these that is new enough; `make PYTHON=/path/to/python3.12 ...` chooses another.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
UV := .venv/bin/uv pip install --quiet --python .venv/bin/python
READY := .venv/.ready
# The requirements without comments: a changed comment is no reason to install again.
PINS := sed -e 's/ *\#.*//' -e '/^$$/d'

# Without compiled .pyc files, every import of torch takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

# The folder of runs that `make page` shows.
RUNS := $(or $(RUNS:/=),runs/demo)

.PHONY: demo page test properties mutants lint bench clean
demo: $(READY)
	.venv/bin/python -m kitlib demo

# The demo's models are trained if they do not exist; other runs must exist.
page: $(READY)
	test "$(RUNS)" != runs/demo || test -f runs/demo/submission.csv || .venv/bin/python -m kitlib demo
	.venv/bin/python -m kitlib page --runs "$(RUNS)"

test: $(READY)
	.venv/bin/python -m pytest $(PYTEST)

# Only the property tests, with new random examples: `make properties ROUNDS=20` draws 20 times as many as `make test`.
ROUNDS ?= 5
properties: $(READY)
	for round in $$(seq $(ROUNDS)); do .venv/bin/python -m pytest -m hypothesis --hypothesis-profile=anew $(PYTEST) || exit 1; done

# Changes kitlib at random points and lists the changes that no test notices. `make mutants CHANGED=origin/main` changes only
# lines that differ from that revision; `make mutants MUTANTS="kitlib/fusion --seed 1"` passes arguments (--help lists them).
mutants: $(READY)
	.venv/bin/python -m tests.mutants $(CHANGED:%=--changed %) $(MUTANTS)

lint: $(READY)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

# The page's benchmark needs the demo's models.
bench: $(READY)
	test -f runs/demo/submission.csv || .venv/bin/python -m kitlib demo
	for script in benchmarks/*.py; do echo "== $$script"; .venv/bin/python $$script || exit 1; done

clean:
	rm -rf .venv build runs inputs/demo inputs/demo-truth

# $(READY) contains the requirements that .venv was made from. Two steps, because the image's versions only constrain the
# packages that kernels import; the tools must not change those. Headless OpenCV is installed last: it overwrites the files of
# opencv-python, which needs libGL from the system. With kit.pth, notebooks find kitlib wherever they are started.
$(READY): requirements.txt requirements-tools.txt kitlib/kernels/kaggle_image.txt
	@test -n "$(PYTHON)" && $(PYTHON) $(NEW_ENOUGH) || { echo "Python 3.11 or newer is required$(if $(PYTHON),$(strip ,) and $(PYTHON) is older); choose one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test ! -e .venv || .venv/bin/python $(NEW_ENOUGH) 2>/dev/null || { echo "the Python of .venv is older than 3.11 or no longer exists; remove .venv (rm -rf .venv) and run make again" >&2; exit 1; }
	@test ! -e $@ || test "$$($(PINS) $^)" = "$$($(PINS) $@)" || { echo ".venv was made from other requirements; remove it (rm -rf .venv) and run make again" >&2; exit 1; }
	@echo "Installing into .venv (a download of several GB, because torch includes CUDA libraries)"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) -r requirements.txt
	$(UV) -r requirements-tools.txt --override requirements.txt
	$(UV) --reinstall --no-deps $$(grep -o '^opencv-python-headless==[0-9.]*' requirements.txt)
	echo "$(CURDIR)" > $$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kit.pth
	cat $^ > $@
