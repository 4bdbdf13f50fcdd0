# SPDX-License-Identifier: GPL-3.0-or-later
"""ship.json and ship.ack: what this side remembers of the last session, and what the operator paused.

Promises: the acknowledgement number is stored *before* breqd is told to clear the claims that it
covers. At the next handshake a standby whose own record is behind this one has lost acknowledged
data (a reverted snapshot, a restored disk) and becomes suspect; were the order reversed, a kill
between the two steps could hide exactly that.

ship.json holds the session and is replaced durably when one opens. The number changes many times
a second, so it is 24 bytes overwritten in place in ship.ack: {u64 epoch, u64 number, u32 crc32,
u32 0}, little-endian. It is not fsynced: it survives a kill of the daemon, and a crash of the host makes
the volumes suspect anyway.
"""

from __future__ import annotations

import os
import struct
import threading
import zlib
from typing import Any

from bmigrate.common import atomic, paths

SCHEMA = 1
_ACK = struct.Struct("<QQI4x")


class Record:
    """What one workload's shipper remembers.

    Attributes:
        session: {epoch, session_id} of the last session, or None.
        ack: number of the last SYNC acknowledged in it.
        damaged: the number could not be read back; every volume must be taken for suspect.
        paused: set by the operator, kept over restarts.
        bandwidth: bytes per second set by the operator in place of the configuration's, 0: no limit; or None.
        seeded: volume -> number of the seed that was completely shipped once.
        resyncs: volume -> breqd's id of a resync that was begun and not finished. Only a hint: breqd says whether an id
            still stands for anything, so one that is lost or stale costs a comparison and proves nothing.

    Raises:
        DefectError: ship.json is damaged.
    """

    def __init__(self, workload: str) -> None:
        directory = paths.state_dir(workload)
        self.path = directory / "ship.json"
        self.ack_path = directory / "ship.ack"
        stored = atomic.read_json(self.path, {})
        self.session: dict[str, Any] | None = stored.get("session")
        self.paused = bool(stored.get("paused", False))
        bandwidth = stored.get("bandwidth_bytes_per_second")
        self.bandwidth: int | None = None if bandwidth is None else int(bandwidth)
        self.seeded: dict[str, int] = {str(name): int(count) for name, count in stored.get("seeded", {}).items()}
        self.resyncs: dict[str, str] = {str(name): str(key) for name, key in stored.get("resyncs", {}).items()}
        self.ack = 0
        self.damaged = False
        self._fd: int | None = None
        self._lock = threading.Lock()
        if self.session is not None:
            self._read_ack(int(self.session["epoch"]))

    def _read_ack(self, epoch: int) -> None:
        try:
            raw = self.ack_path.read_bytes()
        except FileNotFoundError:
            return
        if len(raw) != _ACK.size:
            self.damaged = True
            return
        stored_epoch, number, crc = _ACK.unpack(raw)
        if crc != zlib.crc32(raw[:16]):
            self.damaged = True
        elif stored_epoch == epoch:
            self.ack = number

    def change(self, **fields: Any) -> None:
        """Other values of ``session``, ``paused``, ``bandwidth``, ``seeded`` or ``resyncs``: durable, and only then
        believed here; from any thread (a pause comes from another one than a session).

        In this order, because whoever is told that a change failed tries again, and a value that is here and not on
        disk would be answered as unchanged and be lost with this process.

        Raises:
            OSError: the disk is full or fails; nothing has changed here.
        """
        with self._lock:
            atomic.make_directory(self.path.parent)
            kept = {name: fields.get(name, getattr(self, name)) for name in ("session", "paused", "seeded")}
            content = {"schema": SCHEMA, **kept}
            bandwidth = fields.get("bandwidth", self.bandwidth)
            if bandwidth is not None:
                content["bandwidth_bytes_per_second"] = bandwidth
            resyncs = fields.get("resyncs", self.resyncs)
            if resyncs:
                content["resyncs"] = resyncs
            atomic.replace_json(self.path, content)
            for name, value in fields.items():
                setattr(self, name, value)

    def last_session(self) -> dict[str, Any] | None:
        """For HELLO: {epoch, session_id, ack}, or None before the first session."""
        return None if self.session is None else {**self.session, "ack": self.ack}

    def opened(self, epoch: int, session_id: str) -> None:
        """A session was opened; durable. ship.json first: a number is believed only for the epoch it names."""
        self.change(session={"epoch": epoch, "session_id": session_id})
        self.damaged = False
        self.acked(0)

    def acked(self, number: int) -> None:
        """SYNC ``number`` of the session was acknowledged; call before breqd clears anything."""
        assert self.session is not None
        with self._lock:
            self.ack = number
            if self.damaged:
                return  # what is distrusted stays so until a session has begun, whoever acknowledges meanwhile
            raw = struct.pack("<QQ", int(self.session["epoch"]), number)
            self._put(_ACK.pack(int(self.session["epoch"]), number, zlib.crc32(raw)))

    def distrust(self) -> None:
        """Nothing that was acknowledged is believed any more: the next session begins as with a damaged number.

        Also the next one of another process: what is in ship.ack then is no number. From any thread.
        """
        with self._lock:
            self.damaged = True
            self._put(b"\xff" * _ACK.size)

    def _put(self, content: bytes) -> None:
        if self._fd is None:
            self._fd = os.open(self.ack_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.pwrite(self._fd, content, 0)

    def close(self) -> None:
        """Close the file of the number."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
