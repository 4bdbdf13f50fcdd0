# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may have a session: each refusal by its reason, each naming what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bmigrate.common.errors import RefusedError
from bmigrate.common.state import WorkloadState
from bmigrate.hold import admission, udev
from bmigrate.hold.admission import Geometry
from bmigrate.hold.record import Record
from bmigrate.wire import hello as greeting

MARK = [1, 2]
SEALED = {"epoch": 3, "state": MARK, "hold_ids": {}}


def standby(**changes: Any) -> WorkloadState:
    fields: dict[str, Any] = {"role": "standby", "generation": {"number": 2, "id": "a" * 32}, **changes}
    return WorkloadState("wl", "beta", **fields)


def check(
    state: WorkloadState | None = None,
    record: Record | None = None,
    mark: list[int] | None = None,
    geometry: dict[str, Geometry | None] | None = None,
    **changes: Any,
) -> str | None:
    fields: dict[str, Any] = {
        "workload": "wl",
        "host": "alpha",
        "generation": greeting.Generation(2, "a" * 32),
        "boot_id": "b" * 32,
        "incarnation": "c" * 32,
        "volumes": [greeting.HelloVolume("data", 1 << 20, 512, 4096)],
        **changes,
    }
    try:
        admission.check(
            greeting.Hello(**fields),
            state or standby(),
            record or Record("wl", 3),
            geometry or {"data": Geometry(1 << 20, 512)},
            mark or MARK,
        )
    except RefusedError as error:
        assert error.hint and error.message
        return error.reason
    return None


def test_a_good_sender_is_admitted() -> None:
    assert check() is None
    assert check(geometry={"data": Geometry(2 << 20, 512)}) is None
    assert check(volumes=[greeting.HelloVolume("data", 1 << 20, 4096, 4096)]) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": standby(role="primary")}, "wrong_role"),
        ({"state": standby(role="none")}, "wrong_role"),
        ({"state": standby(generation=None)}, "wrong_generation"),
        ({"state": standby(generation={"number": 3, "id": "a" * 32})}, "wrong_generation"),
        ({"state": standby(generation={"number": 2, "id": "e" * 32})}, "wrong_generation"),
        ({"record": Record("wl", 3, None, SEALED)}, "sealed"),
        (
            {"record": Record("wl", 3, None, SEALED), "state": standby(handover={"phase": "prepared"}), "mark": [3, 4]},
            "sealed",
        ),
        ({"geometry": {"data": None}}, "not_held"),
        ({"geometry": {"data": Geometry((1 << 20) - 512, 512)}}, "too_small"),
        ({"geometry": {"data": Geometry(1 << 20, 4096)}}, "block_size"),
        ({"geometry": {"other": Geometry(1 << 20, 512)}}, "unknown_volume"),
        ({"geometry": {"data": Geometry(1 << 20, 512), "wal": Geometry(1 << 20, 512)}}, "missing_volume"),
    ],
)
def test_refusals(changes: dict[str, Any], reason: str) -> None:
    assert check(**changes) == reason


def test_a_seal_is_over_once_the_handover_is() -> None:
    assert check(record=Record("wl", 3, None, SEALED), mark=[3, 4]) is None


def test_a_host_without_a_role_admits_nobody() -> None:
    hello = greeting.Hello(
        "wl",
        "alpha",
        greeting.Generation(1, "a" * 32),
        "b" * 32,
        "c" * 32,
        [greeting.HelloVolume("data", 1 << 20, 512, 4096)],
    )
    with pytest.raises(RefusedError) as caught:
        admission.check(hello, None, Record("wl"), {"data": Geometry(1 << 20, 512)}, MARK)
    assert caught.value.reason == "wrong_role"


@pytest.mark.parametrize(
    ("properties", "names"),
    [
        ({"DEVTYPE": "disk", "ID_SERIAL": "bm-1"}, ["serial-bm-1"]),
        ({"DEVTYPE": "partition", "ID_SERIAL": "bm-1", "PARTN": "2"}, ["serial-bm-1-part2"]),
        ({"DEVTYPE": "partition", "ID_SERIAL": "bm-1", "PARTN": "2", "ID_PART_ENTRY_UUID": "u"}, ["part-u"]),
        ({"DEVTYPE": "disk", "DM_UUID": "LVM-x", "ID_SERIAL": "y"}, ["dm-LVM-x"]),
        ({"DEVTYPE": "disk"}, []),
        ({"DEVTYPE": "disk", "ID_SERIAL": "../../etc/passwd"}, []),
    ],
)
def test_names_of_udev_markers(properties: dict[str, str], names: list[str]) -> None:
    assert udev.keys(properties) == names


def test_a_marker_keeps_the_links_that_name_the_device_and_drops_those_that_name_its_content() -> None:
    links = [
        "disk/by-id/virtio-s",
        "disk/by-path/pci-0",
        "disk/by-uuid/u",
        "disk/by-label/l",
        "disk/by-partuuid/p",
        "disk/by-diskseq/9",
        'disk/by-id/bad"name',
        "disk/by-id/wwn-1",
    ]
    assert udev.content("wl", "data", "/dev/disk/by-id/wwn-1", links).splitlines() == [
        "BMIGRATE_VOLUME=wl/data",
        "BMIGRATE_LINK_0=disk/by-id/wwn-1",
        "BMIGRATE_LINK_1=disk/by-id/virtio-s",
        "BMIGRATE_LINK_2=disk/by-path/pci-0",
    ]
    assert udev.content("wl", "data", "/dev/vdb", []).splitlines() == ["BMIGRATE_VOLUME=wl/data"]


def test_the_rule_tests_for_the_markers_that_hold_makes() -> None:
    text = (Path(__file__).resolve().parents[2] / "roles" / "programs" / "files" / "61-bmigrate.rules").read_text()
    base = "/var/lib/bmigrate/udev/"
    made = {
        base + "dm-$env{DM_UUID}": {"DM_UUID": "$env{DM_UUID}"},
        base + "part-$env{ID_PART_ENTRY_UUID}": {
            "DEVTYPE": "partition",
            "ID_PART_ENTRY_UUID": "$env{ID_PART_ENTRY_UUID}",
        },
        base + "serial-$env{ID_SERIAL}-part%n": {"DEVTYPE": "partition", "ID_SERIAL": "$env{ID_SERIAL}", "PARTN": "%n"},
        base + "serial-$env{ID_SERIAL}": {"DEVTYPE": "disk", "ID_SERIAL": "$env{ID_SERIAL}"},
    }
    for path, properties in made.items():
        assert [base + name for name in udev.keys(properties)] == [path]
        assert f'TEST=="{path}"' in text or f'TEST!="{path}"' in text
        assert f'IMPORT{{file}}="{path}"' in text
    for index in range(udev.MAX_LINKS):
        assert f'SYMLINK+="$env{{BMIGRATE_LINK_{index}}}"' in text
