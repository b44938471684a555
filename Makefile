# make test          the checks and tests
# make test-slow     the tests that take minutes, too: many kills
# make test-oldest   the tests with the lowest versions that the requirements allow
# make demo          the whole pipeline on synthetic data: preprocess, train, test, search, report
PYTHON ?= python3
PY := .venv/bin/python
PYTEST = -m pytest -n 2 --dist worksteal

.PHONY: test test-slow test-oldest demo
.DELETE_ON_ERROR:

test: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) $(PYTEST)

test-slow: .venv/ready
	$(PY) $(PYTEST) -m "slow or not slow"

test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python $(PYTEST)

.venv/ready: requirements.txt requirements-export.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo "installing PyTorch and the rest of requirements.txt into .venv: about 6 GB, some minutes the first time"
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-export.txt
	@touch $@

# ">=" in the requirements becomes "==": 'torch>=2.9,<3' is torch==2.9.
.venv-oldest/ready: requirements.txt requirements-export.txt
	$(PYTHON) -m venv .venv-oldest
	sed -E 's/>=([0-9.]+).*/==\1/' requirements.txt requirements-export.txt > .venv-oldest/requirements.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-oldest/requirements.txt
	@touch $@

# ---- the demo; what is there already is not made again --------------------------------------------------------------

DATA := demo/SYSU-MM01
NETWORK := --arch resnet18 --img_h 96 --img_w 16 --pretrained none
FOLDERS := --data_path $(DATA) --model_path demo/models --log_path demo/logs
RUN = sysu_id_resnet18_lr0.03_whc$(1)_imgh96_imgw16_batchsize24_perimg2_pretrainednone_last
RESULT = demo/logs/test_$(1)_both-both.json
UNTRAINED := $(call RESULT,untrained_resnet18_none_imgh96_imgw16)
CE := $(call RESULT,$(call RUN,0))
CE_HC := $(call RESULT,$(call RUN,0.1))
FEATURES = demo/features_$(1).npz
SEARCH := demo/search/search.html
QUERIES := $(DATA)/cam3/0002

demo: $(UNTRAINED) $(CE) $(CE_HC) $(SEARCH)
	@$(PY) -m tools.report "untrained=$(UNTRAINED)" "CE=$(CE)" "CE + HC=$(CE_HC)" --search $(SEARCH) --out demo/report.html

$(SEARCH): $(CE_HC)
	$(PY) -m tools.search demo/models/$(call RUN,0.1).t --query $(QUERIES) --gallery $(call FEATURES,0.1) --out $(@D)

$(DATA)/synthetic.json: | .venv/ready
	$(PY) -m tools.make_synthetic --dataset sysu --out $(DATA) --ids 100 --images 9

$(DATA)/train_rgb_resized_img.npy: $(DATA)/synthetic.json
	$(PY) pre_process_sysu.py --data_path $(DATA) --img_h 96 --img_w 16

$(call RESULT,$(call RUN,%)): $(DATA)/train_rgb_resized_img.npy
	$(PY) train.py $(NETWORK) $(FOLDERS) --batch-size 24 --per_img 2 --lr 0.03 --epochs 1 --w_hc $* --resume last
	$(PY) test.py $(FOLDERS) --mode both --gall-mode both --resume $(call RUN,$*).t --save_features $(call FEATURES,$*)

$(UNTRAINED): $(DATA)/synthetic.json
	$(PY) test.py $(FOLDERS) --mode both --gall-mode both $(NETWORK) --save_features $(call FEATURES,untrained)
