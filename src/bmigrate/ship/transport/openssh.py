# SPDX-License-Identifier: GPL-3.0-or-later
"""The default transport: the host's own ssh client as a child process, its pipes as the stream.

Promises: only the pinned host key is accepted, only the workload's key is offered, nothing prompts,
no user or system ssh configuration takes part, and the child is ended by its own pid and reaped. What ssh
says on standard error is turned into the error that an operator can act on.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading

from bmigrate.common import paths
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError
from bmigrate.ship.transport import Stream, Transport, closed_by_peer, set_pipe_size

TAIL_BYTES = 8192


def command(config: Config) -> list[str]:
    """The argv of ssh. The remote command is only a label: the peer's key forces its own."""
    peer = config.peer
    return [
        "ssh", "-F", "/dev/null", "-T", "-a", "-x",
        "-o", "BatchMode=yes",
        "-o", "IdentitiesOnly=yes",
        "-o", "IdentityAgent=none",
        "-o", "PreferredAuthentications=publickey",
        "-o", "StrictHostKeyChecking=yes",
        "-o", f"UserKnownHostsFile={paths.known_hosts_file(config.workload)}",
        "-o", "GlobalKnownHostsFile=/dev/null",
        "-o", "UpdateHostKeys=no",
        "-o", "ConnectTimeout=10",
        "-o", "ServerAliveInterval=5",
        "-o", "ServerAliveCountMax=3",
        "-o", "Compression=no",
        "-o", "ControlPath=none",
        "-o", "LogLevel=ERROR",
        "-i", str(paths.key_file(config.workload)),
        "-p", str(peer.port),
        "-l", "root",
        peer.address,
        "breceive", "--workload", config.workload,
    ]  # fmt: skip


def explain(config: Config, tail: str) -> BmigrateError:
    """The error that the client's last words mean.

    Args:
        config: names the peer and the files involved.
        tail: standard error of ssh.
    """
    peer, workload = config.peer, config.workload
    where = f"{peer.name} ({peer.address})"
    if "Host key verification failed" in tail or "IDENTIFICATION HAS CHANGED" in tail:
        return RefusedError(
            f"the ssh host key of {where} is not the pinned one",
            host=peer.name,
            hint=f"if the host was reinstalled, run install.yml again (it pins keys into "
            f"{paths.known_hosts_file(workload)}); otherwise find out who answers at {peer.address}",
            reason="host_key_mismatch",
        )
    if "Permission denied" in tail:
        return RefusedError(
            f"{where} does not accept the key of workload {workload}",
            host=peer.name,
            hint=f"run install.yml; the peer's authorized_keys must hold {paths.key_file(workload)}.pub",
            reason="key_refused",
        )
    if re.search(r"(Identity file .* not accessible|Load key .*(No such file|error|denied))", tail):
        return RefusedError(
            f"the key {paths.key_file(workload)} cannot be used", hint="run install.yml", reason="key_missing"
        )
    if "not found" in tail and "breceive" in tail:
        return RefusedError(
            f"breceive is not installed on {where}", host=peer.name, hint="run install.yml", reason="not_installed"
        )
    words = (
        "Connection refused", "timed out", "No route to host", "Network is unreachable", "Could not resolve",
        "Connection reset", "Connection closed", "Broken pipe", "not responding",
    )  # fmt: skip
    for line in reversed(tail.strip().splitlines()):
        if any(word in line for word in words):
            return UnreachableError(
                f"{where} cannot be reached: {line.strip()}",
                host=peer.name,
                hint=f"check the network and sshd of {peer.name}; shipping resumes by itself",
                reason="peer_unreachable",
            )
    return closed_by_peer(peer.name, tail)


class ChildStream:
    """A child that plays ssh, and its three pipes.

    Args:
        config: names the peer. argv: of the child. environment: added to ours.
    """

    def __init__(self, config: Config, argv: list[str], environment: dict[str, str] | None = None) -> None:
        self._config = config
        try:
            self._child = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                start_new_session=True, cwd="/", env={**os.environ, "LC_ALL": "C", **(environment or {})},
            )  # fmt: skip
        except OSError as exc:
            raise RefusedError(f"{argv[0]} cannot be started: {exc}", reason="no_client") from exc
        assert self._child.stdin and self._child.stdout and self._child.stderr
        self.write_fd = self._child.stdin.fileno()
        self.read_fd = self._child.stdout.fileno()
        set_pipe_size(self.write_fd)
        self._tail = b""
        self._lock = threading.Lock()
        self._closed = False
        self._drainer = threading.Thread(target=self._drain, name="ssh-stderr", daemon=True)
        self._drainer.start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._child.pid

    def _drain(self) -> None:
        """Keep the end of standard error; read on, or the child would block on a full pipe."""
        assert self._child.stderr
        while True:
            try:
                data = os.read(self._child.stderr.fileno(), 4096)
            except OSError:
                return
            if not data:
                return
            with self._lock:
                self._tail = (self._tail + data)[-TAIL_BYTES:]

    def kill(self) -> None:
        """SIGKILL to the child; its ends of the pipes close with it."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill, reap, close."""
        if self._closed:
            return
        self._closed = True
        self.kill()
        self._child.wait()
        self._drainer.join(5.0)
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue

    def stderr_tail(self) -> str:
        """The last words of ssh."""
        with self._lock:
            return self._tail.decode("utf-8", "replace")

    def failure(self) -> BmigrateError:
        """Why it ended; waits a moment for the last words, which may come after the end of the stream."""
        try:
            self._child.wait(2.0)
            self._drainer.join(1.0)
        except subprocess.TimeoutExpired:
            pass
        return explain(self._config, self.stderr_tail())


class OpenSSH(Transport):
    """Transport ``openssh``."""

    def __init__(self, program: str | None = None) -> None:
        self._program = program

    def open(self, config: Config) -> Stream:
        """Start ssh to the peer of the workload."""
        program = self._program or shutil.which("ssh")
        if program is None:
            raise RefusedError("there is no ssh client on this host", hint="install openssh-client", reason="no_client")
        if not paths.key_file(config.workload).exists():
            raise RefusedError(
                f"the key {paths.key_file(config.workload)} does not exist",
                hint="run install.yml",
                reason="key_missing",
            )
        return ChildStream(config, [program, *command(config)[1:]])
