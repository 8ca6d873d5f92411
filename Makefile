# The first of these that runs; `make PYTHON=/path/to/python3.12 ...` chooses another.
NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do $$p $(NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
UV := .venv/bin/uv pip install --quiet --python .venv/bin/python
READY := .venv/.ready

# Without compiled files every import of torch takes half a minute.
unexport PYTHONDONTWRITEBYTECODE

# What `make page` shows.
RUNS := $(or $(RUNS:/=),runs/demo)

.PHONY: demo page test properties lint bench clean
demo: $(READY)
	.venv/bin/python -m kitlib demo

# The demo's models are made where they are missing; runs of one's own are not.
page: $(READY)
	test "$(RUNS)" != runs/demo || test -f runs/demo/submission.csv || .venv/bin/python -m kitlib demo
	.venv/bin/python -m kitlib page --runs "$(RUNS)"

test: $(READY)
	.venv/bin/python -m pytest $(PYTEST)

# Property tests alone, with examples that no earlier run had: `make properties ROUNDS=20` draws 20 times as many as `make test`.
ROUNDS ?= 5
properties: $(READY)
	for round in $$(seq $(ROUNDS)); do .venv/bin/python -m pytest -m hypothesis --hypothesis-profile=anew $(PYTEST) || exit 1; done

lint: $(READY)
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

# The page is measured with the demo's models.
bench: $(READY)
	test -f runs/demo/submission.csv || .venv/bin/python -m kitlib demo
	for script in benchmarks/*.py; do echo "== $$script"; .venv/bin/python $$script || exit 1; done

clean:
	rm -rf .venv build runs inputs/demo inputs/demo-truth

# $(READY) holds the requirements that .venv was made of. Two steps: the image's versions are the constraint of what kernels
# import alone, and the tools leave those as they are. Headless OpenCV goes in last: it shares its folder with opencv-python,
# whose build wants libGL from the system. kit.pth lets a notebook find kitlib wherever it is started.
$(READY): requirements.txt requirements-tools.txt kitlib/kernels/kaggle_image.txt
	@test -n "$(PYTHON)" && $(PYTHON) $(NEW_ENOUGH) || { echo "Python 3.11 or newer is needed$(if $(PYTHON),$(strip ,) and $(PYTHON) is not); name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test ! -e .venv || .venv/bin/python $(NEW_ENOUGH) 2>/dev/null || { echo ".venv belongs to a Python that is older than 3.11 or gone; remove it (rm -rf .venv) and run make again" >&2; exit 1; }
	@test ! -e $@ || cat $^ | cmp -s - $@ || { echo ".venv was made of other requirements; remove it (rm -rf .venv) and run make again" >&2; exit 1; }
	@echo "Installing into .venv (torch brings its CUDA libraries: several GB come down)"
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(UV) -r requirements.txt
	$(UV) -r requirements-tools.txt --override requirements.txt
	$(UV) --reinstall --no-deps $$(grep -o '^opencv-python-headless==[0-9.]*' requirements.txt)
	echo "$(CURDIR)" > $$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kit.pth
	cat $^ > $@
