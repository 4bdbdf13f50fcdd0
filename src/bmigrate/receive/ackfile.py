# SPDX-License-Identifier: GPL-3.0-or-later
"""receive.ack: the durable note of the last SYNC that this standby has acknowledged.

It promises that what `AckFile.note` has returned for survives a power cut, and that a torn write
never looks like a note: two slots are written in turn, each with its own checksum, and the older
one stays whole while the younger is written. The receiver writes it before each ACK leaves; hold
reads it at each handshake, to see whether this host went back in time. Format: docs/on-disk.md.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

from bmigrate.common import atomic, faults, paths

MAGIC = b"BMGA"
SLOT_BYTES = 512
_SLOT = struct.Struct("<4sIQQ16s16s")
_CRC = struct.Struct("<I")


class Ack(NamedTuple):
    """The last acknowledgement: SYNC number `ack` of the session `session_id` of `epoch`.

    `generation_id` is that of the data; both ids are 32 hexadecimal digits.
    """

    epoch: int
    ack: int
    session_id: str
    generation_id: str


def ack_file(workload: str) -> Path:
    """Path of the file."""
    return paths.state_dir(workload) / "receive.ack"


def encode(ack: Ack) -> bytes:
    """One slot of SLOT_BYTES."""
    raw = _SLOT.pack(MAGIC, 1, ack.epoch, ack.ack, bytes.fromhex(ack.session_id), bytes.fromhex(ack.generation_id))
    return (raw + _CRC.pack(zlib.crc32(raw))).ljust(SLOT_BYTES, b"\0")


def decode(raw: bytes) -> Ack | None:
    """The acknowledgement of one slot, or None when the slot is empty or torn."""
    if len(raw) < SLOT_BYTES or zlib.crc32(raw[: _SLOT.size]) != _CRC.unpack_from(raw, _SLOT.size)[0]:
        return None
    magic, version, epoch, number, session, generation = _SLOT.unpack_from(raw)
    if magic != MAGIC or version != 1:
        return None
    return Ack(epoch, number, session.hex(), generation.hex())


def latest(raw: bytes) -> Ack | None:
    """The younger of the whole slots of a file's content."""
    found = [ack for ack in (decode(raw[at : at + SLOT_BYTES]) for at in (0, SLOT_BYTES)) if ack is not None]
    return max(found, default=None)


def read(workload: str) -> Ack | None:
    """The last acknowledgement that is on disk, or None."""
    try:
        return latest(ack_file(workload).read_bytes())
    except FileNotFoundError:
        return None


class AckFile:
    """The file, open for one session.

    Raises: OSError; the session must end then, without the ACK.
    """

    def __init__(self, workload: str, epoch: int, session_id: str, generation_id: str) -> None:
        self._last = Ack(epoch, 0, session_id, generation_id)
        path = ack_file(workload)
        content = path.read_bytes() if path.exists() else b""
        if len(content) != 2 * SLOT_BYTES:
            last = latest(content)
            content = (encode(last) if last else b"").ljust(2 * SLOT_BYTES, b"\0")
            atomic.replace(path, content)
        last = latest(content)
        # The slot that holds the last whole note must not be the next to be overwritten.
        self._slot = 1 if last is not None and decode(content[:SLOT_BYTES]) == last else 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def note(self, number: int) -> None:
        """Make "SYNC `number` is durable here" durable."""
        os.pwrite(self._fd, encode(self._last._replace(ack=number)), self._slot * SLOT_BYTES)
        faults.point("receive.ack_written")
        os.fdatasync(self._fd)
        self._slot ^= 1

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
