# SPDX-License-Identifier: GPL-3.0-or-later
"""The shipper against real receivers: what was written arrives, whatever is killed on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.ship_world import World
from tests.unit.standby_host import MIB


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Source and standby."""
    made = World(tmp_path, monkeypatch)
    yield made
    made.close()


def test_seeds_follows_and_drains(world: World) -> None:
    """A seed, writes while it ships, a drain: equal to the last byte of the odd tail, without a hash."""
    engine = world.engine()
    world.start_writer()
    world.until(engine, "in_step")
    assert engine.totals.zero_bytes >= MIB, "the zero quarter of the volume must not travel as data"
    world.stop_writer()
    result = world.drain(engine)
    world.check_equal()
    world.no_help()
    assert engine.totals.hashed_bytes == 0
    assert result["epoch"] == 1 and len(result["digest"]) == 64
    world.until(engine, "sealed")
