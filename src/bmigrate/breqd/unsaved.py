# SPDX-License-Identifier: GPL-3.0-or-later
"""A suspicion that the disk of /var/lib/bmigrate does not take: noted under /run until it does.

Why that is enough, by the invariant (a block that differs is marked, or its volume is suspect, durably). A write that
was missed is in no map, so the suspicion alone stands for it, and must outlive whatever can happen meanwhile:

- breqd goes on: the suspicion is in its memory. The volume is in step and drained no more until it was compared, as
  with any other; ``Tracker.poll`` tries the disk again each second.
- breqd dies: the kernel's attachment lives on, and the next daemon would believe it. It reads the note first. /run is
  in memory, and not full because a disk is.
- the kernel's attachment is gone (the disk was removed, the module reloaded, the volume given up): the record on disk
  names an attachment that never comes back, and ``track.judge`` makes the volume suspect for that alone.
- the host goes down: the note is lost, and so is every suspicion of that boot. But the next boot believes a map only
  by a clean flag. There was none since the attach, which removes it, and ``clean_close`` writes none before the
  suspicion is on disk. So the volume is suspect then because it was not closed in good order.

It must never be the reason to answer that something is durable: who asked for a suspicion is told that it failed.
"""

from __future__ import annotations

from bmigrate.breqd.maps import Key
from bmigrate.common import atomic, paths


def note(key: Key, reason: str) -> None:
    """Note it.

    Raises:
        OSError: not even that was possible.
    """
    path = paths.suspicion_note(*key)
    atomic.make_directory(path.parent)
    atomic.replace_json(path, {"reason": reason})


def read(key: Key) -> str | None:
    """The reason that was noted in this boot, or None.

    Raises:
        DefectError: there is a note that cannot be read.
    """
    fields = atomic.read_json(paths.suspicion_note(*key))
    return None if fields is None else str(fields["reason"])


def forget(key: Key) -> None:
    """The suspicion is on disk, or over."""
    paths.suspicion_note(*key).unlink(missing_ok=True)
