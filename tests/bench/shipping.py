# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast a seed is, against the plain pipe that it replaces: ``dd | ssh 'dd of='``.

Native, on this machine, through a real sshd on the loopback interface: the shipping daemon, the receiver and hold are
the real processes; files in memory stand for the disks, so that the data path is what is measured; breqd's place
is taken by its own maps and leases behind its socket. Both sides are timed from before the connection to
the last byte flushed. In alternating rounds; a ratio is the bare time over the shipped time of the same round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import paths, rpc
from bmigrate.common.errors import BmigrateError
from lab.waiting import wait
from tests import sshd
from tests.bench import command
from tests.bench.figures import spread
from tests.unit.ship_world import World
from tests.unit.standby_host import EDGE

MIB = 1 << 20
LIMIT_SECONDS = 600.0


def fill(path: Path, size: int, kind: str) -> None:
    """A file of random bytes, of text that compresses, or of zeroes."""
    with open(path, "wb") as stream:
        if kind == "zero":
            stream.truncate(size)
            return
        for number in range(size // MIB):
            if kind == "random":
                stream.write(os.urandom(MIB))
            else:
                line = b"".join(b"row %08d of table accounts, balance %06d\n" % (number, at) for at in range(2000))
                stream.write((line * (MIB // len(line) + 1))[:MIB])


class _World(World):
    """Filled by the benchmark, and without the program in place of ssh."""

    def _fill(self, path: Path, size: int) -> None:
        path.touch()

    def _write_ssh(self) -> None:
        assert not self.ssh.exists()


class Bench:
    """Two hosts in one directory with a real sshd between them. ``receiver``: more of its environment. ``before``: a
    line of shell that comes before it.

    Attributes:
        extra: more lines of the workload's configuration, for the next daemon. port: of 127.0.0.1, where it connects
            to: sshd's, or one that leads there.
    """

    def __init__(
        self,
        directory: Path,
        size: int,
        kind: str,
        monkeypatch: pytest.MonkeyPatch,
        extra: str,
        receiver: dict[str, str] | None = None,
        before: str = "",
    ) -> None:
        self.size = size
        self.world = _World(directory, monkeypatch, {"data": size})
        self.extra = extra
        fill(self.world.source(), size, kind)
        self.server = sshd.Sshd(directory / "sshd")
        self.port = self.server.port
        keys = directory / "alpha" / "etc" / "keys"
        (keys / "wl").unlink()
        sshd.make_key(keys / "wl")
        sshd.make_key(directory / "plain")
        self.plain = directory / "plain"
        environment = {k: v for k, v in self.world.beta.environment.items() if k.startswith(("BMIGRATE", "PYTHON"))}
        environment.update(receiver or {})
        program = directory / "receiver"
        program.write_text(
            f"#!/bin/sh\n{before}\nexec env "
            + " ".join(f"'{key}={value}'" for key, value in environment.items())
            + f" {sys.executable} {EDGE} breceive --workload wl\n"
        )
        program.chmod(0o755)
        self.server.authorize(keys / "wl.pub", str(program))
        self.server.authorize(self.plain.with_suffix(".pub"))
        self.known = directory / "known_hosts"
        self.known.write_text(self.server.known_host())

    def begin(self, extents: list[list[int]] | None = None) -> subprocess.Popen[bytes]:
        """A shipping daemon that has read all and must not ship yet; every block is dirty.

        Args:
            extents: [offset, length]; only these are dirty, and everything was shipped before.
        """
        world = self.world
        world.role("primary", shipping=False)
        with world.breqd.lock:
            for key in world.breqd.items:
                if extents is None:
                    world.breqd.maps.mark_all(key, time.monotonic())
                else:
                    world.breqd.maps.mark_extents(key, extents, time.monotonic())
            world.breqd.seeds += extents is None
        process = world.daemon()
        config = world.directory / "alpha" / "etc" / "wl.yml"
        config.write_text(
            config.read_text().replace("address: 10.77.0.2", f"address: 127.0.0.1, port: {self.port}") + self.extra
        )
        paths.known_hosts_file("wl").parent.mkdir(parents=True, exist_ok=True)
        paths.known_hosts_file("wl").write_text(self.server.known_host(self.port))
        self.until("idle")
        rpc.call(paths.ship_socket(), "reload", 30.0)
        return process

    def go(self) -> None:
        """Ship."""
        self.world.role("primary", shipping=True)
        rpc.call(paths.ship_socket(), "reload", 30.0)

    def start(self) -> subprocess.Popen[bytes]:
        """A shipping daemon, in step."""
        process = self.begin()
        self.go()
        self.until("in_step")
        return process

    def shipped(self, extents: list[list[int]] | None = None) -> float:
        """Seconds for a seed, or for these extents."""
        process = self.begin(extents)
        began = time.monotonic()
        self.go()
        self.until("in_step")
        seconds = time.monotonic() - began
        process.terminate()
        process.wait()
        same = subprocess.run(["cmp", "-s", str(self.world.source()), str(self.world.replica())], check=False)
        if same.returncode:
            raise SystemExit("the replica differs")
        return seconds

    def status(self) -> dict[str, Any]:
        """The workload's status entry."""
        entry: dict[str, Any] = rpc.call(paths.ship_socket(), "status", 30.0, workload="wl")["workloads"][0]
        return entry

    def until(self, *states: str) -> None:
        """Wait for one of the states."""
        said: list[object] = []

        def reached() -> bool:
            try:
                entry = self.status()
            except BmigrateError as error:
                said[:] = [error]
                return False
            said[:] = [entry]
            return entry["state"] in states

        wait(reached, LIMIT_SECONDS, f"state {states}", 0.005, lambda: str(said))

    def ssh(self) -> str:
        """The bare client, with nothing of this machine's configuration."""
        return (
            f"ssh -F /dev/null -T -a -x -o BatchMode=yes -o IdentityAgent=none -o Compression=no -i {self.plain} "
            f"-o UserKnownHostsFile={self.known} -o StrictHostKeyChecking=yes -p {self.server.port} root@127.0.0.1"
        )

    def bare(self) -> float:
        """Seconds for the plain pipe."""
        target = self.world.directory / "bare"
        command = (
            f"dd if={self.world.source()} bs=1M status=none | {self.ssh()} "
            f"'dd of={target} bs=1M iflag=fullblock conv=fdatasync status=none'"
        )
        began = time.monotonic()
        subprocess.run(command, shell=True, check=True)
        seconds = time.monotonic() - began
        target.unlink()
        return seconds

    def close(self) -> None:
        """End everything."""
        self.server.close()
        self.world.close()


def measure(directory: Path, size: int, kind: str, pairs: int, extra: str = "") -> dict[str, object]:
    """Ratios of one kind of data."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        bench = Bench(directory, size, kind, monkeypatch, extra)
        try:
            bench.bare()
            shipped: list[float] = []
            bare: list[float] = []
            for number in range(pairs):
                steps = [(shipped, bench.shipped), (bare, bench.bare)]
                for into, step in steps if number % 2 else reversed(steps):
                    into.append(step())
        finally:
            bench.close()
    return {
        "kind": kind,
        "size_bytes": size,
        "ratios": [b / s for s, b in zip(shipped, bare)],
        "shipped_bytes_per_second": [size / s for s in shipped],
        "bare_bytes_per_second": [size / b for b in bare],
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    for name in ("shipped", "bare"):
        yield f"{name}: {' '.join(f'{rate / MIB:.0f}' for rate in result[f'{name}_bytes_per_second'])} MiB/s"
    yield f"shipped / bare: {spread(result['ratios'])}"


def main() -> int:
    """Command line."""
    parser = command.parser("shipping", __doc__, rounds=5, mib=2048, of="of each side")
    parser.add_argument("--kind", choices=("random", "text", "zero"), default="random", help="data (%(default)s)")
    parser.add_argument("--extra", default="", help="more lines of the workload's configuration")
    arguments = command.parse(parser)
    with command.scratch() as directory:
        result = measure(directory, arguments.mib * MIB, arguments.kind, arguments.rounds, arguments.extra)
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
