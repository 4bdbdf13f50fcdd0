# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules on a kernel with KASAN, lockdep, PROVE_RCU, atomic-sleep checks and kmemleak: not one report.

First the truth on disks of many kinds, then bad input and storms, then a look at all that the kernel said. At the end
modules with a defect are loaded on purpose: the kernel must say so, or its silence before would mean nothing.

One guest of its own. The tests need each other's order. BMIGRATE_SEED moves all seeds, BMIGRATE_STORM_ROUNDS is how
long the storms are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab import Lab, debugkernel
from tests.conftest import LAB_NAME
from tests.debug_kernel.defects import DEFECTS, Defect, broken_copy
from tests.debug_kernel.reports import Report, leaks, reports
from tests.vm.kernel_bench import DIRECTORY, DISK, HOST, Bench, bench_of, unpack
from tests.vm.test_kernel_modules import complete

pytestmark = pytest.mark.timeout(3600)
SEED = int(os.environ.get("BMIGRATE_SEED", "20260702")) + 50
ROUNDS = int(os.environ.get("BMIGRATE_STORM_ROUNDS", "8"))
KMEMLEAK = "/sys/kernel/debug/kmemleak"
# Attach, write until a ring overflows, detach, drain: what each of the defects needs to show.
EXERCISE = (
    "import os, sys\nfrom tests.vm.kernel_guest.cases import RING_LIMIT, attached, empty, write\n"
    "from bmigrate.kernel.channel import Channel\nfrom bmigrate.kernel.control import Control\n"
    "for _ in range(3):\n    with attached(sys.argv[1]):\n        RING_LIMIT.write_text('1')\n"
    "        for _ in range(2 * os.cpu_count()):\n            write(sys.argv[1], 8)\n"
    "    with Channel() as channel, Control() as control:\n        empty(channel)\n        control.list()\n"
)


class DebugLab(Lab):
    """A lab whose guests have the debug kernel."""

    @property
    def kernel(self) -> debugkernel.DebugKernel | None:
        """With its way to build modules."""
        known = super().kernel
        return debugkernel.DebugKernel(known.directory) if known else None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A guest with the debug kernel and the modules under test."""
    keep = os.environ.get("BMIGRATE_LAB_KEEP") == "1"
    chosen = os.environ.get("BMIGRATE_LAB_KERNEL")
    kernel = debugkernel.DebugKernel(Path(chosen)) if chosen else debugkernel.ensure()
    box = DebugLab(f"{LAB_NAME}-debug", kernel)
    if not keep:
        box.down()
    with pytest.MonkeyPatch.context() as patch:
        # KASAN's shadow and kmemleak's own objects take a third.
        patch.setenv("BMIGRATE_LAB_MEMORY_MIB", os.environ.get("BMIGRATE_LAB_MEMORY_MIB", "3072"))
        try:
            box.up([HOST], limit_seconds=1800)
            box.ssh(HOST, "mountpoint -q /sys/kernel/debug || mount -t debugfs none /sys/kernel/debug")
            with bench_of(box, tmp_path_factory.mktemp("debug")) as made:
                made.limit_seconds = 3000
                yield made
        finally:
            if not keep:
                box.down()


def log(bench: Bench) -> str:
    """All that the kernel said since it was booted."""
    text: str = bench.ssh("dmesg").stdout
    assert "Linux version" in text.splitlines()[0], "the beginning of the kernel log is lost"
    return text


def leaked(bench: Bench) -> list[Report]:
    """What the modules allocated and nothing refers to. Twice: an object is told when two scans did not find it."""
    bench.ssh(f"echo scan > {KMEMLEAK}; sleep 6; echo scan > {KMEMLEAK}", timeout=1800)
    return leaks(bench.ssh(f"cat {KMEMLEAK}").stdout)


def lockdep_watches(bench: Bench) -> bool:
    """Lockdep ends at its first report, or when it runs out of memory."""
    return " debug_locks: 1" in " ".join(bench.ssh("cat /proc/lockdep_stats").stdout.split())


def test_the_kernel_watches(bench: Bench) -> None:
    said = log(bench)
    assert "kasan: KernelAddressSanitizer initialized" in said
    assert "RCU lockdep checking is enabled" in said
    assert "kmemleak: Kernel memory leak detector initialized" in said
    assert lockdep_watches(bench)


@pytest.mark.parametrize("workload", ["raw", "ext4"])
def test_the_truth_on_a_request_based_disk(bench: Bench, workload: str) -> None:
    complete(bench.truth(workload, DISK, SEED))


@pytest.mark.parametrize(
    ("kind", "lower"),
    [
        ("dm-linear", ""),
        ("dm-crypt", ""),
        ("dm-thin", ""),
        ("dm-snapshot", ""),
        ("md-raid1", ""),
        ("md-raid0-in-place", "/dev/mapper/kernel-test-q0"),
    ],
)
def test_the_truth_on_a_bio_based_disk(bench: Bench, kind: str, lower: str) -> None:
    upper = bench.make_device(kind)
    try:
        result = bench.truth("raw", lower or upper, SEED + 1, *(["--written", upper] if lower else []))
        complete(result)
        assert not result["blind"], result
    finally:
        bench.drop_device(kind)


def test_overflow(bench: Bench) -> None:
    bench.ssh("echo 16 > /sys/module/reqlog/parameters/ring_limit")
    try:
        result = bench.truth("raw", DISK, SEED + 2, "--asleep")
    finally:
        bench.ssh("echo 0 > /sys/module/reqlog/parameters/ring_limit")
    complete(result)
    assert result["stats"]["overflowed"] > 300, result


def test_bad_input(bench: Bench) -> None:
    result = json.loads(bench.watched("fuzz", DISK, "--seed", str(SEED + 3), "--operations", "2500"))
    assert (result["missed"], result["left"]) == (0, 0), result
    assert result["written"] > 100


@pytest.mark.parametrize("kind", ["race", "reload"])
def test_a_storm(bench: Bench, kind: str) -> None:
    device = bench.make_device("dm-linear")
    try:
        storm = ("storm", kind, "--seed", str(SEED + 4), "--rounds", str(ROUNDS), DISK, device)
        result = json.loads(bench.watched(*storm))
    finally:
        bench.drop_device("dm-linear")
    print(kind, result)
    complete(bench.truth("raw", DISK, SEED + 5))


def test_the_kernel_has_nothing_to_report(bench: Bench) -> None:
    found = reports(log(bench))
    assert not found, "\n\n".join(report.text for report in found)
    assert lockdep_watches(bench), "lockdep has switched itself off"
    lost = leaked(bench)
    assert not lost, "\n\n".join(report.text for report in lost)


@pytest.mark.parametrize("defect", DEFECTS[:-1], ids=lambda defect: defect.name.replace(" ", "-"))
def test_a_defect_is_found(bench: Bench, tmp_path: Path, defect: Defect) -> None:
    """After the last of these lockdep is used up."""
    finds(bench, tmp_path, defect)


def test_the_truth_on_a_multipath_head(bench: Bench) -> None:
    """Without lockdep, which has a complaint about the target that the head is made of: see docs/debug-kernel.md."""
    assert not lockdep_watches(bench)
    bench.ssh(f"echo clear > {KMEMLEAK}")  # of what the defect has leaked
    before = len(reports(log(bench)))
    upper = bench.make_device("nvme-head")
    try:
        complete(bench.truth("raw", upper, SEED + 1))
    finally:
        bench.drop_device("nvme-head")
    found = reports(log(bench))[before:]
    assert not found, "\n\n".join(report.text for report in found)
    lost = leaked(bench)
    assert not lost, "\n\n".join(report.text for report in lost)


def test_a_use_after_free_is_found(bench: Bench, tmp_path: Path) -> None:
    """KASAN's first report, after which it is used up, too."""
    finds(bench, tmp_path, DEFECTS[-1])


def finds(bench: Bench, tmp_path: Path, defect: Defect) -> None:
    """Load modules with the defect, use them, and look at what the kernel says."""
    kernel = bench.lab.kernel
    assert kernel
    kernel.build(broken_copy(defect, tmp_path), tmp_path)
    unpack(bench.lab, {f"{name}.ko": tmp_path / f"{name}.ko" for name in ("bufflink", "reqlog")}, f"{DIRECTORY}/broken")
    before = len(reports(log(bench)))
    bench.load("broken")
    try:
        bench.python("-c", EXERCISE, DISK)
        found = leaked(bench) if defect.said.startswith("unreferenced") else reports(log(bench))[before:]
        assert any(report.ours for report in found), [report.text for report in found]
        assert any(re.search(defect.said, report.head) for report in found), [report.head for report in found]
    finally:
        bench.load("modules")
