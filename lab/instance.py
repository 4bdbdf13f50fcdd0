# SPDX-License-Identifier: GPL-3.0-or-later
"""A lab: two guests, their keys and ports, and everything a test or a person does with them.

Promises: `up` may be repeated and leaves both guests answering ssh; `down` leaves no process; what a command printed
is in the error when it fails. Must never run ssh without the pinned host keys.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, TypeVar

from lab import guestconfig, image, kernels, paths, ports, qemu
from lab.bootwatch import BootWatch
from lab.compare import Comparison, compare_files
from lab.disks import DISKS, VM_NAMES, disk_by_number
from lab.errors import LabError
from lab.guest import Guest
from lab.kernels import Kernel
from lab.waiting import wait

T = TypeVar("T")
# How often a guest is booted that stands still in its start, see lab/bootwatch.py.
BOOT_TRIES = 3
# Twenty times what a boot takes on a quiet machine: emulated guests on a busy one are slow, not stuck.
BOOT_LIMIT_SECONDS = float(os.environ.get("BMIGRATE_LAB_BOOT_SECONDS", "600"))


@dataclass(frozen=True)
class Completed:
    """A finished command in a guest."""

    returncode: int
    stdout: str
    stderr: str


class Lab:
    """The instance `name` (BMIGRATE_LAB, or `default`).

    A new one gets `kernel` (or the one in BMIGRATE_LAB_KERNEL) instead of the image's own, and keeps it.
    """

    vms = VM_NAMES

    def __init__(self, name: str | None = None, kernel: Kernel | None = None) -> None:
        self.name = name or paths.instance_name()
        self._wanted_kernel = kernel
        self.directory = paths.instance_directory(self.name)

    # -- files of the instance ---------------------------------------------------------------------------------

    @property
    def key(self) -> Path:
        """The private key that may log in as root."""
        return self.directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The guests' host keys, for the controller."""
        return self.directory / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        """`ssh -F THIS alpha` works."""
        return self.directory / "ssh_config"

    def exists(self) -> bool:
        """Whether the instance has been made (its guests may be off)."""
        return (self.directory / "instance.json").exists()

    def _facts(self) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = json.loads((self.directory / "instance.json").read_text())
        except FileNotFoundError as error:
            raise LabError(f"there is no lab {self.name!r}: `python3 -m lab up` makes one") from error
        return facts

    def guest(self, name: str) -> Guest:
        """The guest of that name.

        Raises:
            LabError: no such guest, or no lab.
        """
        if name not in VM_NAMES:
            raise LabError(f"no guest {name!r}: there are {' and '.join(VM_NAMES)}")
        facts = self._facts()
        other = next(vm for vm in VM_NAMES if vm != name)
        own = qemu.Ports(**facts["ports"][name])
        label = f"bmigrate-{self.name}-{name}"
        return Guest(name, self.directory / name, label, own, facts["ports"][other]["lan"], self.kernel)

    @property
    def kernel(self) -> Kernel | None:
        """The kernel of its guests, if it is not the image's own."""
        directory = self._facts().get("kernel")
        return Kernel(Path(directory)) if directory else None

    def _guests(self, names: Iterable[str] | None = None) -> list[Guest]:
        return [self.guest(name) for name in (names or VM_NAMES)]

    def port(self, name: str, service: str = "ssh") -> int:
        """The loopback port that leads to `ssh` or `postgresql` of a guest."""
        own = self.guest(name).ports
        return own.ssh if service == "ssh" else own.postgresql

    def disk_file(self, name: str, number: int) -> Path:
        """The raw file of a data disk on the host."""
        return self.guest(name).disk_file(number)

    # -- making it ---------------------------------------------------------------------------------------------

    def _create(self) -> None:
        # An instance stays with the image that its overlays rest on, also when the recipe has changed since.
        base = image.Image(Path(self._facts()["image"])) if self.exists() else image.ensure()
        if not base.root.exists():
            raise LabError(f"lab {self.name}: its image {base.directory} is gone: run `python3 -m lab down`, then up")
        if not self.exists():
            self._write_instance(base)
        kernel = self.kernel
        for guest in self._guests():
            own = self.directory / "keys" / guest.name
            archive = guestconfig.archive(
                guest.name,
                uuid.uuid4().hex,
                own.read_bytes(),
                own.with_suffix(".pub").read_bytes(),
                self.key.with_suffix(".pub").read_bytes(),
                kernel.release if kernel else "",
            )
            guest.create(base, archive)

    def _write_instance(self, base: image.Image) -> None:
        (self.directory / "keys").mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        _new_key(self.key, f"bmigrate lab {self.name}")
        for name in VM_NAMES:
            _new_key(self.directory / "keys" / name, f"root@{name}")
        taken: set[int] = set()
        for other in self.directory.parent.glob("*/instance.json"):
            for noted in json.loads(other.read_text())["ports"].values():
                taken |= set(noted.values())
        tcp, udp = socket.SOCK_STREAM, socket.SOCK_DGRAM
        free = iter(ports.choose([tcp, tcp, udp] * len(VM_NAMES), taken, self.name))
        chosen = {name: {"ssh": next(free), "postgresql": next(free), "lan": next(free)} for name in VM_NAMES}
        known, config = "", ""
        for name in VM_NAMES:
            public = " ".join((self.directory / "keys" / f"{name}.pub").read_text().split()[:2])
            known += f"[127.0.0.1]:{chosen[name]['ssh']} {public}\n"
            config += _ssh_config(name, chosen[name]["ssh"], self.key, self.known_hosts, self.directory)
        self.known_hosts.write_text(known)
        self.ssh_config.write_text(config)
        facts: dict[str, Any] = {"name": self.name, "image": str(base.directory), "ports": chosen}
        kernel = self._wanted_kernel or kernels.chosen()
        if kernel:
            facts["kernel"] = str(Kernel(kernel.directory.resolve()).directory)
            image.say(f"the guests of {self.name} get the kernel {kernel.release}")
        temporary = self.directory / "instance.json.new"
        temporary.write_text(json.dumps(facts, indent=1) + "\n")
        temporary.replace(self.directory / "instance.json")

    # -- power -------------------------------------------------------------------------------------------------

    def up(self, names: Iterable[str] | None = None, limit_seconds: float = BOOT_LIMIT_SECONDS) -> None:
        """Make what is missing, boot both guests side by side, and wait until ssh answers.

        Raises:
            LabError: a guest did not come up; the last lines of its console are in the text.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / "up.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._create()
            guests = self._guests(names)
            for guest in guests:
                guest.start()
            for guest in guests:
                self.wait_for_ssh(guest.name, limit_seconds)

    def start(self, name: str, limit_seconds: float = BOOT_LIMIT_SECONDS, wait_for_ssh: bool = True) -> None:
        """Power on one guest and wait until ssh answers (or not)."""
        self.guest(name).start()
        if wait_for_ssh:
            self.wait_for_ssh(name, limit_seconds)

    def kill(self, name: str) -> None:
        """Cut the power of one guest."""
        self.guest(name).kill()
        self._end_ssh_master(name)

    def stop(self, name: str, limit_seconds: float = 180) -> None:
        """Shut one guest down in good order and keep its disks."""
        guest = self.guest(name)
        if guest.running():
            # The connection may break before the command is answered; what counts is that the guest goes off.
            self.ssh(name, "systemctl poweroff", check=False, timeout=60)
            wait(guest.powered_off, limit_seconds, f"{name} to power off", 0.2, guest.console)
        guest.end_disks_in_good_order()
        guest.qemu.pid_file.unlink(missing_ok=True)
        self._end_ssh_master(name)

    def reboot(self, name: str, limit_seconds: float = BOOT_LIMIT_SECONDS) -> None:
        """Reboot one guest in good order and wait until the new boot answers ssh."""
        before = self.boot_id(name)
        self.ssh(name, "systemctl reboot", check=False, timeout=60)
        self._end_ssh_master(name)

        def again() -> bool:
            now = self._try_ssh(name, ["cat", "/proc/sys/kernel/random/boot_id"])
            return now is not None and now.strip() != before

        wait(again, limit_seconds, f"{name} to come back from its reboot", 1.0, self.guest(name).console)

    def boot_id(self, name: str) -> str:
        """The kernel's random id of this boot."""
        return self.ssh(name, "cat /proc/sys/kernel/random/boot_id").stdout.strip()

    def down(self, keep: bool = False) -> None:
        """End every process of the instance. With `keep`, shut down in good order first and keep the disks."""
        if not self.exists():
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        for guest in self._guests():
            if keep:
                self.stop(guest.name)
            else:
                self.kill(guest.name)
        if not keep:
            # An ssh master that was told to exit takes its socket away in its own time.
            shutil.rmtree(self.directory, onerror=_gone_is_removed)

    @staticmethod
    def prune() -> list[Path]:
        """Remove the images that no instance rests on and that today's recipe does not make; returns them.

        And the kernels that no instance has and that are not the ones of their series.
        """
        used, booted = {paths.images_directory() / image.recipe_hash()}, set()
        for file in paths.instance_directory("x").parent.glob("*/instance.json"):
            facts = json.loads(file.read_text())
            used.add(Path(facts["image"]))
            booted |= {Path(facts["kernel"]).resolve()} if "kernel" in facts else set()
        unused = [path for path in paths.images_directory().iterdir() if path.is_dir() and path not in used]
        for path in unused:
            shutil.rmtree(path)
        return [*unused, *kernels.prune(booted)]

    def link(self, up: bool, name: str | None = None) -> None:
        """Plug the LAN between the guests in or out, at one guest or at both."""
        for guest in self._guests([name] if name else None):
            guest.set_link(up)

    # -- ssh ---------------------------------------------------------------------------------------------------

    def ssh_argv(self, name: str) -> list[str]:
        """What to put before a command to run it in a guest, for callers that start it themselves."""
        return ["ssh", "-F", str(self.ssh_config), name]

    def ssh(
        self,
        name: str,
        command: str | Sequence[str],
        check: bool = True,
        timeout: float = 120,
        input_text: str | None = None,
    ) -> Completed:
        """Run a command as root in a guest (a string goes to the guest's shell as it is).

        Args:
            timeout: seconds, generous: guests are emulated.

        Raises:
            LabError: with `check`, the command failed; or it took too long.
        """
        argv = [command] if isinstance(command, str) else list(command)
        done = self._ssh(name, argv, timeout, input_text)
        if check and done.returncode != 0:
            raise LabError(
                f"{name}: {command!r} exited with {done.returncode}\n"
                f"--- stdout\n{done.stdout[-4000:]}\n--- stderr\n{done.stderr[-4000:]}"
            )
        return done

    def _ssh(
        self, name: str, command: Sequence[str], timeout: float, input_text: str | None = None, fresh: bool = False
    ) -> Completed:
        self.guest(name)
        own = ["-o", "ControlPath=none"] if fresh else []
        argv = ["ssh", "-F", str(self.ssh_config), *own, name, *command]
        stdin: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input_text is None else {"input": input_text}
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, errors="replace", timeout=timeout, check=False, **stdin
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{name}: {' '.join(command)!r} did not finish within {timeout:.0f} s") from error
        return Completed(done.returncode, done.stdout, done.stderr)

    def _try_ssh(self, name: str, command: Sequence[str]) -> str | None:
        """What a command prints over a connection of its own, or None if it cannot be run at the moment."""
        try:
            done = self._ssh(name, command, 120, fresh=True)
        except LabError:
            return None
        return done.stdout if done.returncode == 0 else None

    def _end_ssh_master(self, name: str) -> None:
        argv = ["ssh", "-F", str(self.ssh_config), "-O", "exit", name]
        subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)

    def wait_for_ssh(self, name: str, limit_seconds: float = BOOT_LIMIT_SECONDS) -> None:
        """Wait until a command runs in the guest.

        Raises:
            LabError: it did not within the limit, or QEMU ended; with the last lines of the console.
        """
        guest = self.guest(name)
        began = time.monotonic()
        mark = guest.directory / "answered"
        answered = mark.exists()
        watch, tries = BootWatch(answered), 1

        def answers() -> bool:
            nonlocal watch, tries
            if tries < BOOT_TRIES and watch.stands_still(guest.console_text(), time.monotonic()):
                watch, tries = BootWatch(answered), tries + 1
                guest.kill()
                guest.note(f"the guest stood still in its start; power on again, try {tries}")
                guest.start()
            if not guest.running():
                raise LabError(f"{name}: QEMU ended before ssh answered\n{guest.console()}")
            if guest.panicked():
                raise LabError(f"{name}: its kernel panicked\n{guest.console()}")
            # Short at first, because a connection made before the guest listens answers late; longer and longer
            # then, because on a busy machine a greeting itself may take many seconds.
            patience = min(30.0, 2 + (time.monotonic() - began) / 8)
            return _banner(guest.ports.ssh, patience) and self._try_ssh(name, ["true"]) is not None

        wait(answers, limit_seconds, f"ssh on {name}", 0.25, guest.console)
        mark.touch()

    def put(self, name: str, local: str | Path, remote: str) -> None:
        """Copy a file or directory into a guest."""
        self._copy([str(local), f"{name}:{remote}"])

    def get(self, name: str, remote: str, local: str | Path) -> None:
        """Copy a file or directory from a guest."""
        self._copy([f"{name}:{remote}", str(local)])

    def _copy(self, ends: list[str]) -> None:
        argv = ["scp", "-q", "-r", "-p", "-F", str(self.ssh_config), *ends]
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"copying {ends[0]} to {ends[1]} failed: {done.stderr.strip()}")

    # -- the truth ---------------------------------------------------------------------------------------------

    def control(self, name: str, command: dict[str, Any]) -> dict[str, Any]:
        """Ask the disk server of a guest: counters, flush, delays and failures (see diskserver.py)."""
        return self.guest(name).control(command)

    def flush(self, name: str, number: int) -> None:
        """Bring all that the guest wrote to a data disk to the raw file on the host.

        Raises:
            LabError: the guest runs and does not answer.
        """
        guest = self.guest(name)
        if guest.running():
            self.ssh(name, ["sync", disk_by_number(number).guest_path(name)])
            guest.control({"op": "flush"})

    def compare(self, disk: int = 2, flush: bool = True, count_nonzero: bool = False) -> Comparison:
        """Compare a data disk of both guests on the host.

        Args:
            disk: its number.
            flush: have running guests flush first; without it, what the raw files hold now.
            count_nonzero: also count sectors that are not all zeros, to show that there was something to compare.
        """
        if flush:
            for name in VM_NAMES:
                self.flush(name, disk)
        files = {name: self.disk_file(name, disk) for name in VM_NAMES}
        return compare_files(files, count_nonzero)

    # -- looking -----------------------------------------------------------------------------------------------

    def console(self, name: str, lines: int = 40) -> str:
        """The last lines of a guest's console."""
        return self.guest(name).console(lines)

    def status(self) -> dict[str, Any]:
        """What there is and whether it runs; `ssh` is whether sshd answers right now."""
        if not self.exists():
            return {"instance": self.name, "exists": False, "directory": str(self.directory), "guests": {}}
        guests = {}
        for guest in self._guests():
            running = guest.running()
            guests[guest.name] = {
                "running": running,
                "ssh": running and _banner(guest.ports.ssh),
                "ssh_port": guest.ports.ssh,
                "postgresql_port": guest.ports.postgresql,
                "lan_address": guestconfig.lan_address(guest.name),
                "qemu_pid": guest.qemu.pid(),
                "disks_pid": guest.disks.pid(),
                "disks": {
                    disk.name: {
                        "number": disk.number,
                        "size_bytes": disk.size_bytes,
                        "block_bytes": disk.block_bytes,
                        "guest_path": disk.guest_path(guest.name),
                        "file": str(guest.disk_file(disk.number)),
                    }
                    for disk in DISKS
                },
            }
        return {
            "instance": self.name,
            "exists": True,
            "directory": str(self.directory),
            "image": self._facts()["image"],
            "key": str(self.key),
            "known_hosts": str(self.known_hosts),
            "ssh_config": str(self.ssh_config),
            "guests": guests,
        }

    @staticmethod
    def wait(predicate: Callable[[], T], limit_seconds: float, what: str, interval_seconds: float = 0.2) -> T:
        """See lab.waiting.wait."""
        return wait(predicate, limit_seconds, what, interval_seconds)


def compare(disk: int = 2, instance: str | None = None, flush: bool = True) -> Comparison:
    """Compare a data disk of both guests on the host, after a flush; see Lab.compare."""
    return Lab(instance).compare(disk, flush)


def _banner(port: int, limit_seconds: float = 5) -> bool:
    """Whether an ssh server greets at 127.0.0.1:port (QEMU accepts long before the guest listens)."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=limit_seconds) as conn:
            return conn.recv(4) == b"SSH-"
    except OSError:
        return False


def _gone_is_removed(_function: object, _path: str, failure: tuple[Any, BaseException, Any]) -> None:
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _new_key(path: Path, comment: str) -> None:
    path.unlink(missing_ok=True)
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)]
    try:
        subprocess.run(argv, check=True, capture_output=True)
    except FileNotFoundError as error:
        raise LabError("ssh-keygen is not installed: run `make setup`") from error


def _ssh_config(name: str, port: int, key: Path, known_hosts: Path, directory: Path) -> str:
    return (
        f"Host {name}\n"
        f"  HostName 127.0.0.1\n  Port {port}\n  User root\n"
        f'  IdentityFile "{key}"\n  IdentitiesOnly yes\n'
        f'  UserKnownHostsFile "{known_hosts}"\n  GlobalKnownHostsFile none\n  StrictHostKeyChecking yes\n'
        "  BatchMode yes\n  ConnectTimeout 60\n  ServerAliveInterval 15\n  ServerAliveCountMax 8\n  LogLevel ERROR\n"
        f'  ControlMaster auto\n  ControlPersist 120\n  ControlPath "{directory}/{name}.ssh"\n'
    )
