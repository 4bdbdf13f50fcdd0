# SPDX-License-Identifier: GPL-3.0-or-later
"""A link with delay, for kernels without netem: python3 -m tests.bench.relay DELAY_SECONDS PORT

Listens on a free port of 127.0.0.1, prints it, and carries every connection to PORT of the same address: each byte
leaves so many seconds after it came, in both directions. Both halves of a connection are on the loopback interface,
where TCP has no round trip to wait for: so it is not TCP's window that holds a connection back, as on a link that was
never tuned, but only what the two ends allow each other above it, as ssh does by its channel's window.

Promises: bytes keep their order; what is on its way in one direction of a connection is never more than LIMIT_BYTES;
the end of one direction is delayed like a byte. Must never limit the rate otherwise: LIMIT_BYTES a delay is more than
this machine encrypts.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import sys
import threading
import time

LIMIT_BYTES = 64 << 20
PART_BYTES = 256 << 10


class Direction:
    """One direction of a connection: what was received and is not due yet."""

    def __init__(self, delay_seconds: float, limit_bytes: int = LIMIT_BYTES) -> None:
        self.delay_seconds = delay_seconds
        self.limit_bytes = limit_bytes
        self.on_its_way = 0
        self._parts: collections.deque[tuple[float, bytes]] = collections.deque()
        self._cond = threading.Condition()
        self._broken = False

    def put(self, part: bytes) -> bool:
        """Take in what has come, an empty part for the end; waits for room. False: nobody takes it out any more."""
        with self._cond:
            self._cond.wait_for(lambda: self._broken or self.on_its_way + len(part) <= self.limit_bytes)
            if self._broken:
                return False
            self._parts.append((time.monotonic() + self.delay_seconds, part))
            self.on_its_way += len(part)
            self._cond.notify_all()
        return True

    def get(self) -> bytes:
        """What is due next; waits until it is. Empty at the end."""
        with self._cond:
            self._cond.wait_for(lambda: bool(self._parts))
            due, part = self._parts.popleft()
        rest = due - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        with self._cond:
            self.on_its_way -= len(part)
            self._cond.notify_all()
        return part

    def give_up(self) -> None:
        """Nothing is taken out any more."""
        with self._cond:
            self._broken = True
            self._cond.notify_all()


def _fill(source: socket.socket, way: Direction) -> None:
    while True:
        try:
            part = source.recv(PART_BYTES)
        except OSError:
            part = b""
        if not way.put(part) or not part:
            return


def _empty(way: Direction, target: socket.socket) -> None:
    try:
        while part := way.get():
            target.sendall(part)
    except OSError:
        way.give_up()
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def carry(one: socket.socket, other: socket.socket, delay_seconds: float) -> None:
    """Both directions of a connection, until both have ended."""
    threads = []
    for source, target in ((one, other), (other, one)):
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        way = Direction(delay_seconds)
        threads.append(threading.Thread(target=_fill, args=(source, way), daemon=True))
        threads.append(threading.Thread(target=_empty, args=(way, target), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close()
    other.close()


def serve(listener: socket.socket, port: int, delay_seconds: float) -> None:
    """Carry whatever comes, for ever."""
    while True:
        incoming, _ = listener.accept()
        try:
            outgoing = socket.create_connection(("127.0.0.1", port), 10.0)
        except OSError:
            incoming.close()
            continue
        outgoing.settimeout(None)
        threading.Thread(target=carry, args=(incoming, outgoing, delay_seconds), daemon=True).start()


def main(delay_seconds: float, port: int) -> None:
    """Until killed."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener, port, delay_seconds)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
