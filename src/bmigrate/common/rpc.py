# SPDX-License-Identifier: GPL-3.0-or-later
"""The local sockets: 4 bytes of length, little-endian, then one JSON object.

A request is {v, id, op, ...}; its answer is {v, id, ok: true, ...} or {v, id, ok: false, error}.
The server never blocks on a slow client and answers root only; a handler may answer later
(``LATER``). The codec is pure. Nothing here knows what an operation means.
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import stat
import struct
from pathlib import Path
from typing import Any, Callable, Union

from bmigrate.common import errors
from bmigrate.common.errors import BmigrateError, DefectError, RefusedError, UnreachableError, UsageError

VERSION = 1
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_LENGTH = struct.Struct("<I")
_UCRED = struct.Struct("3i")


class _Later:
    """Type of ``LATER``."""


LATER = _Later()


def encode(message: dict[str, Any]) -> bytes:
    """One message as bytes.

    Raises:
        DefectError: longer than MAX_MESSAGE_BYTES.
    """
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > MAX_MESSAGE_BYTES:
        raise DefectError(f"message of {len(body)} bytes is over the limit of {MAX_MESSAGE_BYTES}", reason="too_long")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Incremental decoder: feed bytes in any pieces, get whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """Add bytes and return the messages that are now complete.

        Raises:
            UsageError: a length over the limit, or something that is not a JSON object.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_MESSAGE_BYTES:
                raise UsageError(f"message of {length} bytes is over the limit", reason="bad_message")
            if len(self._buffer) < 4 + length:
                break
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            try:
                message = json.loads(body)
            except (ValueError, RecursionError) as exc:
                raise UsageError(f"message is not JSON: {exc}", reason="bad_message") from exc
            if not isinstance(message, dict):
                raise UsageError("message is not a JSON object", reason="bad_message")
            messages.append(message)
        return messages


class Client:
    """A blocking client of one of our sockets.

    Args:
        path: the socket.
        timeout_seconds: for each call; ``None`` waits for ever.

    Raises:
        UnreachableError: nobody listens, or no answer in time.
    """

    def __init__(self, path: str | Path, timeout_seconds: float | None = 30.0) -> None:
        self.path = Path(path)
        self._next_id = 0
        self._decoder = Decoder()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(str(self.path))
        except OSError as exc:
            self._socket.close()
            raise self._gone(exc) from exc

    def _gone(self, why: object) -> UnreachableError:
        service = {"breqd": "breqd", "hold": "bmigrate-hold", "ship": "bmigrate-ship"}.get(
            self.path.stem, self.path.stem
        )
        return UnreachableError(
            f"no answer from {self.path.name}: {why}", hint=f"see: systemctl status {service}", reason="daemon_down"
        )

    def fileno(self) -> int:
        """The descriptor, to poll for the end of the connection."""
        return self._socket.fileno()

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            BmigrateError: the error that the other side answered.
            UnreachableError: connection lost or timed out; whether the operation was done is unknown.
        """
        self._next_id += 1
        request = {"v": VERSION, "id": self._next_id, "op": op}
        request.update(fields)
        try:
            self._socket.sendall(encode(request))
            while True:
                data = self._socket.recv(1 << 16)
                if not data:
                    raise self._gone("connection closed")
                for answer in self._decoder.feed(data):
                    if answer.get("id") != self._next_id:
                        continue  # the late answer to an earlier call that timed out
                    if answer.get("ok"):
                        return answer
                    raise errors.from_dict(answer.get("error") or {})
        except OSError as exc:
            raise self._gone(exc) from exc

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def call(path: str | Path, op: str, timeout_seconds: float | None = 30.0, **fields: Any) -> dict[str, Any]:
    """Connect, call once, close."""
    with Client(path, timeout_seconds) as client:
        return client.call(op, **fields)


class Connection:
    """One client of a Server.

    Attributes:
        peer_pid: process id of the client, from the kernel (SO_PEERCRED).
        on_close: callables without arguments, run once when the connection ends.
    """

    def __init__(self, server: Server, sock: socket.socket, peer_pid: int) -> None:
        self.server = server
        self.sock = sock
        self.peer_pid = peer_pid
        self.on_close: list[Callable[[], None]] = []
        self.closed = False
        self._decoder = Decoder()
        self._out = bytearray()

    def reply(self, request: dict[str, Any], fields: dict[str, Any] | None = None) -> None:
        """Answer a request with success; nothing happens when the client is gone."""
        answer: dict[str, Any] = {"v": VERSION, "id": request.get("id"), "ok": True}
        answer.update(fields or {})
        self._send(answer)

    def fail(self, request: dict[str, Any], error: BmigrateError) -> None:
        """Answer a request with an error; nothing happens when the client is gone."""
        self._send({"v": VERSION, "id": request.get("id"), "ok": False, "error": error.to_dict()})

    def close(self) -> None:
        """End the connection and run ``on_close``."""
        if self.closed:
            return
        self.closed = True
        self.server.forget(self)
        for callback in self.on_close:
            callback()
        self.on_close.clear()

    def _send(self, message: dict[str, Any]) -> None:
        if self.closed:
            return
        self._out += encode(message)
        self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                sent = self.sock.send(self._out)
                del self._out[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self.close()
            return
        self.server.interest(self, bool(self._out))

    def ready(self, mask: int) -> None:
        """Called by the loop when the socket is readable or writable."""
        if mask & selectors.EVENT_WRITE:
            self._flush()
        if self.closed or not mask & selectors.EVENT_READ:
            return
        try:
            data = self.sock.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        try:
            requests = self._decoder.feed(data)
        except UsageError as error:
            self.fail({}, error)
            self.close()
            return
        for request in requests:
            self.server.dispatch(self, request)


Handler = Callable[[Connection, dict[str, Any]], Union[dict[str, Any], _Later, None]]


class Server:
    """A listening socket driven by the caller's selector.

    Register nothing yourself: the server registers its sockets in ``selector`` with a callable
    ``data`` that takes the event mask; the loop is
    ``for key, mask in selector.select(t): key.data(mask)``.

    Args:
        path: the socket; its directory is created; a stale socket is replaced.
        handler: called for each request; returns the answer's fields, or LATER.
        selector: the loop's selector.
        mode: permissions of the socket.
    """

    def __init__(self, path: str | Path, handler: Handler, selector: selectors.BaseSelector, mode: int = 0o600) -> None:
        self.path = Path(path)
        self.handler = handler
        self.selector = selector
        self.connections: list[Connection] = []
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        try:
            if stat.S_ISSOCK(os.lstat(self.path).st_mode):
                os.unlink(self.path)
        except FileNotFoundError:
            pass
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        mask = os.umask(0o777 & ~mode)
        try:
            self.sock.bind(str(self.path))
        finally:
            os.umask(mask)
        self.sock.listen(64)
        selector.register(self.sock, selectors.EVENT_READ, self._accept)

    def _accept(self, _mask: int) -> None:
        try:
            sock, _ = self.sock.accept()
        except OSError as exc:
            if exc.errno in (errno.EAGAIN, errno.ECONNABORTED, errno.EMFILE):
                return
            raise
        sock.setblocking(False)
        pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        connection = Connection(self, sock, pid)
        if uid not in (0, os.geteuid()):
            sock.close()
            return
        self.connections.append(connection)
        self.selector.register(sock, selectors.EVENT_READ, connection.ready)

    def interest(self, connection: Connection, writing: bool) -> None:
        """Watch a connection for writability, or no longer."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
        if self.selector.get_key(connection.sock).events != events:
            self.selector.modify(connection.sock, events, connection.ready)

    def forget(self, connection: Connection) -> None:
        """Drop a connection from the loop and close its socket."""
        self.selector.unregister(connection.sock)
        self.connections.remove(connection)
        connection.sock.close()

    def dispatch(self, connection: Connection, request: dict[str, Any]) -> None:
        """Run the handler for one request and answer it."""
        if request.get("v") != VERSION:
            connection.fail(request, UsageError(f"protocol version {request.get('v')} is not {VERSION}"))
            return
        try:
            result = self.handler(connection, request)
        except BmigrateError as error:
            connection.fail(request, error)
            return
        except (KeyError, TypeError, ValueError) as exc:
            connection.fail(request, UsageError(f"bad request {request.get('op')!r}: {exc!r}", reason="bad_request"))
            return
        except OSError as exc:
            connection.fail(request, RefusedError(f"{request.get('op')!r} failed: {exc}", reason="os_error"))
            return
        if isinstance(result, _Later):
            return
        connection.reply(request, result)

    def close(self) -> None:
        """Stop listening and drop all clients; the socket file goes too."""
        for connection in list(self.connections):
            connection.close()
        self.selector.unregister(self.sock)
        self.sock.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
