# SPDX-License-Identifier: GPL-3.0-or-later
"""What every transport promises, tested the same way for each: a new transport is one more row of TRANSPORTS.

The far end is a program in place of the real one that plays a receiver: it echoes, refuses, or dies as told.
"""

from __future__ import annotations

import os
import select
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import paths
from bmigrate.common.config import Config, Peer, Volume
from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError
from bmigrate.ship import transport
from bmigrate.ship.transport import Stream, Transport
from bmigrate.ship.transport.openssh import OpenSSH, command

Maker = Callable[[Path], Transport]


def _program(directory: Path, body: str) -> Path:
    path = directory / "far-end"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


TRANSPORTS: list[Maker] = [lambda program: OpenSSH(str(program))]


@pytest.fixture(params=TRANSPORTS, ids=["openssh"])
def maker(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Transport]:
    """Makes a transport whose far end runs a shell script."""
    monkeypatch.setenv("BMIGRATE_ETC", str(tmp_path))
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "wl").write_text("key\n")

    def make(body: str) -> Transport:
        made: Transport = request.param(_program(tmp_path, body))
        return made

    return make


@pytest.fixture
def config() -> Config:
    """A workload of two hosts."""
    peers = {"alpha": Peer("alpha", "10.77.0.1"), "beta": Peer("beta", "10.77.0.2", 2222)}
    return Config("wl", "alpha", peers, (Volume("data", {"alpha": "/dev/a", "beta": "/dev/b"}),))


def _read(stream: Stream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        assert select.select([stream.read_fd], [], [], 20)[0], "nothing came"
        part = os.read(stream.read_fd, count - len(data))
        if not part:
            break
        data += part
    return data


def test_bytes_arrive_both_ways_in_order(maker: Callable[[str], Transport], config: Config) -> None:
    """More than any pipe holds, echoed."""
    stream = maker("exec cat").open(config)
    data = os.urandom(1 << 20) * 3
    writer = threading.Thread(target=_write_all, args=(stream.write_fd, data))
    writer.start()
    assert _read(stream, len(data)) == data
    writer.join()
    stream.close()


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def test_kill_wakes_a_blocked_reader_and_a_blocked_writer(maker: Callable[[str], Transport], config: Config) -> None:
    """From another thread, at once."""
    stream = maker("exec sleep 600").open(config)
    results: list[object] = []

    def write() -> None:
        try:
            _write_all(stream.write_fd, bytes(64 << 20))
        except OSError as exc:
            results.append(type(exc))

    threads = [
        threading.Thread(target=write),
        threading.Thread(target=lambda: results.append(os.read(stream.read_fd, 1))),
    ]
    for thread in threads:
        thread.start()
    stream.kill()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert set(results) == {b"", BrokenPipeError}
    stream.close()


def test_close_leaves_no_process_and_may_be_repeated(maker: Callable[[str], Transport], config: Config) -> None:
    """The far end's processes of this side are gone when close returns."""
    stream: Any = maker("exec sleep 600").open(config)
    pid = stream.pid
    stream.close()
    stream.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_end_of_the_far_end_is_the_end_of_file_and_its_last_words_are_kept(
    maker: Callable[[str], Transport], config: Config
) -> None:
    """A chatty standard error neither blocks the stream nor is lost."""
    stream = maker(
        "dd if=/dev/zero bs=1024 count=300 2>/dev/null | tr '\\0' x >&2; echo the last words >&2; exit 3"
    ).open(config)
    assert _read(stream, 1) == b""
    error = stream.failure()
    assert isinstance(error, UnreachableError) and "the last words" in error.message
    assert stream.stderr_tail().endswith("the last words\n") and len(stream.stderr_tail()) <= 8192
    stream.close()


def test_the_receivers_own_log_is_no_reason(maker: Callable[[str], Transport], config: Config) -> None:
    """breceive was killed: its last log line was good news, and must not read like the cause."""
    stream = maker("echo 'breceive: workload wl: session 1 of epoch 7 with alpha' >&2; exit 137").open(config)
    assert _read(stream, 1) == b""
    assert "session" not in stream.failure().message
    stream.close()


@pytest.mark.parametrize(
    ("said", "kind", "reason"),
    [
        ("Host key verification failed.", RefusedError, "host_key_mismatch"),
        ("@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @", RefusedError, "host_key_mismatch"),
        ("root@10.77.0.2: Permission denied (publickey).", RefusedError, "key_refused"),
        ("ssh: connect to host 10.77.0.2 port 22: Connection refused", UnreachableError, "peer_unreachable"),
        ("ssh: connect to host 10.77.0.2 port 22: Connection timed out", UnreachableError, "peer_unreachable"),
        ("Timeout, server 10.77.0.2 not responding.", UnreachableError, "peer_unreachable"),
        ("sh: 1: breceive: not found", RefusedError, "not_installed"),
        ("client_loop: send disconnect: Broken pipe", UnreachableError, "peer_unreachable"),
    ],
)
def test_what_went_wrong_is_named(
    maker: Callable[[str], Transport], config: Config, said: str, kind: type[BmigrateError], reason: str
) -> None:
    """Wrong key, no route, refused, not installed: each with the host and what to do."""
    stream = maker(f"echo '{said}' >&2; exit 255").open(config)
    assert _read(stream, 1) == b""
    error = stream.failure()
    assert (type(error), error.reason, error.host) == (kind, reason, "beta")
    assert error.hint
    stream.close()


def test_openssh_offers_one_key_accepts_one_host_key_and_reads_no_configuration(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The argv is the security boundary of this side."""
    monkeypatch.setenv("BMIGRATE_ETC", str(tmp_path))
    argv = command(config)
    options = {argv[at + 1] for at, word in enumerate(argv) if word == "-o"}
    assert argv[:3] == ["ssh", "-F", "/dev/null"]
    assert {"BatchMode=yes", "IdentitiesOnly=yes", "StrictHostKeyChecking=yes", "ServerAliveInterval=5"} <= options
    assert f"UserKnownHostsFile={paths.known_hosts_file('wl')}" in options
    assert argv[argv.index("-i") + 1] == str(paths.key_file("wl"))
    assert argv[argv.index("-p") + 1] == "2222" and "10.77.0.2" in argv


def test_a_missing_key_or_client_is_refused_before_anything_starts(
    config: Config, tmp_path: Path, monkeypatch: Any
) -> None:
    """By name, with what to do."""
    monkeypatch.setenv("BMIGRATE_ETC", str(tmp_path))
    with pytest.raises(RefusedError) as caught:
        OpenSSH("/bin/true").open(config)
    assert caught.value.reason == "key_missing"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RefusedError) as caught:
        OpenSSH().open(config)
    assert caught.value.reason == "no_client"


@pytest.mark.parametrize("name", ["paramiko", "tcp"])
def test_transports_that_do_not_exist_yet_are_refused_by_name(name: str) -> None:
    """Never ignored, never replaced by another."""
    with pytest.raises(RefusedError) as caught:
        transport.create(name)
    assert caught.value.reason == "not_supported" and name in caught.value.message


def test_a_stream_that_ends_at_once_is_seen_soon(maker: Callable[[str], Transport], config: Config) -> None:
    """No timeout is needed to notice."""
    began = time.monotonic()
    stream = maker("exit 1").open(config)
    assert _read(stream, 1) == b""
    assert isinstance(stream.failure(), UnreachableError)
    stream.close()
    assert time.monotonic() - began < 15
