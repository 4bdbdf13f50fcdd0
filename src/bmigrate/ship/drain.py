# SPDX-License-Identifier: GPL-3.0-or-later
"""The drain: the last pass, with the workload stopped, and the proof that it left nothing.

Order: barrier, pass until nothing is dirty or claimed, barrier with the same record counts (a new
record means that somebody still writes: a file system that is alive, a lazy unmount), then every
piece that was sent is read back from the standby's device and compared by digest. The caller has
stopped the workload and holds the device exclusively.

Promises: it reports success only when all of this held; when a digest differs the volume becomes
suspect, durably, before anybody is told, and nothing else happens.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Callable

from bmigrate.common import faults
from bmigrate.common.errors import BmigrateError, RefusedError, SuspectError
from bmigrate.ship.ledger import DIGEST_BYTES, Ledger
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.passes import PassResult, run_pass
from bmigrate.ship.session import Session
from bmigrate.ship.source import SourceVolume
from bmigrate.ship.tracker import Snapshot
from bmigrate.wire import frames
from bmigrate.wire.frames import FrameType

MAX_ROUNDS = 3
MAX_PASSES = 20
REREAD_BYTES = 32 << 20
REREAD_PIECES = 4096
REREADS_UNDER_WAY = 4
MISMATCH = "digest_mismatch"
"""Reason of the error of a proof that found something else on the standby."""


def drain(
    session: Session,
    pacer: Pacer,
    run_id: str,
    deadline: float,
    cancelled: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Drain the open session.

    Args:
        run_id: of the handover. deadline: monotonic seconds after which it gives up. cancelled: nobody waits for
            it any more, or the source was told to resume; asked now and then. progress: called with (done, total)
            bytes.

    Returns:
        {bytes_left_at_start, bytes_shipped, zero_bytes, passes, seconds, barrier_seconds, reread_seconds,
        reread_bytes, digest, epoch}.

    Raises:
        SuspectError: a volume is suspect.
        RefusedError: reason ``still_written``, ``digest_mismatch``, ``drain_timeout`` or ``cancelled``.
        BmigrateError: the session is over.
    """
    began = time.monotonic()
    ledger = Ledger()
    total = PassResult()
    passes = 0
    barrier_seconds = 0.0

    def barrier() -> dict[str, int]:
        nonlocal barrier_seconds
        at = time.monotonic()
        counts = session.barrier(drain=run_id)
        barrier_seconds += time.monotonic() - at
        return counts

    def check() -> None:
        if cancelled():
            raise RefusedError("the drain was given up", hint="begin a new handover", reason="cancelled")
        if time.monotonic() > deadline:
            raise RefusedError(
                "the drain took longer than it may",
                hint="wait until the workload is in step and try again, or raise limits.max_downtime_seconds",
                reason="drain_timeout",
            )

    counts = barrier()
    left = _trusted(session).left_bytes  # after the barrier: what the unmount wrote is counted too
    faults.point("ship.drain_barrier")
    for _ in range(MAX_ROUNDS):
        passes += _until_clean(session, pacer, ledger, total, check, lambda: progress(total.data_bytes, left))
        faults.point("ship.drain_clean")
        again = barrier()
        if again == counts and not _trusted(session).left_bytes:
            break
        counts = again
    else:
        raise _still_written(session, "new writes were recorded during the drain")
    reread_at = time.monotonic()
    _prove(session, ledger, check)
    now = time.monotonic()
    return {
        "bytes_left_at_start": left,
        "bytes_shipped": total.data_bytes + total.zero_bytes,
        "zero_bytes": total.zero_bytes,
        "passes": passes,
        "seconds": now - began,
        "barrier_seconds": barrier_seconds,
        "reread_seconds": now - reread_at,
        "reread_bytes": ledger.total_bytes(),
        "digest": ledger.digest(),
        "epoch": session.epoch,
    }


def _trusted(session: Session) -> Snapshot:
    """breqd's view, of volumes that nobody suspects.

    Raises:
        SuspectError: a volume is suspect, here or on the standby.
    """
    snapshot = session.snapshot()
    for name, reason in {**session.standby_suspects, **snapshot.suspects}.items():
        raise SuspectError(
            f"a drain needs a volume that is in step; this one is suspect: {reason}",
            volume=name,
            hint="let the resync finish: bmigrate sync --wait",
            reason="suspect",
        )
    return snapshot


def _until_clean(
    session: Session,
    pacer: Pacer,
    ledger: Ledger,
    total: PassResult,
    check: Callable[[], None],
    progress: Callable[[], None],
) -> int:
    """Passes until breqd has nothing dirty and nothing claimed; returns how many."""
    left = session.snapshot().left_bytes
    for number in range(1, MAX_PASSES + 1):
        check()
        result = run_pass(session, pacer, _never_interrupted(check), ledger, left_bytes=left)
        total.data_bytes += result.data_bytes
        total.zero_bytes += result.zero_bytes
        session.settle()
        progress()
        left = session.snapshot().left_bytes
        if not left:
            return number
    raise _still_written(session, f"after {MAX_PASSES} passes there was something dirty again")


def _never_interrupted(check: Callable[[], None]) -> Callable[[], bool]:
    """For a walk: raise when it must end, never end it early."""

    def interrupted() -> bool:
        check()
        return False

    return interrupted


def _still_written(session: Session, what: str) -> RefusedError:
    return RefusedError(
        f"{what}: something still writes to a volume of workload {session.config.workload}",
        hint="find who writes: a file system that is still mounted in another namespace, or a process on the device",
        reason="still_written",
    )


def _prove(session: Session, ledger: Ledger, check: Callable[[], None]) -> None:
    """Read every piece back from the standby's device and compare its digest with that of what was sent."""
    volumes = {volume.name: volume for volume in session.volumes}
    under_way: deque[tuple[SourceVolume, list[tuple[int, int, bytes]]]] = deque()

    def finish_oldest() -> None:
        volume, batch = under_way.popleft()
        answer = session.answer()
        for number, (offset, length, digest) in enumerate(batch):
            if answer[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES] != digest:
                raise _mismatch(session, volume, offset, length)

    try:
        for name in ledger.volumes():
            for batch in ledger.batches(name, REREAD_BYTES, REREAD_PIECES):
                check()
                under_way.append((volumes[name], batch))
                session.request(
                    FrameType.REREAD,
                    FrameType.DIGESTS,
                    len(batch),
                    volume=volumes[name].index,
                    payload=frames.encode_extents([(offset, length) for offset, length, _ in batch]),
                )
                if len(under_way) > REREADS_UNDER_WAY:
                    finish_oldest()
        while under_way:
            finish_oldest()
    except BmigrateError as error:
        # Whatever ended the proof: no other proof looks at these pieces, so what has come is judged.
        why = error
        while under_way and session.answered:
            try:
                finish_oldest()
            except BmigrateError as worse:
                why = worse
        raise why from error.__cause__


def _mismatch(session: Session, volume: SourceVolume, offset: int, length: int) -> RefusedError:
    """The blocks are clean in breqd and wrong on the standby: only suspicion keeps the invariant, so it comes first."""
    reason = f"the standby read back something else than was sent to bytes {offset} to {offset + length}"
    session.distrust(volume.name, f"drain: {reason}")
    return RefusedError(
        reason,
        volume=volume.name,
        host=session.config.peer.name,
        hint="check the standby's disk and memory; the source stays primary, and the volume is compared by checksum",
        reason=MISMATCH,
    )
