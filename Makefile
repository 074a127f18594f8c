# The one place where a machine is set up: a virtual environment in the checkout, nothing outside it.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# caches that would otherwise go to the user's home
export PIP_NO_CACHE_DIR := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/cache/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/$(VENV)/cache/inductor
export TRITON_CACHE_DIR := $(CURDIR)/$(VENV)/cache/triton
export HF_HOME := $(CURDIR)/$(VENV)/cache/huggingface

.PHONY: demo test site lint pictures sweep language image-text zoo coverage clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python >= 3.11 is needed: make PYTHON=python3.12')"
	@echo "libragrad: PyTorch and the rest go into $(CURDIR)/$(VENV): about 7 GB, some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev]"
	$(RUN) -m pip install --quiet --no-deps "quantus>=0.6"
	touch $@

demo: $(VENV)/installed
	$(RUN) -m libragrad_fx demo -o out/demo.html

test: $(VENV)/installed
	$(RUN) -m pytest -n 2 --dist loadscope -m "not slow"

# the documentation, with notebooks that are run: out/site/index.html
site: $(VENV)/installed
	$(RUN) -m pip install --quiet --editable ".[docs]"
	PYTHONPATH=. $(RUN) -m mkdocs build --strict

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check libragrad_fx tools zoo
	$(VENV)/bin/pyright --pythonpath $(RUN)

pictures: $(VENV)/installed
	$(RUN) tools/pictures.py --screenshots

sweep: $(VENV)/installed
	$(RUN) tools/families.py

# real weights, into ~/.cache/libragrad_fx or $LIBRAGRAD_DATA
language: $(VENV)/installed
	$(RUN) -m pip install --quiet --editable ".[real]"
	$(RUN) tools/fetch.py smollm2 minilm dinov2
	$(RUN) tools/language.py

# trains a small model first, into the same folder
image-text: $(VENV)/installed
	$(RUN) tools/image_text.py --train
	$(RUN) tools/image_text.py

# hours, into the same folder; it goes on where it was stopped
zoo: $(VENV)/installed
	$(RUN) -m pip install --quiet --editable ".[real]"
	$(RUN) tools/fetch.py fashion-mnist
	$(RUN) tools/train_zoo.py

# hours; it goes on where it was stopped
coverage: $(VENV)/installed
	for suite in timm torchvision hf openclip; do \
	  $(RUN) -m libragrad_fx coverage --suite $$suite --results docs/coverage --jobs 2; done
	$(RUN) -m libragrad_fx coverage --suite timm-all --static --results docs/coverage --jobs 2 \
	  --report docs/coverage.md

clean:
	rm -rf $(VENV) out
