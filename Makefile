PYTHON ?= python3
RUN = .venv/bin/python
PIP = $(RUN) -m pip install --quiet --disable-pip-version-check
CORE = ddpm.py targets.py losses.py samplers.py datasets2d.py mlp.py

.PHONY: demo test lint bench

# Train eps with mse on the rings, draw 10,000 samples in 512 steps, measure them. Goes on where it was interrupted.
demo: .venv/.installed
	$(RUN) train.py --data rings --target eps --loss mse --resume
	$(RUN) sample.py --ckpt runs/rings-eps-mse-s0 --steps 512
	@echo "to go on by hand: source .venv/bin/activate"

# Two processes of one thread: threads of small tensors only wait for each other.
test: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

lint: .venv/.installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff check --select E501 --line-length 100 $(CORE)

bench: .venv/.installed
	$(RUN) bench.py

.venv/.installed: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	    { echo "Python 3.11 or newer is needed: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing requirements.txt into .venv, torch is large: minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	@$(PIP) -r requirements-dev.txt
	@touch $@
