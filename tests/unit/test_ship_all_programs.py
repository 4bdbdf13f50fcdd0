# SPDX-License-Identifier: GPL-3.0-or-later
"""All four programs as processes, over files and a kernel of the tests: each is killed with -9 under load,
again and again, and each round ends in a drain and a comparison of every byte."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import rpc
from bmigrate.common.errors import BmigrateError
from tests.unit.breqd_harness import Host
from tests.unit.standby_host import EDGE, GENERATION, MIB, StandbyHost, wait

SIZE = 6 * MIB + 3584
BMIGRATE = "import sys; from bmigrate.cli.main import main; sys.exit(main())"


class Source(Host):
    """The primary: breqd and its kernel from the harness, and `bmigrate ship` beside it."""

    def __init__(self, root: Path, replica: Path, ssh: Path) -> None:
        super().__init__(root, {"data": SIZE}, seed=random.randrange(1 << 30))
        (root / "etc" / "w.yml").unlink()
        (root / "etc" / "wl.yml").write_text(
            "workload: wl\nhost: alpha\nhosts: {alpha: {address: 10.77.0.1}, beta: {address: 10.77.0.2}}\n"
            f"volumes: [{{name: data, devices: {{alpha: {self.devices['data']}, beta: {replica}}}}}]\n"
        )
        (root / "etc" / "keys").mkdir()
        (root / "etc" / "keys" / "wl").write_text("not used by the program in place of ssh\n")
        self.env["PATH"] = f"{ssh.parent}:{os.environ['PATH']}"
        self.ship: subprocess.Popen[bytes] | None = None
        self.role()

    def role(self, **fields: Any) -> None:
        """Primary of the generation that the standby has."""
        directory = self.root / "state" / "wl"
        directory.mkdir(exist_ok=True)
        generation = {"number": GENERATION.number, "id": GENERATION.id}
        state = {"schema": 1, "workload": "wl", "host": "alpha", "role": "primary", "generation": generation}
        (directory / "state.new").write_text(json.dumps({**state, "shipping": True, **fields}))
        (directory / "state.new").rename(directory / "state.json")

    def start_ship(self) -> None:
        """The daemon, as its unit starts it."""
        self.ship = subprocess.Popen(
            [sys.executable, "-c", BMIGRATE, "ship"], env=self.env, stdout=self.log, stderr=self.log
        )

    def command(self, *words: str, limit_seconds: float = 120.0) -> tuple[int, dict[str, Any], str]:
        """Run `bmigrate WORDS --json`; exit code, the answer, and stderr."""
        run = subprocess.run(
            [sys.executable, "-c", BMIGRATE, *words, "--json"], env=self.env, capture_output=True, timeout=limit_seconds
        )
        return run.returncode, json.loads(run.stdout), run.stderr.decode()

    def ship_call(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request to ship.sock."""
        return rpc.call(self.root / "run" / "ship.sock", op, 60.0, **fields)

    def state(self) -> str:
        """The shipper's state, or "down"."""
        try:
            return str(self.ship_call("status", workload="wl")["workloads"][0]["state"])
        except BmigrateError:
            return "down"

    def write(self, choose: random.Random) -> None:
        """One random write, recorded by the kernel when it is complete."""
        length = 512 * choose.choice((1, 3, 8, 64))
        end = SIZE if choose.random() < 0.5 else 256 * 1024
        offset = choose.randrange(0, (end - length) // 512 + 1) * 512
        data = bytes(length) if choose.random() < 0.1 else choose.randbytes(length)
        fd = os.open(self.devices["data"], os.O_WRONLY)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)
        slot = self.slot("data")
        self.kernel.write(slot, self.kernel.entries[slot]["start_sector"] + offset // 512, length // 512)


class Both:
    """Source and standby with everything running."""

    def __init__(self, directory: Path) -> None:
        (directory / "beta").mkdir()
        (directory / "alpha").mkdir()
        (directory / "bin").mkdir()
        self.standby = StandbyHost(directory / "beta", {"data": SIZE})
        self.standby.start()
        ssh = directory / "bin" / "ssh"
        words = [
            f"{key}='{value}'" for key, value in self.standby.environment.items() if key.startswith(("BMIG", "PYTHON"))
        ]
        self.pids = directory / "receivers"
        ssh.write_text(
            f"#!/bin/sh\necho $$ >> {self.pids}\n"
            f"exec env {' '.join(words)} {sys.executable} {EDGE} breceive --workload wl\n"
        )
        ssh.chmod(0o755)
        self.replica = Path(os.path.realpath(self.standby.device("data")))
        self.source = Source(directory / "alpha", self.replica, ssh)
        self.source.devices["data"].write_bytes(random.randbytes(SIZE // 2) + bytes(SIZE - SIZE // 2))
        self.source.start()
        self.source.start_ship()
        self.choose = random.Random()
        self._writing = threading.Event()
        self._writer: threading.Thread | None = None

    def start_writer(self) -> None:
        """The workload runs."""
        self._writing.set()

        def body() -> None:
            while self._writing.is_set():
                self.source.write(self.choose)
                time.sleep(0.002)

        self._writer = threading.Thread(target=body, daemon=True)
        self._writer.start()

    def stop_writer(self) -> None:
        """The workload stops."""
        self._writing.clear()
        if self._writer is not None:
            self._writer.join(10)
            self._writer = None

    def until(self, name: str, limit_seconds: float = 90.0) -> None:
        """Wait for a state."""
        try:
            wait(lambda: self.source.state() == name, f"state {name}", limit_seconds)
        except AssertionError as exc:
            log = (self.source.root / "breqd.log").read_text()[-3000:]
            raise AssertionError(f"{exc}; now {self.source.state()}\n{log}") from exc

    def receiver(self) -> int:
        """Process id of the last receiver."""
        return int(self.pids.read_text().split()[-1])

    def kill(self, who: str) -> None:
        """kill -9, and start again what systemd would start again."""
        if who == "breqd":
            self.source.kill()
            self.source.start()
        elif who == "ship":
            assert self.source.ship is not None
            self.source.ship.kill()
            self.source.ship.wait()
            self.source.start_ship()
        elif who == "hold":
            self.standby.kill_hold()
            self.standby.start()
        else:
            try:
                os.kill(self.receiver(), signal.SIGKILL)
            except ProcessLookupError:
                return  # it had ended by itself: its session was over

    def close(self) -> None:
        """End everything."""
        self.stop_writer()
        if self.source.ship is not None and self.source.ship.poll() is None:
            self.source.ship.kill()
            self.source.ship.wait()
        self.source.close()
        self.standby.close()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    """Everything running, seeding."""
    made = Both(tmp_path)
    yield made
    made.close()


def test_rounds_of_kill_9_end_equal(both: Both) -> None:
    """Each program three times at random moments under load; each round drains and compares; nothing else helps."""
    before = b""
    for number, victims in enumerate((("breceive", "ship"), ("breqd", "hold"), ("ship", "breqd", "breceive", "hold"))):
        both.start_writer()
        both.until("in_step")
        for who in victims:
            wait(lambda: both.source.volume("data")["claims_outstanding"] > 0, "a claim under way")
            both.kill(who)
        both.until("in_step")
        both.stop_writer()
        wait(lambda: both.source.state() == "in_step", "in_step")
        result = both.source.ship_call("drain", workload="wl", run_id=f"r{number}")
        content = both.source.devices["data"].read_bytes()
        assert content == both.replica.read_bytes(), f"round {number} differs"
        assert content != before, "the workload wrote nothing since the last round"
        before = content
        tracked = both.source.volume("data")
        assert (tracked["seed_count"], tracked["resync_count"], tracked["suspect"]) == (1, 0, None)
        assert len(result["digest"]) == 64
        both.source.ship_call("unseal", workload="wl")
    assert both.source.volume("data")["redirtied_claimed_blocks"] > 0
    status = both.source.ship_call("status", workload="wl")["workloads"][0]
    assert status["hashed_bytes_total"] == 0


def test_commands_answer_in_the_documented_form(both: Both) -> None:
    """sync, status, verify, pause and resume: one object, exit codes, progress on stderr only."""
    code, answer, told = both.source.command("sync", "--workload", "wl", "--wait", "--timeout", "90")
    assert (code, answer["ok"], answer["data"]["state"]) == (0, True, "in_step"), told
    assert "wl: " in told
    code, answer, _ = both.source.command("sync", "--workload", "wl", "--wait")
    assert (code, answer["changed"]) == (0, False)
    code, answer, _ = both.source.command("status")
    entry = next(item for item in answer["data"]["workloads"] if item["workload"] == "wl")
    assert code == 0 and entry["role"] == "primary" and entry["ship"]["state"] == "in_step"
    assert entry["tracking"][0]["volume"] == "data"
    assert not answer["data"]["daemons"]["bmigrate-hold"]["up"], "there is no hold on this side of the test"
    code, answer, _ = both.source.command("pause", "--workload", "wl")
    assert (code, answer["changed"]) == (0, True)
    code, answer, _ = both.source.command("sync", "--workload", "wl", "--wait")
    assert (code, answer["error"]["reason"]) == (3, "paused")
    code, answer, _ = both.source.command("verify", "--workload", "wl")
    assert (code, answer["error"]["reason"]) == (3, "paused")
    code, answer, _ = both.source.command("resume", "--workload", "wl")
    assert (code, answer["changed"]) == (0, True)
    both.until("in_step")
    code, answer, _ = both.source.command("verify", "--workload", "wl")
    assert (code, answer["data"]["different_bytes"]) == (0, 0)
    damaged = bytearray(both.replica.read_bytes())
    damaged[-1] ^= 1
    both.replica.write_bytes(bytes(damaged))
    code, answer, _ = both.source.command("verify", "--workload", "wl")
    assert (code, answer["ok"], answer["error"]["reason"]) == (3, False, "different")
    last = SIZE // 4096 * 4096
    assert answer["data"]["different_blocks"] == [{"volume": "data", "offset_bytes": last, "length_bytes": 3584}]
    code, answer, _ = both.source.command("sync", "--workload", "nosuch")
    assert (code, answer["error"]["reason"]) == (2, "unknown_workload")
    text = subprocess.run(
        [sys.executable, "-c", BMIGRATE, "status"], env=both.source.env, capture_output=True, timeout=60, check=True
    ).stdout.decode()
    assert "wl" in text and "in_step" in text and "[####" in text and "bmigrate-hold is down" in text
    assert both.source.ship is not None
    both.source.ship.terminate()
    assert both.source.ship.wait(30) == 0
    code, answer, _ = both.source.command("sync", "--workload", "wl")
    assert (code, answer["error"]["reason"]) == (4, "daemon_down")
