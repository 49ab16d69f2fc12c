# Every target builds .venv first when pyproject.toml or constraints.txt changed. Needs Python >= 3.11 as `python3`.
PYTHON = python3
BIN = .venv/bin
READY = .venv/.ready
HOST = tests/host/node_modules/.ready

# The environment alone: .venv/bin/vdq-export, and what tests and site need.
setup: $(READY)

demo: $(READY)
	$(BIN)/vdq-export --target ort-int8 --tsw 4 --out demo/bundle --force
	$(BIN)/vdq-export verify demo/bundle --save
	$(BIN)/vdq-export run demo/bundle --out demo

test: $(READY) $(HOST)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m tests.typecheck

# The site, in build/site; warnings are errors, and nothing is fetched.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

goldens: $(READY)
	$(BIN)/python -m tests.goldens

bench: $(READY)
	$(BIN)/python -m benchmarks

bench-fidelity: $(READY)
	$(BIN)/python -m benchmarks.fidelity

bench-handoff: $(READY) aimet
	$(BIN)/python -m benchmarks.handoff
	$(BIN)/python -m benchmarks.hexagon_wan

# 44 GB of free disk and about an hour: Wan-14B is exported from 28 GB of random weights.
bench-scale: $(READY)
	$(BIN)/python -m benchmarks.support_matrix
	$(BIN)/python -m benchmarks.hoisting
	$(BIN)/python -m benchmarks.hoisting_speed
	$(BIN)/python -m benchmarks.scale_calibration
	$(BIN)/python -m benchmarks.scale_wan
	$(BIN)/python -m benchmarks.scale_resume

# AIMET reads our encodings in an environment of its own (2 GB with the CPU wheel of torch).
aimet: .venv-aimet/.ready

test-aimet: $(READY) .venv-aimet/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_encodings_aimet.py

clean:
	rm -rf .venv .venv-aimet tests/host/node_modules build dist demo vdq_export.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools --editable ".[dev]"
	touch $(READY)

# What the host loop is tested on. Without npm, or without what it installs, these tests are skipped and say why.
$(HOST): tests/host/package.json tests/host/package-lock.json
	@if ! command -v npm >/dev/null; then echo "no npm: the host loop will not be tested on its runtimes"; \
	elif cd tests/host && npm ci --ignore-scripts; then touch node_modules/.ready; \
	else echo "npm ci failed: the host loop will not be tested on its runtimes"; fi

.venv-aimet/.ready: tests/aimet/requirements.txt
	$(PYTHON) -m venv .venv-aimet
	.venv-aimet/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/aimet/requirements.txt
	touch .venv-aimet/.ready

.PHONY: setup demo docs test test-aimet aimet lint goldens bench bench-fidelity bench-handoff bench-scale clean
