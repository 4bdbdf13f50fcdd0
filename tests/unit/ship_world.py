# SPDX-License-Identifier: GPL-3.0-or-later
"""Two hosts in a directory, for tests of the shipper: files as volumes, everything else as real as it gets.

The standby is `StandbyHost`: real hold and breceive processes. The transport is the real `openssh`
one with another program in place of ssh, which starts breceive with the standby's environment. On the source,
`FakeBreqd` serves breqd's socket from breqd's own maps and leases; the kernel's log is a list that
`Source.write` appends to after a write is complete, as the tracepoint does, and that is consumed late.
"""

from __future__ import annotations

import collections
import os
import random
import selectors
import shlex
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bmigrate.breqd.leases import Leases
from bmigrate.breqd.maps import Maps
from bmigrate.common import rpc, state
from bmigrate.common.config import Config, Limits, Peer, Volume
from bmigrate.common.errors import BmigrateError
from bmigrate.ship.engine import Engine
from bmigrate.ship.jobs import Job
from bmigrate.ship.transport.openssh import OpenSSH
from tests.unit.standby_host import EDGE, GENERATION, MIB, StandbyHost, wait

GRANULE = 4096
TAIL = 3584


class _Record:
    """The part of breqd's track record that leases use."""

    def __init__(self) -> None:
        self.highest_epoch = 0
        self.suspect: str | None = None
        self.suspicions = 0
        self.resyncs = 0
        self.begun = -1

    def save(self) -> None:
        """Kept in memory: the fake outlives the daemons that it plays."""


class _Item:
    def __init__(self, workload: str, name: str, size: int) -> None:
        self.key = (workload, name)
        self.size = size
        self.record = _Record()
        self.records = 0
        self.written = 0
        self.discarded = 0
        self.attachment = 1
        self.mirror = np.zeros(-(-size // GRANULE // 8), dtype=np.uint8)
        if len(self.mirror) * 8 * GRANULE < size:
            self.mirror = np.zeros(len(self.mirror) + 1, dtype=np.uint8)
        self.failed = np.zeros_like(self.mirror)


class FakeBreqd:
    """breqd's socket over its real maps and leases, without a kernel under it.

    Attributes:
        log: completed writes that the maps do not know yet: (volume, offset, length).
        discards: the same for discards.
        hold_log: while set, nothing but a barrier consumes the log.
        before_barrier: called when a barrier is asked for.
    """

    def __init__(self, path: Path, workload: str, volumes: dict[str, int]) -> None:
        self.path = path
        self.items = {(workload, name): _Item(workload, name, size) for name, size in volumes.items()}
        self.lock = threading.RLock()
        self.log: collections.deque[tuple[str, int, int]] = collections.deque()
        self.discards: collections.deque[tuple[str, int, int]] = collections.deque()
        self.hold_log = threading.Event()
        self.before_barrier: Callable[[], None] = lambda: None
        self.seeds = 1
        self.blind = False
        self.calls: collections.Counter[str] = collections.Counter()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._boot()
        for key in self.items:
            self.maps.mark_all(key, time.monotonic())
        self.start()

    # what Leases asks of breqd's tracker
    def of_workload(self, workload: str) -> list[_Item]:
        """All volumes."""
        return list(self.items.values())

    def get(self, key: tuple[str, str]) -> _Item:
        """One volume."""
        return self.items[key]

    def _boot(self) -> None:
        self.maps = Maps()
        for item in self.items.values():
            item.record.begun = -1
            self.maps.add(item.key, item.size, GRANULE, item.mirror, item.failed, time.monotonic())
        self.leases = Leases(self)  # type: ignore[arg-type]

    def start(self) -> None:
        """Serve."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        ready = threading.Event()
        self._ready = ready
        self._thread.start()
        assert ready.wait(10)

    def stop(self) -> None:
        """Close all connections and stop listening: what is left is the mirror and the log, as after kill -9."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join(10)

    def restart(self) -> None:
        """kill -9 and start: another incarnation, nobody fenced, claims are dirty."""
        self.stop()
        with self.lock:
            self._boot()
        self.start()

    def attach_anew(self, workload: str, name: str, size: int, reason: str) -> None:
        """A volume has another size: it is attached again with nothing marked, and is suspect."""
        with self.lock:
            old = self.items[workload, name]
            item = self.items[workload, name] = _Item(workload, name, size)
            item.record, item.attachment = old.record, old.attachment + 1
            item.record.begun = -1
            item.record.suspicions += 1
            item.record.suspect = reason
            self.maps.remove(item.key)
            self.maps.add(item.key, size, GRANULE, item.mirror, item.failed, time.monotonic())

    def _serve(self) -> None:
        selector = selectors.DefaultSelector()
        server = rpc.Server(self.path, self._handle, selector)
        self._ready.set()
        while not self._stop.is_set():
            for key, mask in selector.select(0.005):
                key.data(mask)
            if not self.hold_log.is_set():
                self.consume()
        server.close()
        selector.close()

    def consume(self) -> None:
        """Everything in the log goes into the maps."""
        with self.lock:
            for log, discard in ((self.log, False), (self.discards, True)):
                while log:
                    name, offset, length = log.popleft()
                    item = next(entry for entry in self.items.values() if entry.key[1] == name)
                    self.maps.mark_extents(item.key, [[offset, length]], time.monotonic())
                    item.records += 1
                    item.written += length
                    item.discarded += length if discard else 0

    def _handle(self, connection: rpc.Connection, request: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            operation = str(request["op"])
            self.calls[operation] += 1
            answer: dict[str, Any] = getattr(self, f"_op_{operation}")(request)
            return answer

    def _key(self, request: dict[str, Any]) -> tuple[str, str]:
        return request["workload"], request["volume"]

    def _op_status(self, request: dict[str, Any]) -> dict[str, Any]:
        volumes = []
        for key, item in self.items.items():
            oldest = self.maps.oldest(key)
            volumes.append(
                {
                    "workload": key[0], "volume": key[1], "size_bytes": item.size, "granule_bytes": GRANULE,
                    "dirty_bytes": self.maps.dirty_bytes(key), "claimed_bytes": self.maps.claimed_bytes(key),
                    "suspect": item.record.suspect, "attached": True, "attachment_id": f"a{item.attachment}",
                    "self_test": {"state": "blind" if self.blind else "proven"},
                    "oldest_dirty_age_seconds": 0.0 if oldest is None else time.monotonic() - oldest,
                    "written_bytes": item.written, "seed_count": self.seeds, "total_records": item.records,
                    "highest_epoch": item.record.highest_epoch, "discarded_bytes": item.discarded,
                }
            )  # fmt: skip
        return {"incarnation": self.leases.incarnation, "volumes": volumes}

    def _op_fence(self, request: dict[str, Any]) -> dict[str, Any]:
        self.leases.fence(request["workload"], request["epoch"], request["fence_id"])
        return {}

    def _op_end_session(self, request: dict[str, Any]) -> dict[str, Any]:
        self.leases.end(request["workload"], request["epoch"])
        return {}

    def _op_claim(self, request: dict[str, Any]) -> dict[str, Any]:
        key = self._key(request)
        return self.leases.claim(key, request["epoch"], request["max_bytes"], request["from_offset_bytes"])

    def _op_ack(self, request: dict[str, Any]) -> dict[str, Any]:
        return self.leases.acknowledge(self._key(request), request["claim"])

    def _op_mark(self, request: dict[str, Any]) -> dict[str, Any]:
        self.maps.mark_extents(self._key(request), request["extents"], time.monotonic())
        return {}

    def _op_barrier(self, request: dict[str, Any]) -> dict[str, Any]:
        self.before_barrier()
        self.consume()
        return {"total_records": {key[1]: item.records for key, item in self.items.items()}}

    def _op_suspect(self, request: dict[str, Any]) -> dict[str, Any]:
        record = self.items[self._key(request)].record
        record.suspicions += 1
        record.suspect = record.suspect or request["reason"]
        return {}

    def _op_resync_begin(self, request: dict[str, Any]) -> dict[str, Any]:
        record = self.items[self._key(request)].record
        resumed = request.get("resume") == f"r{record.begun}" and record.begun == record.suspicions
        record.begun = record.suspicions
        return {"resync_id": f"r{record.begun}", "resumed": resumed}

    def _op_resync_end(self, request: dict[str, Any]) -> dict[str, Any]:
        record = self.items[self._key(request)].record
        record.resyncs += 1
        if record.begun == record.suspicions:
            record.suspect = None
        return {}


class World:
    """Source and standby of workload ``wl``.

    Args:
        directory: for everything. volumes: name -> size in bytes. limits: of the configuration.
    """

    def __init__(
        self,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        volumes: dict[str, int] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.directory = directory
        self.volumes = volumes or {"data": 8 * MIB + TAIL}
        (directory / "beta").mkdir()
        self.beta = StandbyHost(directory / "beta", self.volumes)
        self.beta.start()
        for name in ("etc", "state", "run"):
            (directory / "alpha" / name).mkdir(parents=True)
            monkeypatch.setenv(f"BMIGRATE_{name.upper()}", str(directory / "alpha" / name))
        (directory / "alpha" / "etc" / "keys").mkdir()
        (directory / "alpha" / "etc" / "keys" / "wl").write_text("not used by the program in place of ssh\n")
        self.config = Config(
            workload="wl",
            host="alpha",
            hosts={"alpha": Peer("alpha", "10.77.0.1"), "beta": Peer("beta", "10.77.0.2")},
            volumes=tuple(
                Volume(name, {"alpha": str(self.source(name)), "beta": str(self.replica(name))})
                for name in self.volumes
            ),
            limits=limits or Limits(max_drain_seconds=2.0),
        )
        self.random = random.Random(os.environ.get("BMIGRATE_TEST_SEED", str(random.randrange(1 << 30))))
        for name, size in self.volumes.items():
            self._fill(self.source(name), size)
        self.role("primary")
        self.ssh = directory / "ssh"
        self._write_ssh()
        self.breqd = FakeBreqd(directory / "alpha" / "run" / "breqd.sock", "wl", self.volumes)
        self.engines: list[Engine] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self._writer: threading.Thread | None = None
        self._writing = threading.Event()
        self.written_writes = 0
        self.prelude = ""  # of the program that `daemon` starts

    # -- files -------------------------------------------------------------------------------------

    def source(self, name: str = "data") -> Path:
        """The source's file of a volume."""
        return self.directory / f"{name}.src"

    def replica(self, name: str = "data") -> Path:
        """The standby's file of a volume."""
        return Path(os.path.realpath(self.beta.device(name)))

    def _fill(self, path: Path, size: int) -> None:
        """A quarter zeroes in a block, the rest random."""
        with open(path, "wb") as stream:
            stream.write(self.random.randbytes(size // 2))
            stream.seek(size * 3 // 4)
            stream.write(self.random.randbytes(size - size * 3 // 4))

    def _write_ssh(self) -> None:
        keep = ("BMIGRATE", "PYTHON")
        environment = {key: value for key, value in self.beta.environment.items() if key.startswith(keep)}
        words = " ".join(shlex.quote(f"{key}={value}") for key, value in environment.items())
        faults = shlex.quote(str(self.directory / "faults"))
        self.ssh.write_text(
            "#!/bin/sh\n"
            f"if [ -s {faults} ]; then plan=$(cat {faults}); : > {faults}; fi\n"
            f"echo $$ >> {shlex.quote(str(self.directory / 'receivers'))}\n"
            f'exec env {words} BMIGRATE_FAULTS="$plan" {sys.executable} {EDGE} breceive --workload wl\n'
        )
        self.ssh.chmod(self.ssh.stat().st_mode | stat.S_IXUSR)

    def receiver_faults(self, plan: str) -> None:
        """The next receiver, and only that one, runs with this plan."""
        (self.directory / "faults").write_text(plan)

    def role(self, role: str, **fields: Any) -> None:
        """The source's durable role."""
        generation = {"number": GENERATION.number, "id": GENERATION.id}
        directory = self.directory / "alpha" / "state" / "wl"
        directory.mkdir(parents=True, exist_ok=True)
        defaults: dict[str, Any] = {"generation": generation, "shipping": True}
        state.save(state.WorkloadState("wl", "alpha", role, **{**defaults, **fields}))

    # -- the workload ------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes, name: str = "data", recorded: bool = True) -> None:
        """One write of the workload; recorded when it is complete."""
        fd = os.open(self.source(name), os.O_WRONLY)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)
        if recorded:
            self.breqd.log.append((name, offset, len(data)))
            self.written_writes += 1

    def discard(self, offset: int, length: int, name: str = "data") -> None:
        """The file system trims: the device reads as zeroes there, and the discard is recorded."""
        self.write(offset, bytes(length), name, recorded=False)
        self.breqd.discards.append((name, offset, length))

    def random_write(self, hot: bool = True) -> None:
        """512 bytes to 64 KiB somewhere; half of them in a small hot part, some of them zeroes."""
        name = self.random.choice(list(self.volumes))
        size = self.volumes[name]
        length = 512 * self.random.choice((1, 3, 8, 16, 128))
        end = size if self.random.random() < 0.5 or not hot else min(size, 256 * 1024)
        length = min(length, end)
        offset = self.random.randrange(0, (end - length) // 512 + 1) * 512
        data = bytes(length) if self.random.random() < 0.2 else self.random.randbytes(length)
        self.write(offset, data, name)

    def start_writer(self, pause_seconds: float = 0.002) -> None:
        """Write at random until ``stop_writer``."""
        self._writing.set()

        def body() -> None:
            while self._writing.is_set():
                self.random_write()
                time.sleep(pause_seconds)

        self._writer = threading.Thread(target=body, daemon=True)
        self._writer.start()

    def stop_writer(self) -> None:
        """The workload stops."""
        self._writing.clear()
        if self._writer is not None:
            self._writer.join(10)
            self._writer = None

    # -- the shipper -------------------------------------------------------------------------------

    def engine(self) -> Engine:
        """A running shipper in this process."""
        engine = Engine(self.config, OpenSSH(str(self.ssh)))
        self.engines.append(engine)
        engine.start()
        return engine

    def daemon(self, faults: str = "") -> subprocess.Popen[bytes]:
        """A running `bmigrate ship` in a process of its own."""
        hosts = "hosts: {alpha: {address: 10.77.0.1}, beta: {address: 10.77.0.2}}"
        lines = ["workload: wl", "host: alpha", hosts, "volumes:"]
        for volume in self.config.volumes:
            devices = f"{{alpha: {volume.devices['alpha']}, beta: /dev/null}}"
            lines.append(f"  - {{name: {volume.name}, devices: {devices}}}")
        (self.directory / "alpha" / "etc" / "wl.yml").write_text("\n".join(lines) + "\n")
        environment = dict(
            os.environ, PATH=f"{self.directory}:{os.environ['PATH']}", BMIGRATE_FAULTS=faults,
            PYTHONPATH=self.beta.environment["PYTHONPATH"],
        )  # fmt: skip
        log = open(self.directory / "ship.log", "ab")
        process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; {self.prelude}from bmigrate.ship.main import main; sys.exit(main())"],
            env=environment, stderr=log, stdout=log,
        )  # fmt: skip
        log.close()
        self.processes.append(process)
        return process

    def until(self, engine: Engine, *states: str, limit_seconds: float = 60.0) -> None:
        """Wait for one of the states."""
        last: list[object] = []

        def reached() -> bool:
            last[:] = [engine.state(), str(engine.last_error)]
            assert engine.defect is None, engine.defect
            return engine.state()[0] in states

        try:
            wait(reached, f"state {states}", limit_seconds)
        except AssertionError as exc:
            raise AssertionError(f"{exc}; now {last}") from exc

    def job(self, engine: Engine, kind: str, limit_seconds: float = 60.0, **fields: Any) -> dict[str, Any]:
        """Run a job to its end; its error is raised."""
        over = threading.Event()
        result: dict[str, Any] = {}

        def answer(value: dict[str, Any] | None, error: BmigrateError | None) -> None:
            result.update(value=value, error=error)
            over.set()

        engine.post(Job(kind, fields, answer, limit_seconds))
        assert over.wait(limit_seconds + 10), f"{kind} was never answered; {engine.state()}"
        if result["error"] is not None:
            raise result["error"]
        value: dict[str, Any] = result["value"]
        return value

    def drain(self, engine: Engine, run_id: str = "run-1") -> dict[str, Any]:
        """Drain the stopped workload."""
        return self.job(engine, "drain", run_id=run_id)

    # -- what must hold ------------------------------------------------------------------------------

    def different(self, name: str = "data") -> list[int]:
        """Offsets of the granules that differ."""
        left, right = self.source(name).read_bytes(), self.replica(name).read_bytes()
        return [at for at in range(0, len(left), GRANULE) if left[at : at + GRANULE] != right[at : at + GRANULE]]

    def check_equal(self) -> None:
        """Every byte of every replica is the source's."""
        for name in self.volumes:
            assert self.different(name) == [], f"volume {name} differs after a drain"

    def check_invariant(self) -> None:
        """With no write under way: what differs is marked, or its volume is suspect."""
        self.breqd.consume()
        with self.breqd.lock:
            for key, item in self.breqd.items.items():
                marked = np.unpackbits(item.mirror, bitorder="little")
                unmarked = [at for at in self.different(key[1]) if not marked[at // GRANULE]]
                assert not unmarked or item.record.suspect, f"{key[1]}: unmarked differences at {unmarked[:8]}"

    def redirtied(self) -> int:
        """Blocks written again while they were claimed."""
        return sum(volume.redirtied_claimed_blocks for volume in self.breqd.maps.volumes.values())

    def no_help(self) -> None:
        """No second seed and no resync took part."""
        assert self.breqd.seeds == 1
        assert all(item.record.resyncs == 0 for item in self.breqd.items.values())

    def receivers(self) -> list[int]:
        """Process ids of all receivers so far."""
        path = self.directory / "receivers"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def close(self) -> None:
        """End everything."""
        self.stop_writer()
        for engine in self.engines:
            engine.stop()
        for engine in self.engines:
            engine.join(30)
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.breqd.stop()
        self.beta.close()
