# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules on the other kernels that they are for: built without a complaint, and no changed sector missed there.

A small part of test_kernel_modules.py, on one guest per kernel. BMIGRATE_KERNELS names the series (lab/kernelindex.py);
without it there is one that the other tests do not run on. `make test-kernels` takes all of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from lab.kernels import Kernel, ensure
from tests.conftest import LAB_NAME
from tests.vm.kernel_bench import DISK, HOST, ROOT, TROUBLE, Bench, bench_of

# Emulated, one processor at a time, and the first use of a series installs its kernel.
pytestmark = [pytest.mark.vm, pytest.mark.timeout(1800)]
SERIES = os.environ.get("BMIGRATE_KERNELS", "6.12").split()
#: Built for, but not run: the newest one is run.
BUILT_ONLY = ("previous",)
SEED = int(os.environ.get("BMIGRATE_SEED", "20260702"))


@pytest.mark.parametrize("series", SERIES)
def test_builds_without_a_complaint(series: str, tmp_path: Path) -> None:
    """By the compiler with W=1, and by sparse. And DKMS would build for it."""
    kernel = ensure(series)
    assert kernel.complaints(ROOT / "module_src", tmp_path) == []
    range_of = re.search(r'^BUILD_EXCLUSIVE_KERNEL="(.*)"$', (ROOT / "module_src/dkms.conf").read_text(), re.MULTILINE)
    assert range_of and re.search(range_of.group(1), kernel.release)


@pytest.fixture(scope="module", params=[series for series in SERIES if series not in BUILT_ONLY])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """The kernel of a series."""
    return ensure(request.param)


@pytest.fixture(scope="module")
def kernel_lab(kernel: Kernel) -> Iterator[Lab]:
    """A guest that runs it."""
    keep = os.environ.get("BMIGRATE_LAB_KEEP") == "1"
    name = f"{LAB_NAME}-{'-'.join(kernel.release.split('.')[:2])}"
    box = Lab(name, kernel)
    if not keep:
        box.down()
    try:
        box.up([HOST])
        assert box.ssh(HOST, "uname -r").stdout.strip() == kernel.release
        yield box
    finally:
        if not keep:
            box.down()


@pytest.fixture(scope="module")
def bench(kernel_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The guest with the modules under test."""
    with bench_of(kernel_lab, tmp_path_factory.mktemp("kernel")) as made:
        yield made


def complete(result: dict[str, Any]) -> None:
    """Nothing was missed, and there was something to miss."""
    assert result["changed"] > 1000, result
    assert result["missed"] == 0, result
    assert result["foreign"] == 0 and not result["blind"], result
    assert result["channel"]["pending_count"] == 0, result


def case(bench: Bench, program: str, name: str) -> Any:
    """One case of a guest program alone."""
    outcome = json.loads(bench.watched(f"case_{program}", DISK, name))[name]
    assert "result" in outcome, outcome["error"]
    return outcome["result"]


@pytest.mark.parametrize("workload", ["raw", "ext4"])
def test_every_changed_sector_is_in_the_log(bench: Bench, workload: str) -> None:
    result = bench.truth(workload, DISK, SEED)
    complete(result)
    assert result["widened"] == 0, "the rings were large enough"
    assert result["stats"]["writes"] > 0 and result["stats"]["passthrough"] == 0


def test_merged_discards_are_recorded_one_by_one(bench: Bench) -> None:
    device = bench.make_device("nvme")
    try:
        result = bench.truth("ext4-removal", device, SEED + 2)
        complete(result)
        assert result["stats"]["discards"] > 50, result
    finally:
        bench.drop_device("nvme")


@pytest.mark.parametrize("kind", ["nvme-head", "dm-linear", "dm-crypt", "md-raid0", "md-raid1"])
def test_every_changed_sector_of_a_bio_based_disk_is_in_the_log(bench: Bench, kind: str) -> None:
    device = bench.make_device(kind)
    try:
        complete(bench.truth("raw", device, SEED + 10))
    finally:
        bench.drop_device(kind)


def test_what_is_written_through_an_upper_disk_is_in_the_log_of_the_lower_one(bench: Bench) -> None:
    """Of a raid0 that submits its bios again in place."""
    upper = bench.make_device("md-raid0-in-place")
    try:
        complete(bench.truth("raw", "/dev/mapper/kernel-test-q0", SEED + 20, "--written", upper))
    finally:
        bench.drop_device("md-raid0-in-place")


@pytest.mark.parametrize("kind", ["brd", "zram"])
def test_a_disk_in_memory_is_recorded_or_refused_by_name(bench: Bench, kernel: Kernel, kind: str) -> None:
    """Before Linux 6.3 it can be written by rw_page, past everything that could record it."""
    major, minor = (int(part) for part in kernel.release.split(".")[:2])
    device = bench.make_device(kind)
    try:
        if (major, minor) >= (6, 3):
            complete(bench.truth("raw", device, SEED + 30))
            return
        program = (
            "import os, sys\nfrom tests.vm.kernel_guest.cases import refused\n"
            "from bmigrate.kernel.control import Control\n"
            "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
            "error = refused(lambda: Control().attach(fd, bio_based=True))\n"
            "print(error.code, error.errno, os.path.realpath(sys.argv[1]) in str(error) and bool(error.hint))"
        )
        assert bench.python("-c", program, device).stdout.split() == ["rw_page", "95", "True"]
    finally:
        bench.drop_device(kind)


def test_overflow_widens_and_never_loses(bench: Bench) -> None:
    bench.ssh("echo 16 > /sys/module/reqlog/parameters/ring_limit")
    try:
        result = bench.truth("raw", DISK, SEED + 1, "--asleep")
    finally:
        bench.ssh("echo 0 > /sys/module/reqlog/parameters/ring_limit")
    complete(result)
    assert result["stats"]["overflowed"] > 300, result
    assert result["missed_without_overflow"] > 0, "the rings alone would have lost something"


def test_passthrough_marks_the_whole_volume(bench: Bench) -> None:
    result = case(bench, "devices", "passthrough")
    assert result["test unit ready"] == [0, 0, True, False, []], result
    for name in ("write", "write zeroes without data", "write through sg"):
        status, marks, passed_at_once, whole, flags = result[name]
        assert status == 0 and marks >= 1 and not passed_at_once and whole and flags == [1], result


def test_a_command_through_the_device_mapper_marks_its_volumes(bench: Bench) -> None:
    assert case(bench, "devices", "passthrough_below") == {"through": 1, "below": 1, "elsewhere": 0}


def test_attach_and_detach_under_load(bench: Bench) -> None:
    assert case(bench, "attach", "churn")["seen"] > 0


def test_modules_can_be_loaded_and_unloaded_under_load(bench: Bench) -> None:
    device = bench.make_device("dm-linear")
    try:
        arguments = ("reload", "--seed", str(SEED + 42), "--rounds", "4", DISK, device)
        result = json.loads(bench.watched("storm", *arguments))
        assert result["lives"] == 4 and result["recorded"] >= 4, result
    finally:
        bench.drop_device("dm-linear")
    bench.load("modules")
    complete(bench.truth("raw", DISK, SEED + 44))


def test_nothing_of_the_modules_stays_behind(bench: Bench) -> None:
    """They unload after all that; the kernel's log has no complaint about it."""
    before = len(bench.ssh("dmesg").stdout.splitlines())
    bench.unload()
    try:
        assert bench.ssh("grep -cE '^(reqlog|bufflink) ' /proc/modules", check=False).stdout.strip() == "0"
        log = "\n".join(bench.ssh("dmesg").stdout.splitlines()[before:])
        assert not TROUBLE.search(log), log
    finally:
        bench.load("modules")
