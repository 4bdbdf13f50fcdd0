# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the VM tests: the deployed rig, made once for all of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab import Lab
from tests.vm.rig import Rig


@pytest.fixture(scope="session")
def rig(lab: Lab) -> Iterator[Rig]:
    """Both guests with the shipped playbooks run on them, the fault workload in step."""
    made = Rig(lab)
    made.deploy()
    yield made
    made.close()
    for name, seconds in made.times:
        print(f"{name}: {seconds:.0f} s")
