# SPDX-License-Identifier: GPL-3.0-or-later
"""What the VM tests stand on: the shipped playbooks run once, the daemons asked in milliseconds, the truth on the host.

Promises: deployment is by install.yml and sync.yml and by nothing else; a comparison is made on the lab host, of the
raw files, and the standby is *not* asked to flush first, so that bytes which were acknowledged but not durable show.
Must never repair anything: a test that finds the hosts in a state that it did not expect fails there.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import IO, Any

import yaml

from lab import Comparison, Lab, LabError, wait
from lab.disks import disk_by_number
from tests.ansible.playbooks import install_once, is_installed
from tests.vm import kernel_bench

ROOT = Path(__file__).resolve().parents[2]
AGENT = Path(__file__).with_name("agent.py")
INVENTORY = ROOT / "inventories" / "lab" / "group_vars" / "all.yml"
WORKLOAD = "fault"
DISK = 2
BLOCK = 4096
HOSTS = ("alpha", "beta")
LIMIT_SECONDS = 420.0
# What a call says of a daemon that is on its way up: no socket, nobody there, nothing attached yet.
BEING_STARTED = ("ConnectionRefusedError", "FileNotFoundError", "ConnectionResetError", "closed the connection")
SESSION_OVER = ("restarted", "disconnected", "not_fenced", "stale_epoch")
UNITS = {"breqd": "breqd.service", "hold": "bmigrate-hold.service", "ship": "bmigrate-ship.service"}


def workloads(streams: int) -> list[dict[str, Any]]:
    """The workloads of the lab's inventory, the fault workload with this many streams."""
    given = yaml.safe_load(INVENTORY.read_text())
    changed: list[dict[str, Any]] = [
        {**item, "hosts": given["bmigrate_lab_hosts"]} for item in given["bmigrate_workloads"]
    ]
    (mine,) = [item for item in changed if item["workload"] == WORKLOAD]
    mine["streams"] = streams
    return changed


@functools.cache
def _given(name: str) -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    """Modules for the guests of a lab, built once in a process: hosts that run one build refuse another."""
    directory = tempfile.TemporaryDirectory()
    return kernel_bench.given(Lab(name), Path(directory.name)), directory


def modules(lab: Lab) -> dict[str, str]:
    """Extra-vars of install.yml: modules built here, unless tests/ansible has had DKMS build them on these hosts."""
    if is_installed(lab):
        ours = "test -e /lib/modules/$(uname -r)/updates/bmigrate/reqlog.ko"
        if lab.ssh(HOSTS[0], ours, check=False).returncode:
            return {}
    return {"bmigrate_kmod_method": "prebuilt", "bmigrate_kmod_prebuilt": str(_given(lab.name)[0])}


def install(lab: Lab, **extra: Any) -> None:
    """Install on both hosts once."""
    install_once(lab, **modules(lab), **extra)


class Refused(AssertionError):
    """A daemon answered with an error; `.error` is what it said."""

    def __init__(self, host: str, op: str, error: dict[str, Any]) -> None:
        super().__init__(f"{host}: {op} was refused: {error}")
        self.error = error


class Agent:
    """The open connection to agent.py in one guest; opened at first use, and again after the guest was off."""

    def __init__(self, lab: Lab, host: str) -> None:
        self._lab, self.host = lab, host
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str] | None = None

    def _open(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._lab.ssh(self.host, "cat > /run/vm-test-agent.py", input_text=AGENT.read_text())
        argv = ["ssh", "-F", str(self._lab.ssh_config), "-o", "ControlPath=none", self.host]
        self._errors = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(
            [*argv, "python3 -u /run/vm-test-agent.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._line(self._process)
        return self._process

    def _line(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait(30)
            assert self._errors is not None
            self._errors.seek(0)
            raise LabError(f"{self.host}: the agent's connection ended: {self._errors.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def call(self, do: str, **fields: Any) -> Any:
        """Have the agent do one thing (agent.py names them).

        Raises:
            LabError: it failed in the guest, or the connection ended.
        """
        process = self._open()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"do": do, **fields}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self._line(process)
        if "error" in answer:
            raise LabError(f"{self.host}: {do} failed: {answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """End the connection."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                assert stream is not None
                try:
                    stream.close()
                except BrokenPipeError:
                    pass
            self._process.terminate()
            self._process.wait(30)
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None


class Rig:
    """Two deployed hosts; made once for all VM tests.

    Args:
        streams: of the fault workload's sessions.

    Attributes:
        lab: the lab's instance, up.
        times: what took how long, (name, seconds), for the summary at the end.
    """

    def __init__(self, lab: Lab, streams: int = 1) -> None:
        self.lab = lab
        self.streams = streams
        self.agents = {host: Agent(lab, host) for host in HOSTS}
        self.times: list[tuple[str, float]] = []
        self.volume = ""

    # -- deployment ----------------------------------------------------------------------------------------------

    def playbook(self, name: str, *arguments: str, limit_seconds: float = 900, check: bool = True) -> str:
        """Run a shipped playbook from the repository root, as an operator would; returns its output.

        Args:
            name: as in "install.yml".
            arguments: more of ansible-playbook's command line.
            check: fail when it fails.
        """
        beside = Path(sys.executable).with_name("ansible-playbook")
        program = str(beside) if beside.exists() else shutil.which("ansible-playbook")
        assert program, "ansible-playbook is not installed: run `make setup`"
        environment = {**os.environ, "BMIGRATE_LAB": self.lab.name, "ANSIBLE_FORCE_COLOR": "0"}
        started = time.monotonic()
        done = subprocess.run(
            [program, name, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=limit_seconds,
            check=False,
        )
        self.times.append((name, time.monotonic() - started))
        assert not check or done.returncode == 0, f"{name} exited with {done.returncode}:\n{done.stdout[-6000:]}"
        return done.stdout

    def deploy(self, *arguments: str) -> None:
        """Install on both hosts and bring the fault workload in step, by the shipped playbooks."""
        extra = {"bmigrate_workloads": workloads(self.streams)} if self.streams != 1 else {}
        install(self.lab, **extra)
        first = ["-e", f"bmigrate_initial_primary={HOSTS[0]}"]  # heeded only while no host has a role
        if extra:
            first += ["-e", json.dumps(extra)]
        self.playbook("sync.yml", "-e", f"bmigrate_workload={WORKLOAD}", *first, *arguments)
        self.find_volume()
        self.wait_in_step()

    def find_volume(self) -> None:
        """Learn the name of the fault workload's one volume from the hosts."""
        volumes = self.hold("beta", "status", workload=WORKLOAD)["volumes"]
        (self.volume,) = [item["volume"] for item in volumes]

    def close(self) -> None:
        """End the connections to the guests."""
        for agent in self.agents.values():
            agent.close()

    # -- asking --------------------------------------------------------------------------------------------------

    def run(self, host: str, *argv: str, check: bool = True, timeout_seconds: float = 300) -> str:
        """Run a command in a guest; returns its standard output."""
        done = self.agents[host].call("run", argv=list(argv), timeout_seconds=timeout_seconds)
        assert not check or done["returncode"] == 0, f"{host}: {argv} exited with {done['returncode']}: {done}"
        return str(done["stdout"])

    def _call(self, host: str, do: str, **fields: Any) -> dict[str, Any]:
        """Have an agent call a daemon; one that is being started again is waited for."""

        def answered() -> dict[str, Any]:
            try:
                return dict(self.agents[host].call(do, **fields))
            except LabError as error:
                if any(word in str(error) for word in BEING_STARTED):
                    return {}
                raise

        return wait(answered, LIMIT_SECONDS, f"a daemon on {host} to answer {do} {fields}", 0.2)

    def _ask(self, host: str, sock: str, op: str, fields: dict[str, Any]) -> dict[str, Any]:
        timeout = fields.pop("timeout_seconds", 60.0)
        answer = self._call(host, "rpc", sock=sock, op=op, fields=fields, timeout_seconds=timeout)
        if not answer.get("ok"):
            raise Refused(host, f"{sock} {op}", answer.get("error") or {})
        return dict(answer)

    def breqd(self, host: str, op: str, **fields: Any) -> dict[str, Any]:
        """Call breqd's socket on a host; raises Refused with what it answered."""
        return self._ask(host, "breqd", op, fields)

    def hold(self, host: str, op: str, **fields: Any) -> dict[str, Any]:
        """Call hold's socket on a host."""
        return self._ask(host, "hold", op, fields)

    def ship(self, host: str, op: str, **fields: Any) -> dict[str, Any]:
        """Call the ship daemon's socket on a host."""
        return self._ask(host, "ship", op, fields)

    def status(self, host: str, workload: str = WORKLOAD) -> dict[str, Any]:
        """The data of `bmigrate status --json`, as an operator sees it."""
        text = self.run(host, "bmigrate", "status", "--workload", workload, "--json", check=False)
        data: dict[str, Any] = json.loads(text)["data"]
        return data

    def tracked(self, host: str) -> dict[str, Any]:
        """What breqd says of the fault volume."""
        return self._call(host, "tracked", workload=WORKLOAD, volume=self.volume)

    def shipping(self, host: str) -> dict[str, Any]:
        """What the ship daemon says of the fault workload."""
        (entry,) = self.ship(host, "status", workload=WORKLOAD)["workloads"]
        return dict(entry)

    def held(self, host: str) -> dict[str, Any]:
        """What hold says of the fault volume."""
        (entry,) = self.hold(host, "status", workload=WORKLOAD)["volumes"]
        return dict(entry)

    def primary(self) -> str:
        """The host whose durable role is primary."""
        roles = {}
        for host in HOSTS:
            text = self.run(host, "cat", f"/var/lib/bmigrate/{WORKLOAD}/state.json")
            roles[host] = json.loads(text)["role"]
        (found,) = [host for host, role in roles.items() if role == "primary"]
        return found

    def other(self, host: str) -> str:
        """The peer of a host."""
        return HOSTS[1 - HOSTS.index(host)]

    def device(self, host: str) -> str:
        """The fault volume's device in a guest."""
        return disk_by_number(DISK).guest_path(host)

    def file(self, host: str, path: str) -> bytes:
        """A file of a guest."""
        return base64.b64decode(self.agents[host].call("read", path=path))

    # -- power ---------------------------------------------------------------------------------------------------

    def power_cut(self, host: str) -> None:
        """Cut the power of a guest: what it had not flushed is gone."""
        self.lab.kill(host)
        self.agents[host].close()

    def power_on(self, host: str) -> None:
        """Boot a guest that is off, and wait until ssh and breqd answer."""
        started = time.monotonic()
        self.lab.start(host)
        self.wait_breqd(host)
        self.times.append((f"boot of {host}", time.monotonic() - started))

    def reboot(self, host: str, wait_for_breqd: bool = True) -> None:
        """Reboot a guest in good order, and wait until ssh (and breqd) answer."""
        started = time.monotonic()
        self.agents[host].close()
        self.lab.reboot(host)
        if wait_for_breqd:
            self.wait_breqd(host)
        self.times.append((f"reboot of {host}", time.monotonic() - started))

    def wait_breqd(self, host: str) -> None:
        """Wait until breqd answers."""
        self.breqd(host, "status")

    # -- waiting -------------------------------------------------------------------------------------------------

    def wait_shipping(self, host: str, wanted: tuple[str, ...], limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """Wait until the ship daemon of the primary is in one of these states; returns its status then."""
        last: dict[str, Any] = {}

        def there() -> bool:
            try:
                last.update(self.shipping(host))
            except (LabError, Refused, ValueError) as error:
                last.update({"state": None, "why": str(error)})
            return last["state"] in wanted

        wait(there, limit_seconds, f"{host} to be {' or '.join(wanted)}", 0.3, lambda: f"last seen: {last}")
        return last

    def wait_in_step(self, workload: str = WORKLOAD, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """Wait until the fault workload is in step."""
        assert workload == WORKLOAD
        return self.wait_shipping(self.primary(), ("in_step",), limit_seconds)

    # -- the truth -----------------------------------------------------------------------------------------------

    def different_blocks(self) -> list[int]:
        """Numbers of the 4 KiB blocks in which the raw files differ as they are now; nobody is asked to flush."""
        left, right = (self.lab.disk_file(host, DISK).read_bytes() for host in HOSTS)
        assert len(left) == len(right)
        return [at // BLOCK for at in range(0, len(left), BLOCK) if left[at : at + BLOCK] != right[at : at + BLOCK]]

    def marked_blocks(self, host: str) -> set[int]:
        """The blocks of the bitmap file in a guest: dirty or claimed, after a barrier."""
        self.breqd(host, "barrier", workload=WORKLOAD)
        data = self.file(host, f"/var/lib/bmigrate/{WORKLOAD}/{self.volume}.bitmap")
        # docs/on-disk.md: "<8sIIII6Q": magic, version, header, granule, reserved; size, blocks, map bytes, offset.
        magic, _, _, granule, _, _, blocks, map_bytes, offset = struct.unpack_from("<8sIIII4Q", data)
        assert magic == b"BREQDMAP" and granule == BLOCK, (magic, granule)
        bits = data[offset : offset + map_bytes]
        return {number for number in range(blocks) if bits[number // 8] >> (number % 8) & 1}

    def drain(self, host: str, limit_seconds: float = LIMIT_SECONDS) -> dict[str, Any]:
        """Drain and leave the workload sealed: `unseal` goes on. The writer must be paused.

        A session that ends in the middle of it (a daemon was started again) is no failure: it is asked for once more.
        """

        def drained() -> dict[str, Any]:
            try:
                return self.ship(
                    host, "drain", workload=WORKLOAD, run_id=uuid.uuid4().hex, timeout_seconds=limit_seconds
                )
            except Refused as refused:
                if refused.error.get("code") == "unreachable" or refused.error.get("reason") in SESSION_OVER:
                    print(f"drain: {refused.error}", flush=True)
                    return {}
                raise

        return wait(drained, limit_seconds, f"a drain on {host}", 1.0)

    def unseal(self, host: str) -> None:
        """Ship again after a drain."""
        self.ship(host, "unseal", workload=WORKLOAD)

    def compare(self, primary: str) -> Comparison:
        """Compare the raw files on the lab host; only the primary is asked to flush its disk first."""
        self.lab.flush(primary, DISK)
        return self.lab.compare(DISK, flush=False)

    def drain_and_compare(self, host: str | None = None) -> Comparison:
        """Drain, compare on the lab host, unseal. The writer must be paused or ended.

        Returns:
            the comparison; the caller asserts `.equal`.
        """
        host = host or self.primary()
        self.drain(host)
        try:
            return self.compare(host)
        finally:
            self.unseal(host)
