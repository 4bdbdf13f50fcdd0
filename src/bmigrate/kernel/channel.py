# SPDX-License-Identifier: GPL-3.0-or-later
"""Reading the log: /dev/bufflink/reqlog.

Promises that nothing is forgotten by the kernel before `consumed` was called, and that a batch which was read and not
consumed comes again, in this process or the next. It must never call `consumed` on its own.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bmigrate.kernel import abi, device, errors

if TYPE_CHECKING:
    import numpy


@dataclass(frozen=True)
class Batch:
    """Records that were handed out together.

    seq: number for `consumed`. records: NumPy structured array with the fields sector (512 bytes, absolute on the
    whole disk), nr_sectors, slot, op, flags; it is a copy of its own and may be kept. again: it was handed out before,
    to this reader or an earlier one. widened: some records come from the overflow.
    """

    seq: int
    records: numpy.ndarray[Any, numpy.dtype[numpy.void]]
    again: bool
    widened: bool


@dataclass(frozen=True)
class Barrier:
    """A point in the log. Good for the channel it was taken from, as long as the module stays loaded."""

    channel_id: int
    sweep: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class ChannelInfo:
    """What the channel is made of: channel_id is random and new with each load of the module."""

    channel_id: int
    batch_records: int
    rings: int
    ring_records: int
    ring_limit: int


@dataclass(frozen=True)
class ChannelStats:
    """Counters since the module was loaded; their meaning is in module_src/uapi/bufflink.h."""

    produced: int
    overflowed: int
    waiting: int
    widened: int
    batches: int
    handed: int
    repeated: int
    consumed: int
    consumed_records: int
    sweeps_started: int
    sweeps_done: int
    pending_seq: int
    pending_count: int
    overflow_waiting: int


class Channel(device.Handle):
    """The one reader of the log. Closing it lets a batch that was not consumed go to the next reader.

    The file is non-blocking: wait with poll() on fileno(). Opening raises NotLoaded, AbiMismatch, Busy, or KernelError
    with code permission.
    """

    def __init__(self, path: str = abi.CHANNEL_PATH) -> None:
        self.path = path
        self._fd = device.open_checked(
            path, os.O_RDONLY | os.O_NONBLOCK, "bufflink", abi.BUFFLINK_IOC_ABI, abi.BUFFLINK_ABI
        )
        try:
            self.info = self._read_info()
            if self._record_bytes != abi.RECORD_BYTES:
                raise errors.abi_mismatch("bufflink", self._record_bytes, abi.RECORD_BYTES)
        except BaseException:
            self.close()
            raise
        self._buffer = bytearray(ctypes.sizeof(abi.BatchHeader) + self.info.batch_records * abi.RECORD_BYTES)

    def read_batch(self, max_records: int = 0) -> Batch | None:
        """The next batch, or the one that was read and not consumed; None if there is nothing.

        Args: max_records: a new batch has no more than so many (at least 2); 0: as many as the kernel gives. A batch
        that was made before comes whole, whatever its size. Raises KernelError.
        """
        import numpy

        room = self.info.batch_records if max_records <= 0 else max(2, min(max_records, self.info.batch_records))
        count = self._read(room)
        if count is None:
            return None
        header = abi.BatchHeader.from_buffer_copy(self._buffer)
        header_bytes = ctypes.sizeof(header)
        if count != header_bytes + header.count * abi.RECORD_BYTES:
            raise errors.KernelError(
                f"{self.path}: a batch of {header.count} records has {count} bytes",
                errnos.EPROTO,
                code="abi_mismatch",
                hint="load the module of this release",
            )
        records = numpy.frombuffer(
            self._buffer, dtype=numpy.dtype(abi.RECORD_FIELDS), count=header.count, offset=header_bytes
        ).copy()
        return Batch(header.seq, records, bool(header.flags & abi.BATCH_AGAIN), bool(header.flags & abi.BATCH_WIDENED))

    def _read(self, room: int) -> int | None:
        for records in (room, self.info.batch_records):
            view = memoryview(self._buffer)[: ctypes.sizeof(abi.BatchHeader) + records * abi.RECORD_BYTES]
            try:
                return os.readv(self._fd, [view])
            except BlockingIOError:
                return None
            except OSError as error:
                # A batch that an earlier read made larger: it comes whole or not at all.
                if error.errno != errnos.EMSGSIZE or records == self.info.batch_records:
                    raise errors.unexpected(f"cannot read {self.path}", error) from error
            finally:
                view.release()
        raise AssertionError("the last read either returns or raises")

    def consumed(self, seq: int) -> None:
        """Tell the kernel that batch `seq` is safe; it forgets the records. Raises StaleBatch, KernelError."""
        self._call(abi.BUFFLINK_IOC_CONSUMED, ctypes.c_uint64(seq), f"cannot consume batch {seq}")

    def barrier(self) -> Barrier:
        """The point in the log after everything that has completed by now. Never waits. Raises KernelError."""
        positions = (ctypes.c_uint64 * self.info.rings)()
        request = abi.BufflinkBarrier(rings=self.info.rings, positions=ctypes.addressof(positions))
        self._call(abi.BUFFLINK_IOC_BARRIER, request, "cannot take a barrier")
        return Barrier(request.channel_id, request.sweep, tuple(positions))

    def passed(self, barrier: Barrier) -> bool:
        """Whether everything before the barrier, overflow included, has been consumed.

        Raises StaleBatch for a barrier of another channel: the module was loaded anew since. KernelError.
        """
        positions = (ctypes.c_uint64 * len(barrier.positions))(*barrier.positions)
        request = abi.BufflinkBarrier(
            channel_id=barrier.channel_id,
            sweep=barrier.sweep,
            rings=len(barrier.positions),
            positions=ctypes.addressof(positions),
        )
        return bool(self._call(abi.BUFFLINK_IOC_PASSED, request, "cannot ask for a barrier"))

    def stats(self) -> ChannelStats:
        """Counters of the channel. Raises KernelError."""
        raw = abi.BufflinkStats()
        self._call(abi.BUFFLINK_IOC_STATS, raw, "cannot read the counters")
        return ChannelStats(**{name: getattr(raw, name) for name, *_ in raw._fields_})

    def _read_info(self) -> ChannelInfo:
        raw = abi.BufflinkInfo()
        self._call(abi.BUFFLINK_IOC_INFO, raw, "cannot read what the channel is made of")
        self._record_bytes = int(raw.record_bytes)
        return ChannelInfo(raw.channel_id, raw.batch_records, raw.rings, raw.ring_records, raw.ring_limit)

    def _call(self, number: int, payload: Any, what: str) -> int:
        try:
            return device.call(self._fd, number, payload)
        except OSError as error:
            if error.errno == errnos.ESTALE:
                raise errors.StaleBatch(
                    f"{self.path}: {what}: it was not handed to this reader",
                    errnos.ESTALE,
                    hint="read again; what is not consumed comes again",
                ) from error
            raise errors.unexpected(f"{self.path}: {what}", error) from error
