# SPDX-License-Identifier: GPL-3.0-or-later
"""One guest on the host's side: its directory, its two processes, its power.

Promises: `kill` is a power cut (the disk server goes first, so nothing unflushed survives, then QEMU, before the guest
can notice); the same ports and disks come back with `start`. Must never signal a process that is not this guest's.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lab import image, qemu
from lab.disks import DISKS, VM_NAMES
from lab.errors import LabError
from lab.kernels import Kernel
from lab.paths import REPOSITORY
from lab.procs import Process
from lab.waiting import wait


class Guest:
    """The guest `name` of the instance `label`, in `directory`."""

    def __init__(
        self,
        name: str,
        directory: Path,
        label: str,
        ports: qemu.Ports,
        peer_lan_port: int,
        kernel: Kernel | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        self.label = label
        self.ports = ports
        self._peer_lan_port = peer_lan_port
        self._kernel = kernel
        self.qemu = Process(directory / "qemu.pid")
        self.disks = Process(directory / "disks.pid")

    # -- what it is made of ------------------------------------------------------------------------------------

    def create(self, base: image.Image, own_archive: bytes) -> None:
        """Make its disks; what is there already stays."""
        self.directory.mkdir(parents=True, exist_ok=True)
        overlay = self.directory / "root.qcow2"
        if overlay.exists():
            return
        for disk in DISKS:
            with (self.directory / disk.file_name).open("wb") as file:
                file.truncate(disk.size_bytes)
        kernel, first = base.kernel, base.initramfs
        if self._kernel:
            kernel, first = self._kernel.vmlinuz, self._kernel.initramfs
        (self.directory / "initramfs.cpio").write_bytes(first.read_bytes() + own_archive)
        shutil.copyfile(kernel, self.directory / "vmlinuz")
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base.root), str(overlay)]
        made = subprocess.run(argv, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise LabError(f"{self.name}: qemu-img failed: {made.stderr.strip()}")

    @property
    def console_file(self) -> Path:
        """All that the guest's console said, over all its boots."""
        return self.directory / "console.log"

    def disk_file(self, number: int) -> Path:
        """The raw file of the data disk `number`; complete only after a flush."""
        return self.directory / next(disk.file_name for disk in DISKS if disk.number == number)

    def console_text(self) -> str:
        """All of it; empty before the first boot."""
        return self.console_file.read_text(errors="replace") if self.console_file.exists() else ""

    def note(self, text: str) -> None:
        """Put a line of the lab's own into the console's file."""
        with self.console_file.open("a") as console:
            console.write(f"\n--- {text}\n")

    def console(self, lines: int = 40) -> str:
        """The last lines of the console, and what QEMU itself said."""
        parts = []
        for path in (self.console_file, self.directory / "qemu.log", self.directory / "disks.log"):
            if path.exists():
                last = path.read_text(errors="replace").splitlines()[-lines:]
                parts.append(f"--- {self.name}: {path.name}\n" + "\n".join(last))
        return "\n".join(parts)

    # -- power -------------------------------------------------------------------------------------------------

    def running(self) -> bool:
        """Whether its QEMU runs."""
        return not self.qemu.gone()

    def start(self) -> None:
        """Power on; returns when QEMU runs, long before ssh answers."""
        if self.running():
            return
        self.disks.end()
        with self.console_file.open("a") as console:
            console.write(f"\n--- power on {datetime.datetime.now(datetime.timezone.utc).isoformat()}\n")
        for name in ("disks.sock", "control.sock", "monitor.sock"):
            (self.directory / name).unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        server = [sys.executable, "-m", "lab.diskserver", str(self.directory)]
        self.disks.spawn(server, self.directory / "disks.log", REPOSITORY, environment)
        self._wait_for_socket("control.sock", self.disks)
        index = VM_NAMES.index(self.name) + 1
        kernel, modules = self.directory / "vmlinuz", self._kernel.modules if self._kernel else None
        argv = qemu.arguments(self.name, index, self.ports, self._peer_lan_port, kernel, self.label, modules)
        try:
            self.qemu.spawn(argv, self.directory / "qemu.log", self.directory)
        except FileNotFoundError as error:
            self.disks.end()
            raise LabError(f"{argv[0]} is not installed: run `make setup`") from error
        self._wait_for_socket("monitor.sock", self.qemu)

    def _wait_for_socket(self, name: str, process: Process) -> None:
        def ready() -> bool:
            if process.gone():
                raise LabError(f"{self.name}: a process ended at once\n{self.console(15)}")
            try:
                qemu.connect(self.directory / name).close()
            except OSError:
                return False
            return True

        wait(ready, 60, f"{name} of {self.name}", 0.05, lambda: self.console(15))

    def kill(self) -> None:
        """Cut the power: whatever the guest had not flushed to its data disks is gone."""
        self.disks.end(signal.SIGKILL)
        # Not the monitor's `quit`: it would wait for the disk server. An overlay in qcow2 format keeps what the
        # guest had flushed, since QEMU writes its metadata at each flush, in order.
        self.qemu.end(signal.SIGKILL)

    def panicked(self) -> bool:
        """Whether the kernel gave up since the power was switched on."""
        boot = self.console_file.read_text(errors="replace").rpartition("--- power on")[2]
        return "Kernel panic - not syncing" in boot

    def powered_off(self) -> bool:
        """Whether the guest has switched itself off."""
        return self.qemu.gone()

    def end_disks_in_good_order(self) -> None:
        """After the guest is off: bring what it wrote to the files, and end their server."""
        self.disks.end(signal.SIGTERM)

    # -- the monitor and the disk server -----------------------------------------------------------------------

    def set_link(self, up: bool) -> None:
        """Plug the LAN in or out; the controller's own connection stays."""
        qemu.monitor(self.directory / "monitor.sock", "set_link", {"name": "lan", "up": up})

    def control(self, command: dict[str, Any]) -> dict[str, Any]:
        """Ask the disk server (diskserver.py says what it knows); returns the counters of each disk by number.

        Raises:
            LabError: it does not run, or refused.
        """
        try:
            with qemu.connect(self.directory / "control.sock") as conn, conn.makefile("rw") as stream:
                conn.settimeout(60)
                stream.write(json.dumps(command) + "\n")
                stream.flush()
                answer = json.loads(stream.readline())
        except OSError as error:
            raise LabError(f"{self.name}: its disk server does not answer ({error}); is it running?") from error
        if not answer["ok"]:
            raise LabError(f"{self.name}: the disk server refused {command}: {answer['error']}")
        data: dict[str, Any] = answer["data"]
        return data
