# SPDX-License-Identifier: GPL-3.0-or-later
"""What the shipper remembers: nothing is believed that is not on disk, and a change that failed may be tried again."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import atomic, paths
from bmigrate.ship.engine import Engine
from bmigrate.ship.record import Record


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _on_disk() -> dict[str, Any]:
    path = paths.state_dir("wl") / "ship.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def test_a_pause_or_a_limit_that_the_disk_did_not_take_is_none(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused on a full disk: what is shown is as before, and the same command again changes it."""
    with monkeypatch.context() as full:
        full.setattr(atomic, "replace_json", _full)
        with pytest.raises(OSError):
            engine.pause(True)
        with pytest.raises(OSError):
            engine.limit(4096)
        assert engine.record.paused is False and engine.bandwidth == 0
        assert engine.report()["bandwidth_source"] == "config"
    assert engine.pause(True), "it was called unchanged, and was on no disk"
    assert engine.limit(4096)
    assert (_on_disk()["paused"], _on_disk()["bandwidth_bytes_per_second"]) == (True, 4096)
    assert not engine.pause(True) and not engine.limit(4096)


def test_a_session_that_is_not_on_disk_is_not_the_last_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its epoch would be told to the standby with the number of another session."""
    record = Record("wl")
    record.opened(3, "s3")
    record.acked(17)
    with monkeypatch.context() as full:
        full.setattr(atomic, "replace_json", _full)
        with pytest.raises(OSError):
            record.opened(4, "s4")
    assert record.last_session() == {"epoch": 3, "session_id": "s3", "ack": 17} == Record("wl").last_session()
    record.close()


def test_distrust_outlives_the_process(root: Path) -> None:
    """Until a session has begun, which makes every volume suspect first."""
    record = Record("wl")
    record.opened(3, "s3")
    record.acked(17)
    record.distrust()
    record.acked(18)  # by the thread of the session that is ending
    record.close()
    again = Record("wl")
    assert record.damaged and again.damaged
    again.opened(4, "s4")
    again.close()
    assert Record("wl").damaged is False
