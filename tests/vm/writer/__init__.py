# SPDX-License-Identifier: GPL-3.0-or-later
"""The random writer in a guest, as a transient unit: started with a seed, paused, resumed, ended.

Promises: `pause` returns only when no request of it is in flight; the seed is printed, and BMIGRATE_TEST_SEED sets the
first one, so that the same writes can be had again. Must never outlive the test that started it: it is a context
manager, and says so when it failed in the guest.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import LabError, wait

if TYPE_CHECKING:
    from tests.vm.rig import Rig

SOURCE = Path(__file__).with_name("writer.c")
LIMIT_SECONDS = 300.0
STATUS = "/run/vm-test-writer.json"

_given = os.environ.get("BMIGRATE_TEST_SEED")
FIRST_SEED = int(_given, 0) if _given else random.SystemRandom().getrandbits(48)


def seed_of(name: str) -> int:
    """The seed of one round: follows from the first seed and the round's name."""
    digest = hashlib.blake2b(f"{FIRST_SEED} {name}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def program(rig: Rig, host: str) -> str:
    """Compile the writer here (the guests have no C library's headers), static, and copy it; returns its path there."""
    source = SOURCE.read_bytes()
    path = f"/var/tmp/vm-test-writer-{hashlib.sha256(source).hexdigest()[:12]}"
    done = rig.agents[host].call("run", argv=["test", "-x", path])
    if done["returncode"] != 0:
        with tempfile.TemporaryDirectory() as directory:
            made = Path(directory) / "writer"
            argv = ["gcc", "-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror", "-o", str(made), str(SOURCE)]
            compiled = subprocess.run(argv, capture_output=True, text=True, check=False)
            assert compiled.returncode == 0, f"the writer does not compile:\n{compiled.stderr}"
            rig.lab.put(host, made, f"{path}.new")
        # Durable before it has its name: a power cut soon after would leave an empty program.
        rig.run(host, "sync", f"{path}.new")
        rig.run(host, "mv", f"{path}.new", path)
        rig.run(host, "sync", "/var/tmp")
    return path


class Writer:
    """A writer on the fault volume of a host.

    Args:
        name: of the round; its seed follows from it.
        operations_per_second, bytes_per_second: how fast at most.
        window_bytes: where most of what is not hot goes.
        hot_percent: how much hits the few hot spots.
        top_class: the largest size, 512 bytes << this.
    """

    def __init__(
        self,
        rig: Rig,
        host: str,
        name: str,
        operations_per_second: int = 300,
        bytes_per_second: int = 1 << 20,
        window_bytes: int = 4 << 20,
        hot_percent: int = 75,
        top_class: int = 11,
    ) -> None:
        self.rig, self.host, self.name = rig, host, name
        self.seed = seed_of(name)
        self.unit = f"vm-test-writer-{self.seed:012x}"
        pace = ["-i", str(operations_per_second), "-b", str(bytes_per_second)]
        self._options = [*pace, "-w", str(window_bytes), "-p", str(hot_percent), "-m", str(top_class)]
        self._started = False

    def start(self) -> None:
        """Start it; returns when it writes."""
        path = program(self.rig, self.host)
        print(f"writer {self.name}: seed {self.seed:#x} (BMIGRATE_TEST_SEED={FIRST_SEED:#x})", flush=True)
        command = [path, "-d", self.rig.device(self.host), "-s", str(self.seed), "-o", STATUS, *self._options]
        self.rig.run(self.host, "rm", "-f", STATUS)
        # No restart, and killed with the rest at shutdown: a reboot in good order finds nobody writing.
        unit = ["systemd-run", f"--unit={self.unit}", "--property=Type=exec"]
        self.rig.run(self.host, *unit, *command)
        self._started = True
        wait(lambda: self.status()["operations"] > 0, LIMIT_SECONDS, f"the writer on {self.host} to write", 0.1)

    def status(self) -> dict[str, Any]:
        """Its counters now."""
        try:
            status: dict[str, Any] = json.loads(self.rig.file(self.host, STATUS))
        except LabError as error:
            if "FileNotFoundError" not in str(error):
                raise
            return {"state": "absent", "operations": 0}
        assert status["state"] != "failed", f"{self.host}: the writer failed: {status['failure']}"
        assert status.get("seed", self.seed) == self.seed
        return status

    def _signal(self, name: str) -> None:
        self.rig.run(self.host, "systemctl", "kill", f"--signal={name}", self.unit)

    def _wait_state(self, *states: str) -> dict[str, Any]:
        return wait(lambda: self._status_in(states), LIMIT_SECONDS, f"the writer to be {states}", 0.05)

    def _status_in(self, states: tuple[str, ...]) -> dict[str, Any]:
        status = self.status()
        return status if status["state"] in states else {}

    def pause(self) -> dict[str, Any]:
        """No request in flight and no new one; returns the counters."""
        self._signal("SIGUSR1")
        return self._wait_state("paused")

    def resume(self) -> None:
        """Go on after a pause."""
        self._signal("SIGUSR2")
        self._wait_state("running")

    def wait_more(self, operations: int, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """Wait until it has done this many operations more than now."""
        goal = self.status()["operations"] + operations
        wait(lambda: self.status()["operations"] >= goal, limit_seconds, f"{operations} more operations", 0.05)
        return self.status()

    def stop(self) -> dict[str, Any]:
        """End it; returns its last counters, and prints them."""
        self._signal("SIGTERM")
        last = self._wait_state("ended")
        self._started = False
        print(f"writer {self.name}: {json.dumps(last)}", flush=True)
        return last

    def forget(self) -> None:
        """Its guest lost power: there is nothing left to end."""
        self._started = False

    def __enter__(self) -> Writer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None) -> None:
        if not self._started:
            return
        if kind is None:
            self.stop()
        else:
            self.rig.agents[self.host].call("run", argv=["systemctl", "stop", self.unit])
