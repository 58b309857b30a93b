# `make demo` and `make test` need git, make, a C++ compiler (torch.compile) and Python >= 3.11.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STEPS  ?=
SEED   ?= 0
OUTPUT ?= runs/demo-$(shell date +%Y%m%d-%H%M%S)-seed$(SEED)
STAMP  := $(VENV)/.installed

# Trainers of others, Ray and vLLM: each has an environment of its own, constraints-NAME.txt and
# tests/safe_rl/integrations/test_NAME.py.
OTHERS := trl verl openrlhf ray vllm

TABLE  := runs/table
# glibc gives large blocks back to the system at every free and gets them back page by page: keeping
# them takes 15 % of an update. Other systems ignore the names.
KEEP   := MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296

.PHONY: demo demo-table test test-slow gpu test-gpu $(OTHERS:%=test-%) lint bench bench-gpu clean

demo: $(STAMP)
	$(KEEP) $(BIN)/python -m examples.lm_rlhf.train --seed $(SEED) $(if $(STEPS),--steps $(STEPS)) --output $(OUTPUT)

# The figures of the README: three seeds, with the penalty and without; resumed where it was stopped.
demo-table: $(STAMP)
	set -e; for seed in 0 1 2; do for coef in "" "--kl-coef 0"; do \
	  run=$(TABLE)/seed$$seed$${coef:+-no-penalty}; \
	  $(KEEP) $(BIN)/python -m examples.lm_rlhf.train --seed $$seed $$coef --output $$run \
	    $$(test -e $$run/checkpoint.pt && echo --resume); \
	done; done
	$(BIN)/python -m examples.lm_rlhf.summarize $(TABLE)/seed*

test: $(STAMP) lint
	$(BIN)/python -m pytest -m "not slow" --doctest-modules safe_ops safe_rl examples tests

test-slow: $(STAMP) $(OTHERS:%=test-%)
	$(BIN)/python -m pytest -m slow tests

# With what torch's build for GPUs needs, which --no-deps has left out. For `make bench-gpu` triton must
# be torch's own, not the one that the peers import on a CPU.
gpu: $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/python -c "import torch; assert torch.cuda.is_available(), 'no GPU, or torch is built without'"

test-gpu: gpu
	$(BIN)/python -m pytest tests/gpu

$(OTHERS:%=test-%): test-%: .venv-%/.installed
	.venv-$*/bin/python -m pytest -m slow tests/safe_rl/integrations/test_$*.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Every benchmark that has no results in runs/bench yet, then the page; about an hour and a half.
BENCHES := head gae controllers sampling step
bench: .venv-bench/.installed $(BENCHES:%=runs/bench/%.json)
	.venv-bench/bin/python -m tests.benchmarks.page runs/bench docs/benchmarks.md

# On a GPU: every part that has no results yet.
GPU_BENCHES := kernels gae laws head sampling step merged_step
bench-gpu: gpu .venv-bench/.installed
	.venv-bench/bin/pip uninstall --quiet --yes triton
	$(MAKE) $(GPU_BENCHES:%=runs/bench/gpu_%.json)
	.venv-bench/bin/python -m tests.benchmarks.page runs/bench docs/benchmarks.md

runs/bench/gpu_%.json: | .venv-bench/.installed
	.venv-bench/bin/python -W ignore -m tests.benchmarks.bench_gpu --parts $* --output runs/bench

runs/bench/%.json: | .venv-bench/.installed
	.venv-bench/bin/python -W ignore -m tests.benchmarks.bench_$* --output runs/bench

# The stamp is newer than what it was made from, so a second call installs nothing.
$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r constraints.txt
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Other libraries, on top of what is in .venv: that is found by a .pth file and not copied; a package
# installed here comes before the same one there. Some wheels carry a package called tests, which
# would hide ours.
PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
LAYERS  := $(OTHERS:%=.venv-%) .venv-bench
$(LAYERS:%=%/.installed): .venv-%/.installed: constraints-%.txt $(STAMP)
	test -x .venv-$*/bin/python || $(BIN)/python -m venv .venv-$*
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" \
		> "$$(.venv-$*/bin/python $(PURELIB))/base.pth"
	.venv-$*/bin/pip install --quiet --no-deps -r constraints-$*.txt
	rm -rf "$$(.venv-$*/bin/python $(PURELIB))/tests"
	touch $@

clean:
	rm -rf $(VENV) $(LAYERS) build *.egg-info
