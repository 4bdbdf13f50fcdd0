# SPDX-License-Identifier: GPL-3.0-or-later
"""A bio-based volume is attached only when no earlier write can be under way; a freeze outlives nobody."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bmigrate.breqd import settle
from bmigrate.common import blockdev
from bmigrate.common.errors import RefusedError


class Kernel:
    """What is frozen, by device number, and the ioctls that were asked for."""

    def __init__(self) -> None:
        self.frozen: set[int] = set()
        self.asked: list[int] = []
        self.dies_frozen = False

    def ioctl(self, fd: int, request: int, _argument: int) -> int:
        """FIFREEZE and FITHAW."""
        self.asked.append(request)
        number = os.fstat(fd).st_dev
        if (request == settle.FIFREEZE) == (number in self.frozen):
            raise OSError(errno.EBUSY if request == settle.FIFREEZE else errno.EINVAL, "no")
        self.frozen ^= {number}
        if self.dies_frozen and request == settle.FIFREEZE:
            raise KeyboardInterrupt
        return 0


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A volume that is mounted at tmp_path."""
    made = Kernel()
    mounts = [f"{os.getpid()}: {tmp_path}"]
    monkeypatch.setenv("BMIGRATE_RUN", str(tmp_path / "run"))
    monkeypatch.setattr(settle.fcntl, "ioctl", made.ioctl)
    monkeypatch.setattr(settle, "nobody_has", lambda device: False)
    monkeypatch.setattr(blockdev, "mounts_of", lambda device: mounts)
    monkeypatch.setattr(blockdev, "mounts_of_number", lambda number: mounts)
    return made


def notes(tmp_path: Path) -> list[Path]:
    """What tells of a freeze."""
    return list((tmp_path / "run" / "frozen").glob("*"))


def test_a_device_that_nobody_has_needs_nothing(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settle, "nobody_has", lambda device: True)
    settle.settle("/dev/x", "v", lambda device: [])
    assert kernel.asked == []


def test_an_exclusive_open_does_not_clear_a_raw_writer(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database on the raw device need not have opened it exclusively."""
    monkeypatch.setattr(settle, "nobody_has", lambda device: True)
    monkeypatch.setattr(blockdev, "mounts_of", lambda device: [])
    with pytest.raises(RefusedError, match="open for writing in process 1"):
        settle.settle("/dev/x", "v", lambda device: ["open for writing in process 1 (db)"])


def test_a_mounted_file_system_is_frozen_and_thawed(kernel: Kernel, tmp_path: Path) -> None:
    settle.settle("/dev/x", "v", lambda device: [])
    assert kernel.asked == [settle.FIFREEZE, settle.FITHAW]
    assert not kernel.frozen and not notes(tmp_path)


@pytest.mark.parametrize("users", [["open for writing in process 1 (db)"], ["dm-1 is part of dm-3"]])
def test_any_other_user_is_a_refusal(kernel: Kernel, users: list[str]) -> None:
    with pytest.raises(RefusedError) as caught:
        settle.settle("/dev/x", "v", lambda device: users)
    assert caught.value.reason == "in_use" and users[-1] in caught.value.message
    assert kernel.asked == []


def test_who_dies_in_the_freeze_is_thawed_by_the_next(kernel: Kernel, tmp_path: Path) -> None:
    kernel.dies_frozen = True
    with pytest.raises(KeyboardInterrupt):
        settle.settle("/dev/x", "v", lambda device: [])
    assert kernel.frozen and notes(tmp_path)
    settle.thaw_leftovers()
    assert not kernel.frozen and not notes(tmp_path)


def test_a_note_without_a_freeze_does_no_harm(kernel: Kernel, tmp_path: Path) -> None:
    """Dead between the note and the freeze."""
    kernel.dies_frozen = True
    with pytest.raises(KeyboardInterrupt):
        settle.settle("/dev/x", "v", lambda device: [])
    kernel.frozen.clear()
    settle.thaw_leftovers()
    assert kernel.asked[-1] == settle.FITHAW and not notes(tmp_path)


def test_a_file_system_that_cannot_be_frozen_is_a_refusal(kernel: Kernel, tmp_path: Path) -> None:
    kernel.frozen.add(os.stat(tmp_path).st_dev)
    with pytest.raises(RefusedError):
        settle.settle("/dev/x", "v", lambda device: [])
    assert not notes(tmp_path)
