# Plain commands; the README shows them for systems without make.
PYTHON ?= python3
VENV = .venv
RUN = $(VENV)/bin/python
CONSTRAINTS ?= -c constraints.txt

.PHONY: demo test clean

demo: $(VENV)/.installed
	$(RUN) stage1_align.py --restart
	$(RUN) stage2_instruct.py --restart
	$(RUN) sanity_check.py --sample 0
	$(RUN) -m tools.evaluate --run runs/toy
	$(RUN) -m tools.page --run runs/toy

test: $(VENV)/.installed-dev
	$(RUN) -m pytest -q -n 2 --dist loadfile

$(VENV)/.installed: requirements.txt constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 11) else 'This is Python ' \
	  + sys.version.split()[0] + ', but the packages need 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt $(CONSTRAINTS)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(RUN) -m pip install -q -r requirements-dev.txt $(CONSTRAINTS)
	touch $@

clean:
	rm -rf $(VENV) runs toy/data
