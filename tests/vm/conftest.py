# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the VM tests: the deployed rig, made once for all of them.

With BMIGRATE_LAB_DEPLOYED=1 (and BMIGRATE_LAB_KEEP=1) what an earlier run installed is used as it is: for work on a
single test only, it shows nothing about a fresh installation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab import Lab
from tests.vm.rig import Rig


@pytest.fixture(scope="session")
def rig(lab: Lab) -> Iterator[Rig]:
    """Both guests with the shipped playbooks run on them, the fault workload in step."""
    made = Rig(lab)
    if os.environ.get("BMIGRATE_LAB_DEPLOYED") == "1":
        made.find_volume()
    else:
        made.deploy()
    yield made
    made.close()
    for name, seconds in made.times:
        print(f"{name}: {seconds:.0f} s")
