# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: the real breqd over the real module, with directories of its own.

Promises that every volume has a workload of its own, of which this host is primary, and that nothing is left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from bmigrate.common import paths, rpc
from bmigrate.common.errors import BmigrateError
from tests.vm.kernel_guest.cases import wait_for

ROOT = Path("/run/kernel-test-life")
GRANULE = 4096


class Host:
    """breqd and what it keeps. Enter it with the devices' paths; the volume of the first is called v0."""

    def __init__(self, *devices: str, starts: bool = True) -> None:
        self.starts = starts
        self.devices = dict(zip((f"v{n}" for n in range(len(devices))), devices))
        self.epoch = 0
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Host:
        shutil.rmtree(ROOT, ignore_errors=True)
        for name in ("ETC", "STATE", "RUN"):
            (ROOT / name.lower()).mkdir(parents=True)
            os.environ["BMIGRATE_" + name] = str(ROOT / name.lower())
        for name, device in self.devices.items():
            (ROOT / "etc" / f"{name}.yml").write_text(
                f"workload: {name}\nhost: a\nhosts: {{a: {{address: x}}, b: {{address: y}}}}\ngranule: {GRANULE}\n"
                f"volumes: [{{name: data, devices: {{a: {device}, b: /dev/null}}}}]\n"
            )
            (ROOT / "state" / name).mkdir()
            state = {"schema": 1, "workload": name, "host": "a", "role": "primary"}
            (ROOT / "state" / name / "state.json").write_text(json.dumps(state))
        if self.starts:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            print((ROOT / "log").read_text()[-4000:], file=sys.stderr)
        for name in self.devices:
            (ROOT / "etc" / f"{name}.yml").unlink(missing_ok=True)
        if self.process is not None and self.process.poll() is None:
            for name in self.devices:
                rpc.call(paths.breqd_socket(), "detach", 60.0, workload=name, volume="data")
            self.kill(signal.SIGTERM)
        shutil.rmtree(ROOT)

    def start(self, answers: bool = True) -> None:
        """Start breqd and wait until it answers."""
        with (ROOT / "log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "bmigrate", "breqd"], stdout=log, stderr=log)
        if not answers:
            return
        process = self.process
        wait_for(lambda: self._answers() or process.poll() is not None, "breqd to answer")
        assert process.poll() is None, (ROOT / "log").read_text()

    def _answers(self) -> bool:
        try:
            self.call("status")
        except BmigrateError:
            return False
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        """End breqd."""
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """One request."""
        return rpc.call(paths.breqd_socket(), op, 60.0, **fields)

    def ask(self, op: str, name: str = "v0", **fields: Any) -> dict[str, Any]:
        """One request about a volume."""
        return self.call(op, workload=name, volume="data", **fields)

    def status(self, name: str = "v0") -> dict[str, Any]:
        """A volume's line."""
        return dict(self.call("status", workload=name)["volumes"][0])

    def until(self, words: str, name: str = "v0") -> dict[str, Any]:
        """Wait until the volume is tracked and suspect for a reason with these words; its status then."""
        wait_for(
            lambda: self.status(name)["attached"] and words in str(self.status(name)["suspect"]),
            f"'{words}' in {self.status(name)}",
        )
        return self.status(name)

    def in_step(self, name: str = "v0") -> None:
        """As if all had been shipped: nothing dirty, nothing suspect."""
        self.ask("attach", name, mode="seed")
        while self.claim(name):
            pass
        status = self.status(name)
        assert status["attached"] and not status["suspect"] and not status["dirty_bytes"], status

    def claim(self, name: str = "v0") -> list[list[int]]:
        """Claim all that is dirty by now and acknowledge it; its extents, in bytes."""
        self.epoch += 1
        extents: list[list[int]] = []
        with rpc.Client(paths.breqd_socket(), 60.0) as client:
            client.call("fence", workload=name, epoch=self.epoch, fence_id=str(self.epoch))
            client.call("barrier", workload=name)
            about = {"workload": name, "volume": "data"}
            while True:
                taken = client.call("claim", epoch=self.epoch, max_bytes=1 << 40, from_offset_bytes=0, **about)
                if taken["claim"] is None:
                    return extents
                extents += taken["extents"]
                client.call("ack", claim=taken["claim"], **about)


def covers(extents: list[list[int]], offset: int, length: int = 1) -> bool:
    """Whether a byte range is in one of the extents."""
    return any(first <= offset and offset + length <= first + size for first, size in extents)
