# SPDX-License-Identifier: GPL-3.0-or-later
"""The part of the NBD protocol that QEMU speaks as a client: fixed newstyle handshake, simple replies.

Written from the protocol's public description (doc/proto.md of the NBD project). Promises: an option or command that
is not known is answered as the protocol says, never guessed. Knows nothing of disks.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_MAGIC = 0x4E42444D41474943
_OPTION_MAGIC = 0x49484156454F5054
_REPLY_MAGIC = 0x3E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_REPLY_MAGIC = 0x67446698

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPT_EXPORT_NAME, _OPT_ABORT, _OPT_INFO, _OPT_GO = 1, 2, 6, 7
_REP_ACK, _REP_INFO = 1, 3
_REP_ERR_UNSUPPORTED, _REP_ERR_UNKNOWN = (1 << 31) + 1, (1 << 31) + 6
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3

READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
_EXPORT_FLAGS = 1 | (1 << 2) | (1 << 3) | (1 << 5) | (1 << 6)  # flush, FUA, trim, write-zeroes

_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
MAX_PAYLOAD = 32 << 20


class ProtocolError(Exception):
    """The client said something that no NBD client says."""


@dataclass
class Request:
    """One command; offset and length in bytes."""

    flags: int
    command: int
    handle: int
    offset: int
    length: int
    data: bytearray


def receive(conn: socket.socket, count: int) -> bytearray:
    """Exactly `count` bytes.

    Raises:
        EOFError: the client went away.
    """
    buffer = bytearray(count)
    view = memoryview(buffer)
    got = 0
    while got < count:
        part = conn.recv_into(view[got:])
        if part == 0:
            raise EOFError
        got += part
    return buffer


def _option_reply(conn: socket.socket, option: int, kind: int, data: bytes = b"") -> None:
    conn.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, kind, len(data)) + data)


def handshake(conn: socket.socket, sizes: dict[str, int], block_bytes: int) -> str | None:
    """Negotiate until the client picks an export; `sizes` gives the exports and their bytes.

    Returns:
        The export's name, or None when the client only asked.

    Raises:
        ProtocolError, EOFError: the client is not an NBD client, or left.
    """
    conn.sendall(struct.pack(">QQH", _MAGIC, _OPTION_MAGIC, _FIXED_NEWSTYLE | _NO_ZEROES))
    (client_flags,) = struct.unpack(">I", receive(conn, 4))
    while True:
        magic, option, length = struct.unpack(">QII", receive(conn, 16))
        if magic != _OPTION_MAGIC or length > 65536:
            raise ProtocolError(f"option magic {magic:#x}, length {length}")
        data = receive(conn, length)
        if option == _OPT_ABORT:
            _option_reply(conn, option, _REP_ACK)
            return None
        if option == _OPT_EXPORT_NAME:
            name = data.decode()
            if name not in sizes:
                raise ProtocolError(f"no export {name!r}")
            padding = b"" if client_flags & _NO_ZEROES else bytes(124)
            conn.sendall(struct.pack(">QH", sizes[name], _EXPORT_FLAGS) + padding)
            return name
        if option not in (_OPT_INFO, _OPT_GO):
            _option_reply(conn, option, _REP_ERR_UNSUPPORTED)
            continue
        (name_length,) = struct.unpack_from(">I", data)
        name = data[4 : 4 + name_length].decode()
        if name not in sizes:
            _option_reply(conn, option, _REP_ERR_UNKNOWN)
            continue
        _option_reply(conn, option, _REP_INFO, struct.pack(">HQH", _INFO_EXPORT, sizes[name], _EXPORT_FLAGS))
        limits = struct.pack(">HIII", _INFO_BLOCK_SIZE, block_bytes, 4096, MAX_PAYLOAD)
        _option_reply(conn, option, _REP_INFO, limits)
        _option_reply(conn, option, _REP_ACK)
        if option == _OPT_GO:
            return name


def read_request(conn: socket.socket) -> Request:
    """The next command, with its data.

    Raises:
        ProtocolError, EOFError: garbage, or the client left.
    """
    magic, flags, command, handle, offset, length = _REQUEST.unpack(receive(conn, _REQUEST.size))
    if magic != _REQUEST_MAGIC:
        raise ProtocolError(f"request magic {magic:#x}")
    if command in (READ, WRITE) and length > MAX_PAYLOAD:
        raise ProtocolError(f"{length} bytes in one command")
    data = receive(conn, length) if command == WRITE else bytearray()
    return Request(flags, command, handle, offset, length, data)


def reply(conn: socket.socket, handle: int, error: int = 0, data: bytes = b"") -> None:
    """Answer the command `handle` with an errno (0: done) and what was read."""
    conn.sendall(_REPLY.pack(_SIMPLE_REPLY_MAGIC, error, handle) + data)
