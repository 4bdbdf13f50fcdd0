# SPDX-License-Identifier: GPL-3.0-or-later
"""A small form of the campaign (docs/campaign.md): kinds that no other test has, on the hosts of the VM tests."""

from __future__ import annotations

import json
import random

import pytest

from tests.campaign import judge
from tests.campaign.faults import FAULTS, Fault
from tests.campaign.judge import Violation
from tests.campaign.stage import Stage
from tests.vm.rig import BLOCK, DISK, Rig
from tests.vm.writer import FIRST_SEED

pytestmark = pytest.mark.vm

KINDS = (
    "kill at receive.synced",
    "kill at hold.saved",
    "full disk, primary",
    "full disk, standby",
    "read errors, primary",
    "write errors, standby",
    "flush errors, standby",
)


def fault_of(name: str) -> Fault:
    """The fault of that name."""
    (found,) = [fault for fault in FAULTS if fault.name == name]
    return found


@pytest.mark.parametrize("name", KINDS)
def test_a_fault_breaks_no_rule(rig: Rig, name: str) -> None:
    """It happens, and the hosts get in step by themselves, with equal devices."""
    rig.wait_in_step()
    stage = Stage(rig, f"small-{name}", random.Random(f"{FIRST_SEED} {name}"))
    happened = False
    for _ in range(3):  # a point may not be visited in time: another visit is chosen then
        stage.start()
        happened = fault_of(name).act(stage)
        stage.quiet()
        judge.in_step_means_equal(stage)
        if happened:
            break
    print(json.dumps({"fault": name, **stage.details}), flush=True)
    assert happened, f"{name} did not happen: {stage.details}"


def test_the_judge_sees_a_single_wrong_byte(rig: Rig) -> None:
    """The negative control: one byte of the standby's file is another one, and both rules say so."""
    rig.wait_in_step()
    stage = Stage(rig, "control", random.Random(1))
    judge.nothing_is_missing(stage)
    judge.in_step_means_equal(stage)
    place = 4321 * BLOCK + 17
    with rig.lab.disk_file(stage.standby, DISK).open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
        file.flush()
        try:
            with pytest.raises(Violation, match="1 blocks differ"):
                judge.nothing_is_missing(stage)
            with pytest.raises(Violation, match="the devices differ"):
                judge.in_step_means_equal(stage)
        finally:
            file.seek(place)
            file.write(byte)
    judge.nothing_is_missing(stage)
