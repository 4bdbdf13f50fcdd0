# SPDX-License-Identifier: GPL-3.0-or-later
"""When is a standby volume suspect? Pure rules: what is on record and what is seen go in, a reason comes out.

A reason means: a block here may differ from what the source believes to have shipped, without a
dirty bit there. In doubt the answer is a reason: it costs a comparison, its absence could cost data.
It must never clear a suspicion; only a finished resync does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bmigrate.common.blockdev import WriteCounters
from bmigrate.hold.record import Record, VolumeRecord
from bmigrate.receive.ackfile import Ack
from bmigrate.wire.hello import Hello

#: More acknowledgements than a source can have missed in one session: it waits for them long before.
MAX_SYNCS_UNHEARD = 1024


def at_take(
    old: VolumeRecord | None,
    *,
    boot_id: str,
    identity: Mapping[str, Any],
    counters: WriteCounters,
    superblock_digest: Callable[[], str],
) -> str | None:
    """The rules when the device has just been opened exclusively, and was not held a moment ago.

    Args:
        old: what is on record from the last time, None when this host never held the volume.
        boot_id, identity, counters: as they are now. superblock_digest: computed only when it matters.
    """
    if old is None:
        return None  # nothing is claimed of its content: it is seeded as a whole
    if old.suspect is not None:
        return old.suspect
    if dict(identity) != old.identity:
        return f"another device than before: {_difference(old.identity, identity)}"
    if old.closed is None:
        return (
            "this host stopped without closing the volume (crash or power cut)"
            if old.boot_id != boot_id
            else "bmigrate-hold lost its exclusive hold without an orderly stop"
        )
    if old.closed["boot_id"] != boot_id and old.closed.get("next_boot", boot_id) != boot_id:
        return "this host was booted since it was closed, and in that boot it was not held"
    if not counters.counted:
        return "the kernel does not count writes to the device (queue/iostats is 0), so none can be ruled out"
    if old.closed["boot_id"] == boot_id:
        before = WriteCounters.from_dict(old.closed["counters"])
        if not counters.same_content(before):
            return f"written to while nobody held it: {_growth(before, counters)}"
        return None
    if not counters.untouched:
        return f"written to since the host booted, before it was held: {_count(counters)}"
    if superblock_digest() != old.closed["superblock_digest"]:
        return "its first or last MiB changed since it was closed: written to under another system, or a snapshot"
    return None


def outside_session(old: VolumeRecord, session_open: bool, counters: WriteCounters) -> str | None:
    """The rule when no receiver is alive: only a session may have written since the last such moment."""
    if old.suspect is not None:
        return old.suspect
    before = WriteCounters.from_dict(old.counters)
    if session_open or not (counters.counted and before.counted):
        return None
    if not counters.same_content(before):
        return f"written to outside of a session: {_growth(before, counters)}"
    return None


def at_handshake(record: Record, ack: Ack | None, hello: Hello) -> str | None:
    """Compare what both sides remember of their last session.

    The standby must remember everything that the source was told; otherwise this host went back
    (a reverted snapshot, a disk that loses flushed writes). And the source must remember every
    session in which it sent this host anything of the same generation, because it notes a
    session before it sends, and within a session nearly every acknowledgement, because it has only so
    many on their way; otherwise the source went back, and its maps with it.
    """
    last, mine = hello.last_session, record.session
    if last is not None:
        if last.epoch > record.epoch:
            return f"this host remembers epoch {record.epoch}, the source epoch {last.epoch}: this host went back"
        if mine is not None and mine["epoch"] == last.epoch and mine["session_id"] != last.session_id:
            return f"both hosts remember epoch {last.epoch} differently"
        noted = (ack.epoch, ack.ack) if ack is not None else (0, 0)
        if last.ack and (last.epoch, last.ack) > noted:
            return (
                f"the source was told that SYNC {last.ack} of epoch {last.epoch} is durable, this host remembers "
                f"only {noted[1]} of epoch {noted[0]}: this host went back"
            )
        if ack is not None and (ack.epoch, ack.session_id) == (last.epoch, last.session_id):
            if ack.ack > last.ack + MAX_SYNCS_UNHEARD:
                return (
                    f"this host acknowledged SYNC {ack.ack} of epoch {ack.epoch}, the source remembers {last.ack}: "
                    "the source went back"
                )
    known = last.epoch if last is not None else 0
    written = record.written
    if written is not None and written["generation_id"] == hello.generation.id and written["epoch"] > known:
        return (
            f"this host was sent data in epoch {written['epoch']}, the source remembers no session after epoch "
            f"{known}: the source went back"
        )
    if ack is not None and ack.generation_id == hello.generation.id and ack.epoch > known:
        return (
            f"this host acknowledged data in epoch {ack.epoch}, the source remembers no session after epoch "
            f"{known}: the source went back"
        )
    return None


def _growth(before: WriteCounters, now: WriteCounters) -> str:
    return (
        f"{now.writes - before.writes} writes, {now.sectors_written - before.sectors_written} sectors, "
        f"{now.discards - before.discards} discards"
    )


def _count(now: WriteCounters) -> str:
    return f"{now.writes} writes, {now.sectors_written} sectors, {now.discards} discards"


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return ", ".join(f"{key} was {before.get(key)}, is {now.get(key)}" for key in keys)
