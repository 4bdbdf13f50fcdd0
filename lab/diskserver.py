# SPDX-License-Identifier: GPL-3.0-or-later
"""Serves the data disks of one guest to its QEMU over NBD: `python3 -m lab.diskserver DIRECTORY`.

Promises: one process, one thread, so requests of a disk take effect in the order in which they arrive; a disk's raw
file changes only when the guest flushes (see volatile.py), so that killing this process is what a power cut is to a
disk. Listens on disks.sock (NBD, the export is the disk's number) and control.sock (a JSON line in, a JSON line out):

    {"op": "stats"}                                   counters of each disk
    {"op": "flush"}                                   write back everything now
    {"op": "delay", "disk": 2, "write_seconds": 0.1}  answer writes and flushes late
    {"op": "fail", "disk": 2, "command": "flush", "count": 1}   answer the next ones with EIO

Must never: acknowledge a flush before the file has everything that was acknowledged before.
"""

from __future__ import annotations

import errno
import heapq
import json
import os
import selectors
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable

from lab import nbd
from lab.disks import DISKS
from lab.volatile import SECTOR, VolatileDisk

_NAMES = {nbd.READ: "read", nbd.WRITE: "write", nbd.FLUSH: "flush", nbd.TRIM: "trim", nbd.WRITE_ZEROES: "zero"}


class Export:
    """A disk, its counters, and the faults asked for."""

    def __init__(self, disk: VolatileDisk) -> None:
        self.disk = disk
        self.counts = dict.fromkeys(_NAMES.values(), 0)
        self.write_bytes = 0
        self.read_bytes = 0
        self.write_delay_seconds = 0.0
        self.failures = dict.fromkeys(_NAMES.values(), 0)

    def stats(self) -> dict[str, Any]:
        """What the control socket tells of this disk."""
        return {
            **self.counts,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "volatile_bytes": self.disk.volatile_bytes,
            "forced_flushes": self.disk.forced_flushes,
            "failures_left": sum(self.failures.values()),
        }

    def execute(self, request: nbd.Request) -> tuple[int, bytes]:
        """Do one command; returns an errno (0: done) and what was read."""
        name = _NAMES.get(request.command)
        if name is None:
            return errno.EINVAL, b""
        self.counts[name] += 1
        if self.failures[name] > 0:
            self.failures[name] -= 1
            return errno.EIO, b""
        try:
            return 0, self._do(request)
        except ValueError as error:
            print(f"refused: {error}", file=sys.stderr, flush=True)
            return errno.EINVAL, b""
        except OSError as error:
            print(f"failed: {error}", file=sys.stderr, flush=True)
            return errno.EIO, b""

    def _do(self, request: nbd.Request) -> bytes:
        data = b""
        if request.command == nbd.READ:
            self.read_bytes += request.length
            return self.disk.read(request.offset, request.length)
        if request.command == nbd.WRITE:
            self.write_bytes += request.length
            self.disk.write(request.offset, request.data)
        elif request.command in (nbd.TRIM, nbd.WRITE_ZEROES):
            self.disk.zero(request.offset, request.length)
        if request.command == nbd.FLUSH or request.flags & nbd.FUA:
            self.disk.flush()
        return data


class Server:
    """The event loop: connections, late answers, the control socket."""

    def __init__(self, directory: Path) -> None:
        self.exports = {str(d.number): Export(VolatileDisk(str(directory / d.file_name))) for d in DISKS}
        self.sizes = {name: export.disk.size for name, export in self.exports.items()}
        self.selector = selectors.DefaultSelector()
        self.late: list[tuple[float, int, socket.socket, Export, nbd.Request]] = []
        self.sequence = 0
        self._listen(directory / "disks.sock", self._accept_disk)
        self._listen(directory / "control.sock", self._accept_control)

    def _listen(self, path: Path, accept: Callable[[socket.socket], None]) -> None:
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(16)
        self.selector.register(listener, selectors.EVENT_READ, accept)

    def _accept_disk(self, listener: socket.socket) -> None:
        conn, _ = listener.accept()
        conn.settimeout(30)
        try:
            name = nbd.handshake(conn, self.sizes, SECTOR)
        except (nbd.ProtocolError, OSError, EOFError) as error:
            print(f"handshake: {error!r}", file=sys.stderr, flush=True)
            name = None
        if name is None:
            conn.close()
            return
        conn.settimeout(None)
        export = self.exports[name]
        self.selector.register(conn, selectors.EVENT_READ, lambda ready: self._serve(ready, export))

    def _serve(self, conn: socket.socket, export: Export) -> None:
        try:
            request = nbd.read_request(conn)
            if request.command == nbd.DISCONNECT:
                raise EOFError
            delay = export.write_delay_seconds
            if delay > 0 and request.command != nbd.READ:
                self.sequence += 1
                heapq.heappush(self.late, (time.monotonic() + delay, self.sequence, conn, export, request))
                return
            self._answer(conn, export, request)
        except (nbd.ProtocolError, OSError, EOFError):
            self._close(conn)

    def _answer(self, conn: socket.socket, export: Export, request: nbd.Request) -> None:
        error, data = export.execute(request)
        nbd.reply(conn, request.handle, error, data)

    def _close(self, conn: socket.socket) -> None:
        self.selector.unregister(conn)
        self.late = [entry for entry in self.late if entry[2] is not conn]
        heapq.heapify(self.late)
        conn.close()

    def _accept_control(self, listener: socket.socket) -> None:
        conn, _ = listener.accept()
        with conn:
            conn.settimeout(30)
            try:
                line = bytearray()
                while not line.endswith(b"\n"):
                    part = conn.recv(4096)
                    if not part:
                        return
                    line += part
                answer = {"ok": True, "data": self._control(json.loads(line))}
            except (KeyError, TypeError, ValueError, OSError) as error:
                answer = {"ok": False, "error": repr(error)}
            try:
                conn.sendall(json.dumps(answer).encode() + b"\n")
            except OSError as error:
                print(f"control: {error}", file=sys.stderr, flush=True)

    def _control(self, command: dict[str, Any]) -> dict[str, Any]:
        op = command["op"]
        if op == "flush":
            for export in self.exports.values():
                export.disk.flush()
        elif op == "delay":
            self.exports[str(command["disk"])].write_delay_seconds = float(command["write_seconds"])
        elif op == "fail":
            failures = self.exports[str(command["disk"])].failures
            if command["command"] not in failures:
                raise KeyError(command["command"])
            failures[command["command"]] = int(command["count"])
        elif op != "stats":
            raise KeyError(op)
        return {name: export.stats() for name, export in self.exports.items()}

    def run(self) -> None:
        """Serve until the process is told to end."""
        while True:
            timeout = max(0.0, self.late[0][0] - time.monotonic()) if self.late else None
            for key, _ in self.selector.select(timeout):
                key.data(key.fileobj)
            while self.late and self.late[0][0] <= time.monotonic():
                _, _, conn, export, request = heapq.heappop(self.late)
                try:
                    self._answer(conn, export, request)
                except OSError:
                    self._close(conn)


def main() -> int:
    """Entry point; SIGTERM flushes and ends, SIGKILL is a power cut."""
    directory = Path(sys.argv[1])
    os.chdir(directory)
    server = Server(Path("."))

    def orderly(_signal: int, _frame: object) -> None:
        for export in server.exports.values():
            export.disk.flush()
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, orderly)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server.run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
