# SPDX-License-Identifier: GPL-3.0-or-later
"""bufflink and reqlog under bad input and in races: every answer is a right one, and afterwards all works as before.

The programs are in kernel_guest/: fuzz.py has a model of the one right answer to each call, storm.py the answers that
are right while others do what they want. Both are bounded by operations. What switches tracepoints under load is in
test_kernels.py: lab/qemu.py says why. A larger share runs on the debug kernel (tests/debug_kernel). BMIGRATE_SEED moves
the seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from lab import Lab
from tests.vm.kernel_bench import DISK, Bench, bench_of
from tests.vm.test_kernel_modules import SEED, complete

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def bench(bare_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A host with the modules under test."""
    with bench_of(bare_lab, tmp_path_factory.mktemp("stress")) as made:
        yield made


def works_as_before(bench: Bench, seed: int) -> None:
    """A truth run, on modules that could be unloaded: nothing is attached and nothing pins them."""
    bench.load("modules")
    complete(bench.truth("raw", DISK, seed))


def test_bad_input_gets_the_right_answer(bench: Bench) -> None:
    result = json.loads(bench.watched("fuzz", DISK, "--seed", str(SEED + 40), "--operations", "4000"))
    print(result)
    assert (result["missed"], result["left"]) == (0, 0), result
    assert result["written"] > 100
    # The fuzzer reached what is behind the checks, not only the checks.
    for call in ("ATTACH", "DETACH", "LIST", "STATS", "read", "channel CONSUMED", "channel BARRIER", "channel PASSED"):
        assert result["answers"][f"{call} OK"] > 10, result
    works_as_before(bench, SEED + 41)


def storm(bench: Bench, kind: str, rounds: int, *options: str) -> dict[str, Any]:
    """What the guest program did."""
    arguments = ("storm", kind, "--seed", str(SEED + 42), "--rounds", str(rounds), *options)
    result: dict[str, Any] = json.loads(bench.watched(*arguments))
    print(result)
    return result


def test_a_storm_of_calls_breaks_nothing(bench: Bench) -> None:
    """Two disks stay attached, so that the tracepoints stay on: QEMU may stumble when they are switched under load."""
    upper = bench.make_device("dm-nested")
    try:
        held = ("--held", "/dev/vda", "--held", "/dev/mapper/kernel-test-one")
        result = storm(bench, "race", 6, *held, DISK, upper)
        assert result["killed"] >= 6, result
    finally:
        bench.drop_device("dm-nested")
    works_as_before(bench, SEED + 43)
