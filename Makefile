# SPDX-License-Identifier: GPL-3.0-or-later
#
# The commands an operator or developer starts from the repository root. Each target does one
# thing, may be repeated, and leaves no process behind when it is done.

SHELL := /bin/bash
PY := .venv/bin/python
PYTEST := $(PY) -m pytest
export PYTHONPATH := src:.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test lint truth bench lab-up lab-down test-unit test-vm test-kernels test-ansible test-mutants test-model test-fuzz test-campaign test-debug-kernel bench-kernel module clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## install what is missing on this machine (Debian 12; needs root or sudo) and make .venv
	@tools/setup

demo: setup ## boot two VMs, move a live PostgreSQL there and back, print the evidence
	$(PY) -m demo

# Two at a time (tests/conftest.py says what stays together). The kernel modules have guests of their own. One boot of
# the others serves tests/ansible: first what needs them untouched, then what installs, then what needs them installed;
# another one serves tests/vm.
KERNEL := $(addprefix tests/vm/test_,kernels.py kernel_modules.py kernel_stress.py kernel_life.py)
TESTS := tests/ansible $(KERNEL) $(filter-out $(KERNEL),$(sort $(wildcard tests/vm/test_*.py))) tests/unit tests/contract
test: setup lint module ## lint, kernel build, then unit, contract, Ansible and VM tests
	$(PYTEST) -n 2 --dist loadscope --no-loadscope-reorder --durations=20 --tb=short $(TESTS)

lint: setup ## check style and types of all that is in the repository
	tools/lint

module: ## build the kernel modules for this machine's headers, or those in KDIR, warning-free
	tools/build-module

test-unit: setup ## unit and property tests only: no guest is booted
	$(PYTEST) $(wildcard tests/unit tests/contract)

test-vm: setup ## tests on the lab's guests, without Ansible
	$(PYTEST) tests/vm

test-kernels: setup ## build for and test on 5.10, 6.1, 6.12 and the newest kernels of Debian's suites
	BMIGRATE_KERNELS="5.10 6.1 6.12 previous newest" $(PYTEST) --durations=20 tests/vm/test_kernels.py

test-ansible: setup ## playbooks, molecule and ansible-runner on the lab's guests
	$(PYTEST) tests/ansible

test-debug-kernel: setup ## truth, bad input and storms on a kernel that checks itself (KASAN, lockdep, kmemleak)
	$(PY) -m lab.debugkernel
	$(PYTEST) --durations=0 --tb=short tests/debug_kernel

test-model: setup ## the protocol in small scope, exhaustively, and with each rule broken; state machines over the code
	$(PY) -m tests.model
	$(PYTEST) tests/unit/test_ship_model.py tests/unit/test_breqd_maps.py tests/unit/test_race_losses.py

test-fuzz: setup ## a million hostile frames against the receiver
	$(PY) -m tests.fuzz

test-campaign: setup ## CAMPAIGN_FAULTS=200 random faults on two hosts under load, each judged on the disks; goes on where it ended
	$(PY) -m tests.campaign

test-mutants: setup ## sabotage the programs on purpose and show which test notices
	$(PY) -m tests.mutants

# The memory that the last argument makes persistent is where a guest with DAX comes from.
truth: setup ## compare the log with the truth for each kind of device and operation; writes docs/kernel.md
	BMIGRATE_LAB_APPEND='memmap=16M!960M' $(PY) -m tests.truth

bench: setup ## measure tracking, shipping, pacing, draining and comparing: one table of ratios, and plots
	$(PY) -m tests.bench.everything $(BENCH)

bench-kernel: setup ## count what a write costs with tracking, and with DRBD or raid1 over nbd
	$(PY) -m tests.bench.kernel $(BENCH_KERNEL)

lab-up: setup ## boot the two VMs and leave them running
	$(PY) -m lab up

lab-down: ## stop the VMs and throw their disks away
	python3 -m lab down

clean: ## remove what was built here (caches of images stay: see python3 -m lab --help)
	rm -rf build dist artifacts .pytest_cache .mypy_cache .ruff_cache .hypothesis .ansible
	if [ -f module_src/Makefile ]; then $(MAKE) -C module_src clean; fi
