# SPDX-License-Identifier: GPL-3.0-or-later
"""The thin edge between a handover and this host: systemd, udev, devices, sockets, markers.

Each method does one thing to the host, waits until it is done, and raises an error that names it.
It decides nothing and knows no phase; tests put another object with the same methods in its place.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bmigrate.common import atomic, blockdev, paths, rpc
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError
from bmigrate.handover import names

Fields = dict[str, Any]

COMMAND_SECONDS = 120.0
#: A journal to replay, or a cache to write out, may take its time.
MOUNT_SECONDS = 600.0
SERVICE_SECONDS = 600.0
DEVICE_SECONDS = 30.0
SOCKET_RETRY_SECONDS = 20.0


class Host:
    """This host, for one workload.

    Args:
        config: the workload as configured here.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.workload = config.workload

    # -- time ---------------------------------------------------------------------------------

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def pause(self, seconds: float) -> None:
        """Between two looks at a condition."""
        time.sleep(seconds)

    def boot_id(self) -> str:
        """Random id of this boot."""
        return blockdev.boot_id()

    # -- commands -----------------------------------------------------------------------------

    def run(self, argv: Sequence[str], timeout_seconds: float = COMMAND_SECONDS) -> str:
        """Run a command and return its output.

        Raises:
            RefusedError: not found, failed or too slow; ``reason`` is command_failed.
        """
        code, output = self.attempt(argv, timeout_seconds)
        if code != 0:
            raise RefusedError(
                f"{' '.join(argv)}: exit code {code}: {output.strip()[-500:] or 'no output'}", reason="command_failed"
            )
        return output

    def attempt(self, argv: Sequence[str], timeout_seconds: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Run a command; its exit code (124 too slow, 127 not found) and output, errors included."""
        import subprocess

        try:
            done = subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=timeout_seconds,
                check=False,
                env=dict(os.environ, LC_ALL="C", PATH=os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/sbin:/sbin"),
            )
        except subprocess.TimeoutExpired:
            return 124, f"not done after {timeout_seconds:.0f} seconds"
        except OSError as exc:
            return 127, str(exc)
        return done.returncode, done.stdout.decode("utf-8", "replace")

    # -- the dead-man timer -------------------------------------------------------------------

    def arm_dead_man(self, run_id: str, seconds: float) -> None:
        """Have systemd put the workload back after ``seconds``, whatever becomes of us.

        The service goes on trying until the workload runs or the handover is committed (exit codes
        6 and 7 are its good ends).
        """
        unit = names.dead_man_unit(self.workload)
        if self.dead_man_armed():
            command = self.attempt(["systemctl", "show", "--property=ExecStart", f"{unit}.service"])[1]
            if run_id in command.split():
                return
            # One that an earlier run left would put nothing back for this one.
            self.disarm_dead_man()
        self.attempt(["systemctl", "reset-failed", f"{unit}.service", f"{unit}.timer"])
        self.run(
            [
                "systemd-run",
                "--quiet",
                f"--unit={unit}",
                f"--on-active={seconds:.3f}",
                "--timer-property=AccuracySec=100ms",
                "--property=SuccessExitStatus=6 7",
                "--property=Restart=on-failure",
                "--property=RestartSec=2",
                "--property=StartLimitIntervalSec=0",
                f"--description=Put workload {self.workload} back unless its handover is committed",
                self.program(),
                "handover",
                "resume",
                "--workload",
                self.workload,
                "--run-id",
                run_id,
                "--reason",
                "dead-man",
                "--json",
            ]
        )
        if not self.dead_man_armed():
            raise RefusedError("the dead-man timer did not start", hint=f"see: systemctl status {unit}.timer")

    def program(self) -> str:
        """The installed bmigrate."""
        return "/usr/sbin/bmigrate"

    def dead_man_armed(self) -> bool:
        """Whether the timer is waiting."""
        return (
            self.attempt(["systemctl", "is-active", "--quiet", names.dead_man_unit(self.workload) + ".timer"])[0] == 0
        )

    def disarm_dead_man(self) -> None:
        """Stop the timer (never the service: that may be us)."""
        unit = names.dead_man_unit(self.workload) + ".timer"
        code, output = self.attempt(["systemctl", "stop", unit])
        if code not in (0, 5):
            raise RefusedError(
                f"the dead-man timer {unit} cannot be stopped: {output.strip()}", reason="command_failed"
            )

    # -- permission to run --------------------------------------------------------------------

    def set_marker(self) -> None:
        """Let the workload's mounts and services start on this host.

        A clean flag that is still there goes first: were it to survive into a boot after the
        workload has written, that boot would believe it.
        """
        for volume in self.config.volumes:
            atomic.unlink_durably(paths.clean_flag(self.workload, volume.name))
        marker = paths.primary_marker(self.workload)
        marker.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        marker.write_text(self.boot_id() + "\n")

    def clear_marker(self) -> None:
        """Forbid any start from now on."""
        marker = paths.primary_marker(self.workload)
        if marker.exists():
            marker.unlink()

    def marked(self) -> bool:
        """Whether the workload may start here."""
        return paths.primary_marker(self.workload).exists()

    # -- services and mounts ------------------------------------------------------------------

    def service_state(self, service: str) -> str:
        """ActiveState of a unit."""
        return self.attempt(["systemctl", "show", "--property=ActiveState", "--value", service])[1].strip()

    def stop_service(self, service: str) -> None:
        """Stop a service and make sure that it is stopped."""
        self.run(["systemctl", "stop", service], self.config.limits.dead_man_seconds)
        found = self.service_state(service)
        if found not in ("inactive", "failed"):
            raise RefusedError(f"{service} is {found} after its stop", reason="service_runs")

    def start_service(self, service: str) -> None:
        """Start a service and wait until it says that it has started."""
        self.attempt(["systemctl", "reset-failed", service])
        self.run(["systemctl", "start", service], SERVICE_SECONDS)

    def stop_mounts(self) -> None:
        """Unmount what the workload has mounted, the innermost first."""
        for mount in reversed(self.config.mounts):
            code, output = self.attempt(["systemctl", "stop", names.mount_unit(mount.path)], MOUNT_SECONDS)
            if code not in (0, 5):
                raise RefusedError(
                    f"{mount.path} cannot be unmounted: {output.strip()[-300:]}",
                    volume=mount.volume,
                    hint="used by: " + ("; ".join(self.holders(mount.volume)) or "unknown"),
                    reason="device_busy",
                )

    def start_mounts(self) -> None:
        """Mount the workload's file systems in order."""
        for mount in self.config.mounts:
            unit = names.mount_unit(mount.path)
            self.attempt(["systemctl", "reset-failed", unit])
            try:
                self.run(["systemctl", "start", unit], MOUNT_SECONDS)
            except RefusedError as error:
                raise RefusedError(
                    f"{mount.path} cannot be mounted: {error.message}",
                    volume=mount.volume,
                    hint=f"see: systemctl status '{unit}'",
                    reason="mount_failed",
                ) from error

    def mounted(self) -> dict[str, list[str]]:
        """Per volume, where any mount namespace has it mounted."""
        return {volume.name: blockdev.mounts_of(self.config.device(volume.name)) for volume in self.config.volumes}

    def holders(self, volume: str) -> list[str]:
        """Who uses the volume's device, in words, without our own daemons."""
        return [
            text
            for text in blockdev.holders(self.config.device(volume))
            if not any(f"({name})" in text for name in ("breqd", "bmigrate-hold", "breceive"))
        ]

    # -- devices ------------------------------------------------------------------------------

    def flush_devices(self) -> None:
        """Bring every buffered write of every volume to its device.

        The file systems are gone, but a raw writer's pages may still sit in the device's own cache;
        without this they would reach the disk after the drain had read it.
        """
        for volume in self.config.volumes:
            fd = os.open(self.config.device(volume.name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                blockdev.flush_buffers(fd)
            finally:
                os.close(fd)

    def writers(self) -> dict[str, list[str]]:
        """Per volume, the processes that have its device open for writing, our daemons apart."""
        return {volume.name: blockdev_writers(self.config.device(volume.name)) for volume in self.config.volumes}

    def settle_devices(self, wait: bool) -> None:
        """Have udev look at the devices again under the present role.

        Args:
            wait: until the device units are active, so that a mount does not wait for them in vain.

        Raises:
            RefusedError: reason ``device_not_ready``.
        """
        devices = [self.config.device(volume.name) for volume in self.config.volumes]
        real = [os.path.realpath(device) for device in devices]
        self.run(["udevadm", "trigger", "--action=change", "--settle", *real], DEVICE_SECONDS)
        if not wait:
            return
        deadline = time.monotonic() + DEVICE_SECONDS
        for volume, device in zip(self.config.volumes, devices):
            unit = names.device_unit(device)
            while self.attempt(["systemctl", "is-active", "--quiet", unit])[0] != 0:
                if time.monotonic() > deadline:
                    raise RefusedError(
                        f"device unit {unit} did not become active in {DEVICE_SECONDS:.0f} seconds",
                        volume=volume.name,
                        hint=f"see: udevadm info {device}",
                        reason="device_not_ready",
                    )
                time.sleep(0.1)

    # -- daemons ------------------------------------------------------------------------------

    def breqd(self, op: str, wait_seconds: float = 30.0, **fields: Any) -> Fields:
        """Ask the tracking daemon."""
        return self._ask(paths.breqd_socket(), op, wait_seconds, fields)

    def hold(self, op: str, wait_seconds: float = 60.0, **fields: Any) -> Fields:
        """Ask the hold service."""
        return self._ask(paths.hold_socket(), op, wait_seconds, fields)

    @contextlib.contextmanager
    def holding(self, wait_seconds: float = 60.0) -> Iterator[Callable[..., Fields]]:
        """One connection to the hold service for several calls: a fence made on it ends with it, if
        nothing was noted in the state by then."""
        with self._connected(paths.hold_socket(), wait_seconds) as client:
            yield client.call

    def ship(self, op: str, wait_seconds: float = 30.0, **fields: Any) -> Fields:
        """Ask the shipping daemon."""
        return self._ask(paths.ship_socket(), op, wait_seconds, fields)

    def _ask(self, path: Any, op: str, wait_seconds: float, fields: Fields) -> Fields:
        with self._connected(path, wait_seconds) as client:
            return client.call(op, **fields)

    def _connected(self, path: Any, wait_seconds: float) -> rpc.Client:
        """A connection; tried for a while, where systemd is just restarting the daemon."""
        deadline = time.monotonic() + SOCKET_RETRY_SECONDS
        while True:
            try:
                return rpc.Client(path, wait_seconds)
            except UnreachableError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.1)

    # -- health and hooks ---------------------------------------------------------------------

    def health_check(self) -> Fields | None:
        """Repeat the configured check until it succeeds; None when none is configured.

        Raises:
            RefusedError: reason ``unhealthy`` after the timeout, with the last output.
        """
        health = self.config.health
        if health is None:
            return None
        began, attempts = time.monotonic(), 0
        while True:
            left = health.timeout_seconds - (time.monotonic() - began)
            attempts += 1
            code, output = self.attempt(health.command, max(left, 1.0))
            if code == 0:
                return {"attempts": attempts, "seconds": round(time.monotonic() - began, 6)}
            if time.monotonic() - began >= health.timeout_seconds:
                raise RefusedError(
                    f"the health check of workload {self.workload} failed for {health.timeout_seconds:.0f} seconds "
                    f"({attempts} attempts); the last: exit code {code}: {output.strip()[-300:] or 'no output'}",
                    reason="unhealthy",
                )
            time.sleep(0.2)

    def run_hooks(self, hooks: Sequence[Sequence[str]]) -> None:
        """Run the operator's hooks in order; the first failure ends it."""
        for argv in hooks:
            try:
                self.run(argv, self.config.limits.dead_man_seconds)
            except RefusedError as error:
                raise RefusedError(f"hook failed: {error.message}", reason="hook_failed") from error


def blockdev_writers(device: str) -> list[str]:
    """``process PID (NAME)`` for each process with the device open for writing, our daemons apart."""
    number = blockdev.device_number(device)
    found = []
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        base = f"/proc/{entry.name}"
        try:
            for fd in os.listdir(f"{base}/fd"):
                if os.stat(f"{base}/fd/{fd}").st_rdev != number:
                    continue
                with open(f"{base}/fdinfo/{fd}", encoding="ascii") as stream:
                    flags = next((int(line.split()[1], 8) for line in stream if line.startswith("flags:")), 0)
                if flags & os.O_ACCMODE == os.O_RDONLY:
                    continue
                with open(f"{base}/comm", encoding="utf-8", errors="replace") as stream:
                    name = stream.read().strip()
                with open(f"{base}/cmdline", "rb") as raw:
                    words = raw.read().split(b"\0")
                if any(os.path.basename(word) in (b"bmigrate-hold", b"breceive") for word in words[:3]):
                    continue
                found.append(f"process {entry.name} ({name})")
                break
        except OSError:
            continue  # the process has just ended, or one of its descriptors has been closed
    return found


def tolerate(problems: list[str], error: BmigrateError) -> None:
    """Note an error that must not stop a step; it is part of the step's result."""
    problems.append(str(error))
