# SPDX-License-Identifier: GPL-3.0-or-later
"""The life of a tracked volume in a guest: nothing that happens to it is silent, and a blind tracker says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import Lab
from tests.vm.kernel_bench import DIRECTORY, DISK, Bench, bench_of, build, unpack

pytestmark = pytest.mark.vm


@pytest.fixture(scope="module")
def bench(bare_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A host with the modules under test."""
    with bench_of(bare_lab, tmp_path_factory.mktemp("life")) as made:
        yield made


def life(bench: Bench, case: str) -> Any:
    """What one case of case_life.py found."""
    outcome = json.loads(bench.watched("case_life", DISK, case))[case]
    assert "result" in outcome, outcome["error"]
    return outcome["result"]


def test_another_disk_under_the_same_name_is_suspect(bench: Bench) -> None:
    result = life(bench, "unplugged")
    assert "removed" in result["gone"] or "not tracked" in result["gone"], result
    assert result["anew"] and result["seen"], result


def test_a_volume_that_is_resized_is_suspect_and_tracked_in_its_new_size(bench: Bench) -> None:
    assert life(bench, "resized") == {"32": True, "8": True}


def test_a_partition_that_is_moved_or_deleted_is_suspect(bench: Bench) -> None:
    result = life(bench, "partitions")
    assert "moved" in result["moved"] or "gone" in result["moved"], result
    assert "not tracked" in result["deleted"], result


def test_detach_under_load_keeps_what_came_before_and_believes_nothing_after(bench: Bench) -> None:
    result = life(bench, "detached_under_load")
    assert result["lost"] == 0 and result["after"] > 0, result
    assert "not tracked" in result["between"] and "replaced" in result["suspect"], result


def test_a_module_that_is_replaced_under_a_volume_makes_it_suspect(bench: Bench) -> None:
    result = life(bench, "replaced")
    assert result["busy"] == 1 and result["attached"] and result["seen"] == [False, True], result
    assert "module reloaded" in result["suspect"], result


def test_foreign_writes_while_tracking_was_off_are_not_silent(bench: Bench) -> None:
    assert "attachment was lost" in life(bench, "foreign")["suspect"]


def test_the_self_test_proves_and_touches_nothing(bench: Bench) -> None:
    """idle: nothing to compare yet (3); then proven by a rewritten block, and by a write (0)."""
    result = life(bench, "selftest")
    for kind, outcome in result.items():
        idle, active, same, passive, state, suspect = outcome
        assert same and suspect is None, (kind, outcome)
        # A multipath head counts nothing before Linux 6.5.
        if kind == "nvme-head" and state == "uncounted":
            assert (idle, active, passive) == (3, 3, 3), (kind, outcome)
        else:
            assert (idle, active, passive, state) == (3, 0, 0, "proven"), (kind, outcome)


def test_the_active_self_test_needs_the_device_for_itself(bench: Bench) -> None:
    result = life(bench, "selftest_in_use")
    assert result == {"reader": [0, False], "writer": [3, True], "holder": [3, False]}


def test_a_mounted_volume_of_the_device_mapper_is_attached_under_load(bench: Bench) -> None:
    result = life(bench, "settled")
    assert result["changed"] > 200 and result["lost"] == 0 and result["suspect"] is None, result


def test_a_daemon_that_dies_in_the_freeze_leaves_nothing_frozen(bench: Bench) -> None:
    assert life(bench, "killed_in_the_freeze") == {"died": -9, "hung": True, "wrote": 0, "attached": True}


def test_a_raw_writer_keeps_such_a_volume_from_being_attached(bench: Bench) -> None:
    result = life(bench, "raw_writer")
    assert "open for writing" in result["suspect"] and not result["attached"] and result["entries"] == 0, result


def test_a_storm_with_the_reader_stopped_for_a_minute(bench: Bench) -> None:
    result = life(bench, "storm")
    print(result)
    assert result["changed"] > 10000 and result["lost"] == 0 and result["suspect"] is None, result
    assert result["overflow_regions"] > 100 and result["widened_bytes"] >= 100 * 65536, result
    assert result["grown_in_the_second_half_kib"] < 2048, result


def test_a_blind_tracker_is_found_out(bench: Bench) -> None:
    """A module whose probe records nothing."""

    def blindfold(sources: Path) -> None:
        path = sources / "reqlog/probe.c"
        text = path.read_text()
        begin = "	if (!disk)\n		return;\n"
        assert text.count(begin) == 1
        path.write_text(text.replace(begin, "	if (disk)\n		return;\n"))

    other = build(bench.lab, bench.scratch, "blind", blindfold)
    unpack(bench.lab, {path.name: path for path in other.values()}, f"{DIRECTORY}/blind")
    bench.load("blind")
    try:
        result = life(bench, "blind")
    finally:
        bench.load("modules")
    assert "the tracker is blind" in result["suspect"], result
    assert (result["exit"], result["drain"]) == (5, "blind"), result
