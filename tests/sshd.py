# SPDX-License-Identifier: GPL-3.0-or-later
"""A real sshd on the loopback interface, for tests and benchmarks: Debian's, unpacked and not installed.

Promises: it listens on 127.0.0.1 only, on a free port, with host and user keys made for it alone; nothing of this
machine's own ssh configuration takes part and no service is installed. It needs root, as sshd does, and a mount
namespace of its own: the directory and the user that its separation of privileges wants exist only in there. It has
a process namespace too, so that nothing which it has started outlives it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lab import paths
from lab.waiting import wait

PACKAGES = ("openssh-server", "libwrap0")
_IN_NAMESPACE = """\
set -e
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -m 755 /run/sshd
mount --bind {passwd} /etc/passwd
exec {program} -D -e -f {config}
"""


def unpacked(*packages: str) -> Path:
    """The files of Debian packages, below one directory; fetched once and kept in the cache."""
    home = paths.cache_directory() / "unpacked" / "+".join(packages)
    home.parent.mkdir(parents=True, exist_ok=True)
    with open(home.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.is_dir():
            with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
                said = {"cwd": scratch, "check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                subprocess.run(["apt-get", "download", *packages], **said)  # type: ignore[call-overload]
                for package in Path(scratch).glob("*.deb"):
                    subprocess.run(["dpkg", "-x", package.name, "tree"], **said)  # type: ignore[call-overload]
                os.rename(Path(scratch) / "tree", home)
    return home


def library_path(tree: Path) -> str:
    """LD_LIBRARY_PATH for programs of an unpacked tree."""
    found = {str(path.parent) for path in tree.glob("**/*.so*")}
    return ":".join(sorted(found))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_key(path: Path) -> None:
    """An ed25519 key pair without a passphrase."""
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


class Sshd:
    """A running sshd.

    Attributes:
        port: on 127.0.0.1. process: unshare that became sshd. directory: of keys and configuration.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = _free_port()
        installed = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
        environment = dict(os.environ)
        if installed:
            program = installed
        else:
            tree = unpacked(*PACKAGES)
            program = str(tree / "usr/sbin/sshd")
            environment["LD_LIBRARY_PATH"] = library_path(tree)
        directory.mkdir(parents=True, exist_ok=True)
        make_key(directory / "host_key")
        self._authorized = directory / "authorized_keys"
        self._authorized.write_text("")
        users = Path("/etc/passwd").read_text()
        if "\nsshd:" not in users:
            users += "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
        (directory / "passwd").write_text(users)
        (directory / "config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {directory / 'host_key'}\n"
            f"AuthorizedKeysFile {self._authorized}\nStrictModes no\nPidFile none\nUsePAM no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nMaxStartups 100\nLogLevel ERROR\n"
        )
        script = _IN_NAMESPACE.format(passwd=directory / "passwd", program=program, config=directory / "config")
        with open(directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                ["unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "sh", "-c", script],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        wait(self._answers, 60, "sshd to listen")

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.directory / "log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0) as probe:
            return probe.recv(4) == b"SSH-"
        return False

    def known_host(self, port: int | None = None) -> str:
        """The line of known_hosts for it, or for another port that leads to it."""
        kind, key = (self.directory / "host_key.pub").read_text().split()[:2]
        return f"[127.0.0.1]:{port or self.port} {kind} {key}\n"

    def authorize(self, public_key: Path, command: str | None = None) -> None:
        """Let a key in, as in an installation: restricted to one command if there is one."""
        options = f'restrict,command="{command}" ' if command is not None else ""
        with open(self._authorized, "a") as stream:
            stream.write(options + public_key.read_text())

    def close(self) -> None:
        """End it, and all that it has started."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Sshd]:
    """A running sshd, ended at the end of the block."""
    server = Sshd(directory)
    try:
        yield server
    finally:
        server.close()
