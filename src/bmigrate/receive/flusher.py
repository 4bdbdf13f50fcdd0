# SPDX-License-Identifier: GPL-3.0-or-later
"""Flush, note, acknowledge: in a thread of its own, so that the next frames are written meanwhile.

The order that matters is in `_flush`: every written volume is flushed, then the note in receive.ack
is durable, and only then the ACK leaves. An ACK that left earlier would let the source clear blocks
that a power cut here can still take back.

Promises: an ACK covers all that was complete when its SYNC came, because the frames before it were
written by then and the flush begins after; of several SYNCs that wait, only the newest is answered,
which covers the others. After the first failure nothing is acknowledged any more, and the session ends
with that failure. It must never write to a volume.
"""

from __future__ import annotations

import logging
import threading

from bmigrate.common import faults
from bmigrate.common.errors import BmigrateError, DefectError, RefusedError
from bmigrate.receive.ackfile import AckFile
from bmigrate.receive.link import Link
from bmigrate.receive.volumes import StandbyVolume
from bmigrate.wire.frames import FrameType

log = logging.getLogger("breceive")


class Flusher:
    """The thread that answers SYNC.

    Args:
        link: the ACK leaves through it, and a failure is reported through it. volumes, acks: of the session.
    """

    def __init__(self, link: Link, volumes: list[StandbyVolume], acks: AckFile) -> None:
        self._link = link
        self._volumes = volumes
        self._acks = acks
        self._cond = threading.Condition()
        self._wanted: tuple[int, int] | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="flusher", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def wanted(self, number: int, seq: int) -> None:
        """A SYNC came: all frames before it are written. Does not wait.

        Args:
            number: of the SYNC. seq: of its frame.
        """
        with self._cond:
            self._wanted = (number, seq)
            self._cond.notify_all()

    def stop(self) -> None:
        """No ACK leaves after this; waits for a flush that is under way."""
        with self._cond:
            self._stopping = True
            self._cond.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while True:
                with self._cond:
                    while self._wanted is None and not self._stopping:
                        self._cond.wait()
                    wanted, self._wanted = self._wanted, None
                    if self._stopping or wanted is None:
                        return
                self._flush(*wanted)
        except BmigrateError as error:
            self._link.fail(error)
        except OSError as error:
            self._link.fail(
                RefusedError(
                    f"the note of the last acknowledgement cannot be written: {error.strerror or error}",
                    hint="is there room under /var/lib/bmigrate?",
                    reason="io_error",
                )
            )
        except Exception as error:
            log.exception("the flusher failed")
            self._link.fail(DefectError(f"flusher: {error!r}", reason="unexpected"))

    def _flush(self, number: int, seq: int) -> None:
        for volume in self._volumes:
            volume.sync()
        faults.point("receive.synced")
        self._acks.note(number)
        faults.point("receive.noted")
        if self._stopping:
            return
        self._link.send(FrameType.ACK, aux=number, offset=seq)
