# SPDX-License-Identifier: GPL-3.0-or-later
"""The disk server as its own process: NBD by the book, and what SIGKILL, SIGTERM and faults do to the files."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import nbd, qemu, wait
from lab.disks import DISKS

REPOSITORY = Path(__file__).resolve().parents[2]
DISK = DISKS[3]


class Client:
    """A minimal NBD client for one export."""

    def __init__(self, directory: Path, export: int) -> None:
        self.conn = qemu.connect(directory / "disks.sock")
        self.conn.settimeout(20)
        nbd.receive(self.conn, 18)
        self.conn.sendall(struct.pack(">I", 3))
        self.size = 0
        self.flags = 0
        name = str(export).encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self.conn.sendall(struct.pack(">QII", 0x49484156454F5054, 7, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", nbd.receive(self.conn, 20))
            body = bytes(nbd.receive(self.conn, length))
            if kind == 3 and body[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", body[2:])
            if kind != 3:
                assert kind == 1, f"option refused: {kind:#x}"
                break

    def call(
        self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0
    ) -> tuple[int, bytes]:
        """One command; returns its errno and what was read."""
        length = length or len(data)
        self.conn.sendall(struct.pack(">IHHQQI", 0x25609513, flags, command, 77, offset, length) + data)
        magic, error, handle = struct.unpack(">IIQ", nbd.receive(self.conn, 16))
        assert (magic, handle) == (0x67446698, 77)
        read = bytes(nbd.receive(self.conn, length)) if command == nbd.READ and not error else b""
        return error, read


def _control(directory: Path, command: dict[str, Any]) -> dict[str, Any]:
    with qemu.connect(directory / "control.sock") as conn:
        conn.settimeout(20)
        conn.sendall(json.dumps(command).encode() + b"\n")
        answer: dict[str, Any] = json.loads(conn.makefile().readline())
        return answer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A running server over fresh disks."""
    for disk in DISKS:
        with (tmp_path / disk.file_name).open("wb") as file:
            file.truncate(disk.size_bytes)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-m", "lab.diskserver", str(tmp_path)], env=environment)

    def listening() -> bool:
        assert process.poll() is None
        try:
            qemu.connect(tmp_path / "control.sock").close()
        except OSError:
            return False
        return True

    wait(listening, 20, "the disk server", 0.05)
    yield tmp_path, process
    process.kill()
    process.wait(20)


def test_killing_it_loses_exactly_what_was_not_flushed(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, process = server
    client = Client(directory, DISK.number)
    assert client.size == DISK.size_bytes
    assert client.call(nbd.WRITE, 0, data=b"K" * 4096) == (0, b"")
    assert client.call(nbd.FLUSH) == (0, b"")
    assert client.call(nbd.WRITE, 4096, data=b"L" * 4096) == (0, b"")
    assert client.call(nbd.WRITE, 0, data=b"M" * 512) == (0, b"")
    assert client.call(nbd.READ, 0, 8192) == (0, b"M" * 512 + b"K" * 3584 + b"L" * 4096)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert (directory / DISK.file_name).read_bytes()[:8192] == b"K" * 4096 + bytes(4096)


def test_ending_it_in_good_order_loses_nothing(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, process = server
    assert Client(directory, DISK.number).call(nbd.WRITE, 512, data=b"N" * 512) == (0, b"")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert (directory / DISK.file_name).read_bytes()[:1024] == bytes(512) + b"N" * 512


def test_discard_and_write_zeroes_read_as_zeros_and_take_no_room(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, _ = server
    client = Client(directory, DISK.number)
    assert client.flags & (1 << 5) and client.flags & (1 << 6)
    client.call(nbd.WRITE, 0, data=b"P" * 262144)
    client.call(nbd.FLUSH)
    full = (directory / DISK.file_name).stat().st_blocks
    assert client.call(nbd.TRIM, 0, 131072) == (0, b"")
    assert client.call(nbd.WRITE_ZEROES, 131072, 65536) == (0, b"")
    expected = bytes(196608) + b"P" * 65536
    assert client.call(nbd.READ, 0, 262144) == (0, expected)
    assert client.call(nbd.FLUSH) == (0, b"")
    assert (directory / DISK.file_name).read_bytes()[:262144] == expected
    assert (directory / DISK.file_name).stat().st_blocks == full - 196608 // 512


def test_a_write_with_fua_is_durable_when_answered(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, process = server
    assert Client(directory, DISK.number).call(nbd.WRITE, 0, data=b"F" * 512, flags=nbd.FUA) == (0, b"")
    process.kill()
    process.wait(20)
    assert (directory / DISK.file_name).read_bytes()[:512] == b"F" * 512


def test_a_failing_flush_is_told_and_keeps_the_data_volatile(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, _ = server
    client = Client(directory, DISK.number)
    fail = {"op": "fail", "disk": DISK.number, "command": "flush", "count": 1}
    assert _control(directory, fail)["ok"]
    client.call(nbd.WRITE, 0, data=b"G" * 512)
    assert client.call(nbd.FLUSH) == (5, b"")
    assert (directory / DISK.file_name).read_bytes()[:512] == bytes(512)
    assert client.call(nbd.FLUSH) == (0, b"")
    assert (directory / DISK.file_name).read_bytes()[:512] == b"G" * 512


def test_nonsense_is_refused_and_the_others_are_served_on(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, process = server
    good, bad = Client(directory, 1), Client(directory, 2)
    assert good.call(nbd.WRITE, 1, data=b"x" * 512)[0] == 22
    assert good.call(99)[0] == 22
    bad.conn.sendall(b"GET / HTTP/1.1\r\n" + bytes(64))
    # Data in flight may turn the end of the connection into a reset.
    try:
        assert bad.conn.recv(1) == b""
    except ConnectionResetError:
        bad.conn.close()
    with qemu.connect(directory / "disks.sock") as half:
        half.shutdown(socket.SHUT_WR)
        assert not _control(directory, {"op": "explode"})["ok"]
    assert good.call(nbd.READ, 0, 512) == (0, bytes(512))
    assert process.poll() is None


def test_a_delay_holds_back_writes_but_not_reads(server: tuple[Path, subprocess.Popen[bytes]]) -> None:
    directory, _ = server
    client, other = Client(directory, DISK.number), Client(directory, DISK.number)
    assert _control(directory, {"op": "delay", "disk": DISK.number, "write_seconds": 2})["ok"]
    client.conn.sendall(struct.pack(">IHHQQI", 0x25609513, 0, nbd.WRITE, 77, 0, 512) + b"D" * 512)
    # The read comes back while the write still waits, and sees the old content.
    assert other.call(nbd.READ, 0, 512) == (0, bytes(512))
    client.conn.settimeout(20)
    assert nbd.receive(client.conn, 16)[4:8] == bytes(4)
    assert other.call(nbd.READ, 0, 512) == (0, b"D" * 512)
