# SPDX-License-Identifier: GPL-3.0-or-later
"""The real breqd as a process, over a kernel that lives in the test.

The kernel here keeps the promises of module_src/uapi: records at completion, in no order; the same
batch until CONSUMED, also to the next reader; attachments that outlive reader and control; barriers.
The volume is a regular file, so the few functions that ask sysfs about a block device are replaced.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from bmigrate.common import rpc
from bmigrate.kernel import abi, errors
from bmigrate.kernel.channel import Batch, ChannelInfo
from bmigrate.kernel.control import Attachment

GRANULE = 4096
Record = tuple[int, int, int, int, int]


class FakeKernel:
    """Attachments and the log. Its methods named ``do_*`` are what the daemon's side may call."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.entries: dict[int, dict[str, Any]] = {}
        self.log: list[tuple[int, Record]] = []
        self.pending: tuple[int, list[tuple[int, Record]]] | None = None
        self.produced = 0
        self.seq = 0
        self.handed_again = 0
        self.reader: Any = None
        self.bell: socket.socket | None = None
        self.loaded = True
        self.recorded: dict[int, int] = {}
        #: It lets all writes pass without a record.
        self.sleeps = False
        self._listener = Listener(str(path), "AF_UNIX", backlog=16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError):
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: Any) -> None:
        try:
            while True:
                name, arguments = connection.recv()
                with self.lock:
                    try:
                        connection.send((True, getattr(self, "do_" + name)(connection, *arguments)))
                    except OSError as exc:
                        connection.send((False, exc))
        except (EOFError, OSError):
            with self.lock:
                if self.reader is connection:
                    self.reader = None

    def write(self, slot: int, sector: int, count: int, flags: int = 0) -> None:
        """A request has completed."""
        with self.lock:
            entry = self.entries.get(slot)
            if entry is None or entry["draining"] or self.sleeps:
                return
            self.produced += 1
            self.recorded[entry["attachment_id"]] = self.recorded.get(entry["attachment_id"], 0) + count
            self.log.append((self.produced, (sector, count, slot, self.random.randrange(6), flags)))
            self.ring()

    def ring(self) -> None:
        """Make the channel readable."""
        if self.bell is not None and (self.log or self.pending):
            with contextlib.suppress(OSError):
                self.bell.send(b"x")

    def do_load(self, _connection: Any) -> None:
        if not self.loaded:
            raise errors.not_loaded("/dev/reqlog", OSError(2, "missing"))

    def do_open(self, connection: Any) -> None:
        self.do_load(connection)
        if self.reader is not None:
            raise errors.Busy("another reader", 16)
        self.reader = connection

    def do_bell(self, _connection: Any, path: str) -> None:
        self.bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.bell.connect(path)
        self.bell.setblocking(False)
        self.ring()

    def do_attach(self, _connection: Any, name: str, sectors: int, number: int, region: int) -> Attachment:
        slot = next(slot for slot in range(abi.MAX_SLOTS) if slot not in self.entries)
        self.entries[slot] = {
            "slot": slot, "attachment_id": self.random.getrandbits(64) or 1, "major": os.major(number),
            "minor": os.minor(number), "start_sector": 2048, "sectors": sectors, "disk_sectors": sectors + 2048,
            "diskseq": 0, "region_bytes": region, "disk": name, "partition": True, "gone": False, "beyond": False,
            "draining": False,
        }  # fmt: skip
        return Attachment(**self.entries[slot])

    def do_detach(self, _connection: Any, slot: int, attachment_id: int) -> None:
        entry = self.entries.get(slot)
        if entry is None or entry["attachment_id"] != attachment_id or entry["draining"]:
            raise errors.NotAttached("no such attachment", 2)
        entry["draining"] = True
        self._sweep()

    def _sweep(self) -> None:
        used = {record[2] for _, record in self.log + (self.pending[1] if self.pending else [])}
        for slot in [slot for slot, entry in self.entries.items() if entry["draining"] and slot not in used]:
            del self.entries[slot]

    def do_stats(self, _connection: Any, attachment_id: int) -> int:
        return self.recorded.get(attachment_id, 0)

    def do_list(self, _connection: Any) -> list[Attachment]:
        return [Attachment(**entry) for entry in self.entries.values()]

    def do_read(self, connection: Any) -> Batch | None:
        if self.pending is None:
            if not self.log:
                return None
            self.random.shuffle(self.log)
            count = self.random.randint(1, 64)
            self.seq += 1
            self.pending = (self.seq, self.log[:count])
            del self.log[:count]
            again = False
        else:
            again = True
            self.handed_again += 1
        self.given = connection
        rows = np.array([record for _, record in self.pending[1]], dtype=abi.RECORD_FIELDS)
        return Batch(self.pending[0], rows, again, False)

    def do_consumed(self, connection: Any, seq: int) -> None:
        if self.pending is None or self.pending[0] != seq or self.given is not connection:
            raise errors.StaleBatch("not handed to this reader", 116)
        self.pending = None
        self._sweep()
        self.ring()

    def do_barrier(self, _connection: Any) -> int:
        return self.produced

    def do_passed(self, _connection: Any, point: int) -> bool:
        waiting = self.log + (self.pending[1] if self.pending else [])
        return all(number > point for number, _ in waiting)

    def close(self) -> None:
        """Stop serving."""
        self._listener.close()


class _Remote:
    def __init__(self, path: str) -> None:
        self._connection = Client(path, "AF_UNIX")

    def call(self, name: str, *arguments: Any) -> Any:
        """One call into the test's kernel."""
        self._connection.send((name, arguments))
        good, answer = self._connection.recv()
        if not good:
            raise answer
        return answer

    def close(self) -> None:
        """Close."""
        self._connection.close()


class RemoteControl(_Remote):
    """/dev/reqlog."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.call("load")

    def attach(self, fd: int, region_bytes: int, volume: str = "", bio_based: bool = False) -> Attachment:
        """ATTACH."""
        status = os.fstat(fd)
        answer: Attachment = self.call("attach", volume, status.st_size // 512, status.st_ino % 1000, region_bytes)
        return answer

    def detach(self, slot: int, attachment_id: int) -> None:
        """DETACH."""
        self.call("detach", slot, attachment_id)

    def list(self) -> Any:
        """LIST."""
        return self.call("list")

    def stats(self, _slot: int, attachment_id: int) -> Any:
        """STATS."""
        return SimpleNamespace(regions_set=0, passthrough=0, sectors=self.call("stats", attachment_id))


class RemoteChannel(_Remote):
    """/dev/bufflink/reqlog."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.call("open")
        self.info = ChannelInfo(1, 4096, 1, 16384, 16384)
        self._bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        name = f"{path}.{os.getpid()}"
        self._bell.bind(name)
        self._bell.setblocking(False)
        self.call("bell", name)

    def fileno(self) -> int:
        """Readable when there may be a batch."""
        return self._bell.fileno()

    def read_batch(self) -> Any:
        """read()."""
        with contextlib.suppress(BlockingIOError):
            while self._bell.recv(16):
                pass
        return self.call("read")

    def consumed(self, seq: int) -> None:
        """CONSUMED."""
        self.call("consumed", seq)

    def barrier(self) -> Any:
        """BARRIER."""
        return self.call("barrier")

    def passed(self, point: Any) -> Any:
        """PASSED."""
        return self.call("passed", point)


@functools.cache
def _sectors(number: int) -> int:
    """Size of the file that stands for the device of that number; it stays when the path goes."""
    files = [path for path in Path(os.environ["BMIGRATE_ETC"]).parent.iterdir() if path.is_file()]
    return max(path.stat().st_size // 512 for path in files if path.stat().st_ino % 1000 == number)


def run_daemon(kernel: str) -> int:
    """In the child: the real daemon, with regular files for block devices."""
    from bmigrate.breqd import attach, loop
    from bmigrate.common import blockdev, log

    facts = Path(os.environ["HARNESS_FACTS"])

    def fact(name: str) -> Any:
        return json.loads(facts.read_text())[name]

    def counters(path: Any) -> blockdev.WriteCounters:
        return blockdev.WriteCounters(**fact("counters"))

    blockdev.device_number = lambda path: os.stat(path).st_ino % 1000
    blockdev.boot_id = lambda: str(fact("boot_id"))
    blockdev.identity = lambda path: {"size_bytes": os.stat(path).st_size, "serial": fact("serial")}
    blockdev.write_counters = counters
    blockdev.counters_of_number = lambda number: counters(None)
    blockdev.writes_in_flight = lambda number: 0
    blockdev.extent_of_number = lambda number: (fact("start"), fact("sectors") or _sectors(number))
    blockdev.open_direct = lambda path, **_: os.open(path, os.O_RDONLY)
    attach.Attacher._open_device = lambda self, device, number, volume: os.open(device, os.O_RDONLY)  # type: ignore[method-assign]
    log.setup("breqd", True)
    daemon = loop.Daemon(
        lambda: RemoteControl(kernel),  # type: ignore[arg-type, return-value]
        lambda: RemoteChannel(kernel),  # type: ignore[arg-type, return-value]
    )
    return daemon.run()


class Host:
    """One host: its directories, its boot, its daemon, and its kernel.

    Args:
        root: a temporary directory.
        volumes: name → size in bytes.
    """

    def __init__(self, root: Path, volumes: dict[str, int], seed: int = 1, role: str = "primary") -> None:
        self.root = root
        self.env = dict(os.environ, HARNESS_FACTS=str(root / "facts.json"), PYTHONPATH="src:.")
        for name in ("ETC", "STATE", "RUN"):
            (root / name.lower()).mkdir()
            self.env["BMIGRATE_" + name] = str(root / name.lower())
        self.facts: dict[str, Any] = {
            "boot_id": "boot-1",
            "serial": "s1",
            "start": 2048,
            "sectors": 0,
            "counters": {"writes": 0, "sectors_written": 0, "discards": 0, "sectors_discarded": 0, "counted": True},
        }
        self.save_facts()
        self.devices = {}
        for name, size in volumes.items():
            self.devices[name] = root / f"{name}.img"
            with open(self.devices[name], "wb") as stream:
                stream.truncate(size)
        entries = [f"{{name: {n}, devices: {{a: {p}, b: /dev/null}}}}" for n, p in self.devices.items()]
        (root / "etc" / "w.yml").write_text(
            "workload: w\nhost: a\nhosts: {a: {address: x}, b: {address: y}}\n"
            f"granule: {GRANULE}\nvolumes: [{', '.join(entries)}]\n"
        )
        self.set_role(role)
        self.seed = seed
        self.boots = 0
        self.kernel = FakeKernel(root / "kernel0", seed)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = open(root / "breqd.log", "ab")

    def save_facts(self) -> None:
        """What the replaced functions answer."""
        temporary = self.root / "facts.new"
        temporary.write_text(json.dumps(self.facts))
        temporary.rename(self.root / "facts.json")

    def set_role(self, role: str, handover: Any = None) -> None:
        """Write state.json."""
        directory = self.root / "state" / "w"
        directory.mkdir(exist_ok=True)
        fields = {"schema": 1, "workload": "w", "host": "a", "role": role, "handover": handover}
        (directory / "state.json").write_text(json.dumps(fields))

    def start(self, faults: str = "") -> None:
        """Start the daemon and wait until its socket answers, or it is dead."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import tests.unit.breqd_harness as h; h.run_daemon({str(self.kernel.path)!r})"],
            env=dict(self.env, BMIGRATE_FAULTS=faults),
            stdout=self.log,
            stderr=self.log,
        )
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.call("status")
                return
            assert time.monotonic() < deadline, "breqd did not come up"
            time.sleep(0.02)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End the daemon; by default as the OOM killer does."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(30)

    def power_cycle(self, **facts: Any) -> None:
        """A new boot: the kernel's attachments are gone, and so is /run."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.kernel.close()
        self.boots += 1
        self.kernel = FakeKernel(self.root / f"kernel{self.boots}", self.seed + self.boots)
        for path in sorted((self.root / "run").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        self.facts.update({"boot_id": f"boot-{self.boots + 1}", **facts})
        self.save_facts()

    def client(self) -> rpc.Client:
        """A connection to the daemon."""
        return rpc.Client(self.root / "run" / "breqd.sock", 20.0)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request."""
        with self.client() as client:
            return client.call(op, **fields)

    def volume(self, name: str) -> dict[str, Any]:
        """Its line of the status."""
        found: dict[str, Any] = next(item for item in self.call("status")["volumes"] if item["volume"] == name)
        return found

    def slot(self, name: str) -> int:
        """Slot of a volume's live attachment."""
        with self.kernel.lock:
            return next(
                slot
                for slot, entry in self.kernel.entries.items()
                if entry["disk"] == str(self.devices[name]) and not entry["draining"]
            )

    def close(self) -> None:
        """End everything."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.kernel.close()
        self.log.close()
