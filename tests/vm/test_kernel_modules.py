# SPDX-License-Identifier: GPL-3.0-or-later
"""bufflink and reqlog in a guest: no changed sector is missing from the log, and no kill, fault or overflow loses one.

The work is done by programs in the guest (kernel_guest/): here is what they must find. The kernel log is looked at
after each of them. The seeds are fixed; BMIGRATE_SEED moves all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from lab import Lab
from tests.truth import verdict
from tests.truth.catalogue import EACH_RUN
from tests.vm.kernel_bench import DIRECTORY, DISK, Bench, bench_of, build, unpack

pytestmark = pytest.mark.vm
SEED = int(os.environ.get("BMIGRATE_SEED", "20260702"))


@pytest.fixture(scope="module")
def bench(bare_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A host with the modules under test."""
    with bench_of(bare_lab, tmp_path_factory.mktemp("kernel")) as made:
        yield made


def complete(result: dict[str, Any]) -> None:
    """Nothing was missed, and there was something to miss."""
    assert result["changed"] > 1000, result
    assert result["missed"] == 0, result
    assert result["foreign"] == 0, result
    assert result["channel"]["pending_count"] == 0, result


# -- the truth: what the device says against what the log says ---------------------------------------------------


@pytest.mark.parametrize("workload", ["raw", "buffered", "ext4"])
def test_every_changed_sector_is_in_the_log(bench: Bench, workload: str) -> None:
    result = bench.truth(workload, DISK, SEED)
    complete(result)
    assert result["widened"] == 0, "the rings were large enough"
    assert result["stats"]["writes"] > 0 and result["stats"]["passthrough"] == 0


TOGETHER = 6


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """Rows of the truth table that were made already."""
    return {}


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("kind", EACH_RUN)
def test_every_operation_tells_the_truth(bench: Bench, rows: dict[str, Any], kind: str) -> None:
    """A row of the truth table: each operation alone. `make truth` has all rows. Some are made at once."""
    if kind not in rows:
        place = EACH_RUN.index(kind)
        rows.update(bench.rows(EACH_RUN[place : place + TOGETHER], SEED + 10))
    assert not verdict.problems(rows[kind])
    print(json.dumps(verdict.summary(rows[kind])))
    assert "absent" not in rows[kind]


def test_a_copy_of_a_slow_disk_has_every_write(bench: Bench) -> None:
    """Records are taken, and the sectors then read, while writes are in flight."""
    race = bench.race(SEED + 11)
    assert race["wrong_sectors"] == 0, race
    assert not verdict.problems_of_race(race)


def test_overflow_widens_and_never_loses(bench: Bench) -> None:
    bench.ssh("echo 16 > /sys/module/reqlog/parameters/ring_limit")
    try:
        result = bench.truth("raw", DISK, SEED + 1, "--asleep")
    finally:
        bench.ssh("echo 0 > /sys/module/reqlog/parameters/ring_limit")
    complete(result)
    assert result["stats"]["overflowed"] > 300, result
    assert result["missed_without_overflow"] > 0, "the rings alone would have lost something"
    assert result["stats"]["regions_set"] == result["stats"]["regions_harvested"] > 0, result


def test_merged_discards_are_recorded_one_by_one(bench: Bench) -> None:
    """The one trap of request-based disks: needs a disk that takes several ranges at once, as nvme does."""
    device = bench.make_device("nvme")
    try:
        result = bench.truth("ext4-removal", device, SEED + 2)
        complete(result)
        assert result["stats"]["discards"] > 50, result
    finally:
        bench.drop_device("nvme")


# -- bufflink ----------------------------------------------------------------------------------------------------


def test_a_batch_comes_again_after_its_reader_was_killed(bench: Bench) -> None:
    assert bench.case("delivery", "killed_reader") == {"busy": "busy", "errno": 16}


def test_a_fault_in_the_copy_consumes_nothing(bench: Bench) -> None:
    assert bench.case("delivery", "fault_consumes_nothing") == {"stale": "stale"}


def test_only_the_batch_in_hand_can_be_consumed(bench: Bench) -> None:
    assert bench.case("delivery", "stale_consumed") == {"codes": ["stale"] * 6}


def test_a_barrier_is_passed_when_all_before_it_is_consumed(bench: Bench) -> None:
    assert bench.case("delivery", "barriers") == {"foreign": "stale", "short": 22}


def test_a_barrier_does_not_wait_for_a_sleeping_reader(bench: Bench) -> None:
    assert bench.case("delivery", "barrier_does_not_block")["seconds"] < 2


def test_a_batch_fits_the_readers_room(bench: Bench) -> None:
    assert bench.case("delivery", "small_reads") == {"errors": [22, 22, 22, 22, 90], "sizes": [2, 2, 1]}


def test_a_region_set_again_while_pending_comes_out_again(bench: Bench) -> None:
    assert bench.case("delivery", "overflow_in_two_phases")["sweeps"] >= 2


def test_a_barrier_waits_for_the_last_region(bench: Bench) -> None:
    result = bench.case("delivery", "many_regions_in_small_batches")
    assert result["regions"] == 200 and result["batches"] > 20


def test_a_sleeping_reader_is_woken_and_not_by_each_write(bench: Bench) -> None:
    result = bench.case("delivery", "wake_ups")
    assert result["silent"] == [] and result["records"] >= 3020, result
    assert result["interrupts"] < 300, result


def test_the_ring_of_an_offline_cpu_is_read(bench: Bench) -> None:
    assert bench.case("delivery", "offline_cpu") == {"records": 80}


# -- reqlog ------------------------------------------------------------------------------------------------------


def test_an_attachment_outlives_all_files_and_pins_the_module(bench: Bench) -> None:
    result = bench.case("attach", "outlives_everything")
    assert result["rmmod"] == 1 and "in use" in result["message"], result
    assert (result["twice"], result["detached"], result["recorded"]) == ("attached", "not_attached", [[40, 1]])


def test_an_open_device_pins_the_module(bench: Bench) -> None:
    assert bench.case("attach", "open_channel_pins") == {"rmmod": [1, 1]}


def test_a_slot_is_not_reused_before_it_is_drained(bench: Bench) -> None:
    result = bench.case("attach", "slots")
    first, second = result["first"], result["second"]
    assert result["states"] == [[[first, True]], [[first, True], [second, False]], [[second, False]]]


def test_no_slot_left_is_said_and_all_come_back(bench: Bench) -> None:
    assert bench.case("attach", "every_slot") == {"slots": 1024, "code": "no_slot", "draining": 1023, "left": True}


def test_attach_checks_the_identity(bench: Bench) -> None:
    result = bench.case("attach", "wrong_identity")
    assert {result.pop(key) for key in ("major", "minor")} == {"dev_mismatch"}
    assert (result.pop("sectors"), result.pop("diskseq")) == ("size_mismatch", "diskseq_mismatch")
    assert {result.pop(key) for key in ("/dev/null", "file")} == {"not_block"}
    assert {result.pop(key) for key in ("O_PATH", "closed")} == {9}
    assert set(result.values()) == {"bad_region"} and len(result) == 6


def test_partitions_get_their_own_part(bench: Bench) -> None:
    assert bench.case("attach", "partitions") == {"records": 9}


def test_flushes_and_reads_make_no_record(bench: Bench) -> None:
    result = bench.case("attach", "flush_without_data")
    assert result["serial"] and (result["records"], result["passthrough"]) == (0, 0)


def test_only_a_privileged_root_may_open(bench: Bench) -> None:
    result = bench.case("attach", "privileges")
    assert result == {path: ["0o600", 13, 1] for path in ("/dev/bufflink/reqlog", "/dev/reqlog")}


def test_garbage_is_refused(bench: Bench) -> None:
    result = bench.case("attach", "garbage")
    assert sum(result.values()) == 4000
    assert set(result) <= {"OK", "EFAULT", "EINVAL", "ENOTTY", "ESTALE", "ENOENT", "EBADF", "ENOSPC"}, result


# -- what disks can do -------------------------------------------------------------------------------------------


def test_passthrough_marks_the_whole_volume(bench: Bench) -> None:
    result = bench.case("devices", "passthrough")
    for name in ("inquiry", "test unit ready", "synchronize cache"):
        assert result[name] == [0, 0, True, False, []], result
    # Refused by a disk that has no ATA.
    assert result["smart status"] == [2, 0, True, False, []], result
    for name in ("write", "write zeroes without data", "write through sg"):
        status, marks, passed_at_once, whole, flags = result[name]
        assert status == 0 and marks >= 1 and not passed_at_once and whole and flags == [1], result
    assert result["security erase"][:2] == [2, 1] and result["security erase"][3], result


def test_a_command_through_the_device_mapper_marks_its_volumes(bench: Bench) -> None:
    assert bench.case("devices", "passthrough_below") == {"through": 1, "below": 1, "elsewhere": 0}


def test_a_sleeping_reader_is_woken_whichever_attachment_has_the_record(bench: Bench) -> None:
    assert bench.case("devices", "woken") == {"ended": 4}


def test_failed_writes_are_recorded_and_flagged(bench: Bench) -> None:
    result = bench.case("devices", "failed_writes")
    assert [64, 8, 0] in result["ring"] and [4096, 8, 2] in result["ring"], result
    assert [4096, 128, 3] in result["overflow"], result
    assert result["failed"] == 16


def test_a_removed_disk_is_listed_as_gone(bench: Bench) -> None:
    result = bench.case("devices", "removed")
    # The attachment itself holds the adapter's module: with it gone, DETACH would run through freed memory.
    assert result["rmmod of the driver"] == 1 and result["users"] == 1, result
    assert [8, 1] in result["ranges"]


def test_writes_behind_the_known_end_are_recorded(bench: Bench) -> None:
    result = bench.case("devices", "grown")
    assert result["first"] == [[3000, 1]] and result["beyond"] and result["stats"] == 17
    assert [2048, 0xFFFFFFFF] in result["widened"] and [1920, 128] in result["widened"]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("brd", "bio_based"),
        ("zram", "bio_based"),
        ("dm-linear", "bio_based"),
        ("nvme-head", "bio_based"),
        ("zoned", "zoned"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(bench: Bench, kind: str, code: str) -> None:
    device = bench.make_device(kind)
    try:
        program = (
            "import os, sys\nfrom tests.vm.kernel_guest.cases import attach, refused\n"
            "from bmigrate.kernel.control import Control\n"
            "error = refused(attach, Control(), sys.argv[1])\n"
            "print(error.code, error.errno, os.path.realpath(sys.argv[1]) in str(error) and bool(error.hint))"
        )
        assert bench.python("-c", program, device).stdout.split() == [code, "95", "True"]
    finally:
        bench.drop_device(kind)


# -- which module ------------------------------------------------------------------------------------------------


def test_the_loaded_build_is_told_from_another(bench: Bench) -> None:
    """And a module of another interface version is refused before anything is done with it."""
    other = build(bench.lab, bench.scratch, "abi99", BMIGRATE_ABI="99")
    unpack(bench.lab, {path.name: path for path in other.values()}, f"{DIRECTORY}/abi99")
    program = (
        "from bmigrate.kernel import buildid, channel, control\n"
        "from bmigrate.kernel.errors import KernelError\n"
        "for directory in ('modules', 'abi99'):\n"
        "    print(*[buildid.is_loaded_build(m, f'{directory}/{m}.ko') for m in ('bufflink', 'reqlog')])\n"
        "for opener in (channel.Channel, control.Control):\n"
        "    try:\n        opener().close(); print('opened')\n"
        "    except KernelError as error:\n        print(error.code)\n"
    )
    try:
        assert bench.python("-c", program).stdout.split("\n")[:4] == ["True True", "False False", "opened", "opened"]
        bench.load("abi99")
        assert bench.ssh(
            "cat /sys/module/bufflink/parameters/abi /sys/module/reqlog/parameters/abi"
        ).stdout.split() == ["99", "99"]
        want = ["False False", "True True", "abi_mismatch", "abi_mismatch"]
        assert bench.python("-c", program).stdout.split("\n")[:4] == want
    finally:
        bench.load("modules")
    bench.unload()
    try:
        want = ["not_loaded", "not_loaded"]
        probe = program.split("\n", 4)
        assert bench.python("-c", "\n".join([*probe[:2], probe[4]])).stdout.split() == want
    finally:
        bench.load("modules")
