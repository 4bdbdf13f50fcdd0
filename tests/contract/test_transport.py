# SPDX-License-Identifier: GPL-3.0-or-later
"""What every transport promises, tested the same way for each, against a real sshd.

The far end is a program in place of the real one that plays a receiver: it echoes, refuses, or dies as told.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import paths
from bmigrate.common.config import Config, Peer, Volume
from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError
from bmigrate.ship import transport
from bmigrate.ship.transport import Stream, Transport
from bmigrate.ship.transport.openssh import OpenSSH, command
from tests import sshd


def _program(directory: Path, body: str) -> Path:
    path = directory / "far-end"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Local(Transport):
    """A transport to the sshd of this test."""

    def __init__(self, name: str, port: int) -> None:
        self._real = transport.create(name)
        self._port = port

    def open(self, config: Config) -> Stream:
        """To the peer's port here."""
        peer = dataclasses.replace(config.peer, address="127.0.0.1", port=self._port)
        return self._real.open(dataclasses.replace(config, hosts={**config.hosts, peer.name: peer}))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Sshd]:
    """A real sshd."""
    with sshd.running(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: sshd.Sshd) -> Path:
    """The workload's key and the pinned host key, as after an installation."""
    monkeypatch.setenv("BMIGRATE_ETC", str(tmp_path))
    (tmp_path / "keys").mkdir()
    sshd.make_key(paths.key_file("wl"))
    paths.known_hosts_file("wl").parent.mkdir(parents=True, exist_ok=True)
    paths.known_hosts_file("wl").write_text(server.known_host())
    return tmp_path


@pytest.fixture(params=["program in place of ssh", "openssh", "paramiko"])
def maker(request: Any, keys: Path, server: sshd.Sshd) -> Callable[[str], Transport]:
    """Makes a transport whose far end runs a shell script; with a real sshd it is the forced command of the key."""

    def make(body: str) -> Transport:
        program = _program(keys, body)
        if request.param == "program in place of ssh":
            return OpenSSH(str(program))
        server.authorize(Path(f"{paths.key_file('wl')}.pub"), str(program))
        return Local(request.param, server.port)

    return make


REAL = pytest.mark.parametrize("name", ["openssh", "paramiko"])


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


def test_a_transport_that_does_not_exist_is_refused_by_name() -> None:
    """Never ignored, never replaced by another."""
    with pytest.raises(RefusedError) as caught:
        transport.create("tcp")
    assert caught.value.reason == "not_supported" and "tcp" in caught.value.message


@REAL
def test_another_host_key_is_refused_before_anything_is_sent(
    name: str, keys: Path, server: sshd.Sshd, config: Config
) -> None:
    """Whether the pinned key is another one, or there is none for this host."""
    server.authorize(Path(f"{paths.key_file('wl')}.pub"), str(_program(keys, f"touch {keys}/ran")))
    sshd.make_key(keys / "other")
    host, kind, _ = server.known_host().split()
    other = (keys / "other.pub").read_text().split()[1]
    for line in (f"{host} {kind} {other}\n", server.known_host().replace("127.0.0.1", "127.0.0.9"), ""):
        paths.known_hosts_file("wl").write_text(line)
        stream = Local(name, server.port).open(config)
        assert _read(stream, 1) == b""
        assert stream.failure().reason == "host_key_mismatch", stream.stderr_tail()
        stream.close()
    assert not (keys / "ran").exists()


@REAL
def test_a_key_that_the_peer_does_not_know_is_refused(name: str, keys: Path, server: sshd.Sshd, config: Config) -> None:
    """With what to do about it."""
    stream = Local(name, server.port).open(config)
    assert _read(stream, 1) == b""
    error = stream.failure()
    assert (error.reason, error.host) == ("key_refused", "beta") and error.hint, stream.stderr_tail()
    stream.close()


@REAL
def test_nobody_listens(name: str, keys: Path, config: Config) -> None:
    """The port of a socket that is bound and does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        stream = Local(name, taken.getsockname()[1]).open(config)
        assert _read(stream, 1) == b""
        assert stream.failure().reason == "peer_unreachable", stream.stderr_tail()
        stream.close()


@REAL
def test_both_directions_and_standard_error_full_at_once(
    name: str, keys: Path, server: sshd.Sshd, config: Config
) -> None:
    """No direction waits for another: 48 MiB each way, and more on standard error than anything buffers."""
    body = "dd if=/dev/zero bs=65536 count=256 2>/dev/null | tr '\\0' e >&2 & cat; wait"
    server.authorize(Path(f"{paths.key_file('wl')}.pub"), str(_program(keys, body)))
    stream = Local(name, server.port).open(config)
    data = os.urandom(1 << 20) * 48
    writer = threading.Thread(target=_write_all, args=(stream.write_fd, data))
    writer.start()
    assert _read(stream, len(data)) == data
    writer.join()
    deadline = time.monotonic() + 60
    while not stream.stderr_tail() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(stream.stderr_tail()) == {"e"}
    stream.close()


@REAL
def test_nothing_secret_is_in_an_argument_list(name: str, keys: Path, server: sshd.Sshd, config: Config) -> None:
    """The key is named by its path, and by nothing of what is in it."""
    server.authorize(Path(f"{paths.key_file('wl')}.pub"), str(_program(keys, "exec cat")))
    stream: Any = Local(name, server.port).open(config)
    _write_all(stream.write_fd, b"x")
    assert _read(stream, 1) == b"x"
    said = Path(f"/proc/{stream.pid}/cmdline").read_text()
    assert str(paths.key_file("wl")) in said
    assert not _told_of(_secret(), said)
    stream.close()


def _secret() -> str:
    """What is in the private key, without its first and last line."""
    secret = "".join(paths.key_file("wl").read_text().splitlines()[1:-1])
    assert len(secret) > 200
    return secret


def _told_of(secret: str, said: str) -> list[str]:
    """What of a secret is in a text, line breaks left out: any 16 characters in a row."""
    said = "".join(said.split())
    return [part for at in range(len(secret) - 15) if (part := secret[at : at + 16]) in said]


@REAL
@pytest.mark.parametrize("key", ["accepted", "refused", "missing", "damaged"])
def test_nothing_secret_is_logged_or_said(
    name: str, key: str, keys: Path, server: sshd.Sshd, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in our log at its most talkative, nor on the child's standard error, nor in what the operator is told."""
    caplog.set_level(logging.DEBUG)
    secret = _secret()
    if key == "accepted":
        server.authorize(Path(f"{paths.key_file('wl')}.pub"), str(_program(keys, "exec cat")))
    elif key == "missing":
        paths.key_file("wl").unlink()
    elif key == "damaged":
        lines = paths.key_file("wl").read_text().splitlines()
        paths.key_file("wl").write_text("\n".join([lines[0], *lines[2:]]) + "\n")
    heard = []
    try:
        stream = Local(name, server.port).open(config)
    except RefusedError as error:
        assert key == "missing" and error.reason == "key_missing"
        heard.append(str(error.to_dict()))
    else:
        if key == "accepted":
            _write_all(stream.write_fd, b"x")
            assert _read(stream, 1) == b"x"
        else:
            assert key != "missing" and _read(stream, 1) == b""
            # Only this waits for the last words, which may come after the end of the stream.
            heard.append(str(stream.failure().to_dict()))
            assert stream.stderr_tail(), "nothing was said at all"
        heard.append(stream.stderr_tail())
        stream.close()
    heard += [entry.getMessage() for entry in caplog.records]
    assert not _told_of(secret, "\n".join(heard))


def test_paramiko_prefers_what_is_fast_and_takes_nothing_weak() -> None:
    """AES-GCM where it is offered, else counter mode with encrypt-then-MAC; an old one still finds something."""
    from bmigrate.ship.transport import paramikochild as child

    new = ["aes128-ctr", "aes256-cbc", "3des-cbc", "aes128-gcm@openssh.com", "aes256-gcm@openssh.com"]
    assert child.preferred(child.CIPHERS, new)[0] == "aes128-gcm@openssh.com"
    assert child.preferred(child.CIPHERS, ["aes256-cbc", "aes256-ctr", "3des-cbc"]) == ["aes256-ctr"]
    assert child.preferred(child.DIGESTS, ["hmac-md5", "hmac-sha2-256", "hmac-sha2-256-etm@openssh.com"]) == [
        "hmac-sha2-256-etm@openssh.com",
        "hmac-sha2-256",
    ]
    with pytest.raises(child.Ended, match="none of"):
        child.preferred(child.CIPHERS, ["3des-cbc"])


def test_a_stream_that_ends_at_once_is_seen_soon(maker: Callable[[str], Transport], config: Config) -> None:
    """No timeout is needed to notice."""
    began = time.monotonic()
    stream = maker("exit 1").open(config)
    assert _read(stream, 1) == b""
    assert isinstance(stream.failure(), UnreachableError)
    stream.close()
    assert time.monotonic() - began < 15
