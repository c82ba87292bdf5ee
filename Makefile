# Two commands: "make demo" shows what attnpatch does, "make test" checks that it does it.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DEMO := .venv/installed-demo
# Tests and demos never reach for a model hub.
export HF_HUB_OFFLINE = 1

.PHONY: lines demo demo-figures test test-long fuzz formulations venv lint bench bench-against bench-peers bench-gpu coverage coverage-maps docs clean

demo: $(DEMO)
	$(BIN)/attnpatch demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not long"

# What others show too, at more tokens or of more kinds.
test-long: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m long

# Random programs on scores, natively and by rows. ATTNPATCH_FUZZ_SEED and ATTNPATCH_FUZZ_N choose which and how many.
fuzz: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzzing

# Attention as others formulate it: the table of docs/formulations.md.
formulations: venv
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.formulations

.PHONY: test-latest
# What reads the calls, the masks and the caches of transformers, with a release beside that of constraints.txt: models
# of 5.24 take a cache under another name.
LATEST_VERSION := 5.24.0
LATEST := $(CURDIR)/.venv/latest
test-latest: venv $(LATEST)/$(LATEST_VERSION)
	PYTHONPATH=$(LATEST) $(BIN)/python -c \
		"import transformers; assert transformers.__version__ == '$(LATEST_VERSION)', transformers.__file__"
	PYTHONPATH=$(LATEST) $(BIN)/python -m pytest -n 2 --dist loadgroup tests/test_caches.py tests/test_generation.py \
		tests/test_capture.py tests/test_analyzer.py tests/test_conversations.py tests/test_analyze_command.py \
		tests/test_demo_model.py tests/test_masks.py tests/test_deferred_weights.py tests/test_activation_session.py

$(LATEST)/$(LATEST_VERSION): $(STAMP)
	rm -rf $(LATEST)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(LATEST) \
		transformers==$(LATEST_VERSION)
	touch $@

.PHONY: test-versions
# Every feature with the releases that are supported: the rows of tests/versions/rows.py, one environment after the other.
# ROW="5.0 newest" runs those whose name has such a word in it; ROW="newest --smoke" runs no more than the smoke test.
test-versions:
	$(PYTHON) -m tests.versions $(ROW)

.PHONY: test-hosts test-hosts-full
# The hosts' own common tests on small models, unpatched and with every attention by rows. HOSTS="-k Llama" runs some.
test-hosts: venv
	$(BIN)/python tests/hosts/run.py $(HOSTS)

# The same with the hosts' own files of these models, which no distribution ships: CHECKOUT is one of their repository, of
# the version that is installed (their tests import what other versions do not have).
MODELS := llama bert t5 gptj bloom mpt longformer vit whisper xlnet llava
test-hosts-full: venv
	test -d "$(CHECKOUT)/tests/models" || { echo "give CHECKOUT=<a checkout of transformers, of the installed version>"; exit 2; }
	$(BIN)/python tests/hosts/run.py $(HOSTS) --tests $(CHECKOUT)/tests \
		--files $(foreach model,$(MODELS),models/$(model)/test_modeling_$(model).py)

venv: $(STAMP)

# What the demo needs, and no more. torch first and alone: with it in place nothing else pulls another build of it.
$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt \
		-e ".[transformers,cli]" matplotlib
	touch $(DEMO)

$(STAMP): $(DEMO)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all]" \
		pytest pytest-xdist pytest-timeout hypothesis mypy ruff hatchling playwright peft hqq \
		einops x-transformers perceiver-pytorch xarray nbclient ipykernel mkdocs-material "mkdocstrings[python]"
	# Without what they ask for: the wheels of torchvision load beside builds of torch for CUDA only. Triton comes with
	# those builds; beside one for the CPU it is for tests, which run kernels in its interpreter.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		timm denoising-diffusion-pytorch triton
	touch $(STAMP)

lint: venv
	$(BIN)/ruff check attnpatch tests examples benchmarks
	$(BIN)/ruff format --check attnpatch tests examples benchmarks
	$(BIN)/mypy

demo-figures: venv
	$(BIN)/python examples/demo_model/measure.py

# Lines of code, without docstrings, comments and blanks.
lines: venv
	$(BIN)/python -m tests.lines

bench: venv
	$(BIN)/python -m benchmarks

# Beside what others have made; these two packages are needed for nothing else.
bench-peers: venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps \
		memory-efficient-attention memory-efficient-attention-pytorch
	$(BIN)/python -W ignore -m benchmarks peers

# Beside another checkout of this project: make bench-against OTHER=<folder>
bench-against: venv
	$(BIN)/python -m benchmarks.against $(OTHER)

# On a machine with a GPU; nothing is timed whose sums are wrong. Each of the ten first runs takes less than a minute.
bench-gpu: venv
	$(BIN)/python -m pytest tests/on_kernel.py
	for number in 1 2 3 4 5 6 7 8 9 10; do $(BIN)/python -W ignore -m benchmarks.gpu_first $$number; done
	$(BIN)/python -m benchmarks gpu

coverage: venv
	$(BIN)/python -W ignore -m tests.compat

# Every block map of the same models beside their own softmax results. It goes on where it stopped: NEW=--again begins anew.
coverage-maps: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.compat.maps_transformers $(NEW)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.compat.maps_diffusers $(NEW)

# Strict: a broken link or a missing page fails.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
