# SPDX-License-Identifier: GPL-3.0-or-later
"""The host on which the kernel modules are tested, and how the guest programs get there.

Promises that the module under test is the one in module_src, alone on its host: whatever was deployed there is stopped
first and started again at the end. A host with attached volumes is left alone and the tests fail, because to unload the
module there would break what those volumes are promised.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lab import Lab
from lab.disks import disk_by_number

ROOT = Path(__file__).resolve().parents[2]
HOST = "beta"
DISK = disk_by_number(4).guest_path(HOST)
DIRECTORY = "/run/kernel-test"
DEVICES = "tests.vm.kernel_guest.devices"
UNITS = ("breqd.service", "bmigrate-ship.service", "bmigrate-hold.service")
TROUBLE = re.compile(
    r"WARNING: |BUG: (?!workqueue lockup|soft lockup)|Oops|general protection|possible (circular|recursive) locking"
    r"|corruption\.|refcount_t|scheduling while atomic|sleeping function called|use-after-free|cannot create duplicate"
)

DETACH_ALL = """
from bmigrate.kernel.channel import Channel
from bmigrate.kernel.control import Control
with Control() as control, Channel() as channel:
    for attachment in control.list():
        if not attachment.draining:
            control.detach(attachment.slot, attachment.attachment_id)
    while True:
        batch = channel.read_batch()
        if batch is None:
            break
        channel.consumed(batch.seq)
    assert not control.list()
"""

PYTHON = f"env PYTHONPATH={DIRECTORY} PYTHONDONTWRITEBYTECODE=1 python3"
UNLOAD = (
    f"if test -e /dev/reqlog; then {PYTHON} -c {shlex.quote(DETACH_ALL)} || true; fi && "
    "for m in reqlog bufflink; do test ! -e /sys/module/$m || rmmod $m || exit; done"
)


def build(
    lab: Lab, directory: Path, name: str = "modules", change: Callable[[Path], None] | None = None, **variables: str
) -> dict[str, Path]:
    """Build the modules for the guests' kernel: on this machine if it has the headers, else in the guest.

    A kernel that is not the image's own has a root with headers and compiler.

    change: what to do to the copy of the sources; variables: for make. Returns the path of each .ko, without debug
    sections.
    """
    return _build(lab, ROOT / "module_src", directory / name, ("bufflink", "reqlog"), variables, change)


def given(lab: Lab, directory: Path) -> Path:
    """A directory as an operator has it for bmigrate_kmod_prebuilt, with modules for the guests' kernel."""
    made = build(lab, directory)
    release = directory / "given" / lab.ssh(HOST, "uname -r").stdout.strip()
    release.mkdir(parents=True)
    for path in made.values():
        shutil.copy(path, release)
    return release.parent


def build_driver(lab: Lab, directory: Path) -> Path:
    """Build the test disk for the guests' kernel, in the same way; the path of bmtest.ko."""
    return _build(lab, ROOT / "tests/driver", directory / "driver", ("bmtest",), {})["bmtest"]


def _build(
    lab: Lab,
    source: Path,
    target: Path,
    names: tuple[str, ...],
    variables: dict[str, str],
    change: Callable[[Path], None] | None = None,
) -> dict[str, Path]:
    release = lab.ssh(HOST, "uname -r").stdout.strip()
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.ko", "*.o", "*.mod*", "*.cmd"))
    if change is not None:
        change(target)
    settings = [f"{key}={value}" for key, value in variables.items()]
    headers = Path("/lib/modules", release, "build")
    if lab.kernel:
        assert lab.kernel.release == release
        lab.kernel.build(target, target, *settings, modules=tuple(f"{module}.ko" for module in names))
    elif headers.is_dir():
        make = ["make", "-C", str(target), f"KDIR={headers}", *settings]
        done = subprocess.run(make, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        remote = f"{DIRECTORY}/build-{target.name}"
        lab.ssh(HOST, f"rm -rf {remote}; mkdir -p {remote}")
        unpack(lab, {str(p.relative_to(target)): p for p in target.rglob("*") if p.is_file()}, remote)
        lab.ssh(HOST, shlex.join(["make", "-C", remote, *settings]), timeout=600)
        for module in names:
            lab.get(HOST, f"{remote}/{module}.ko", target / f"{module}.ko")
    modules = {module: target / f"{module}.ko" for module in names}
    subprocess.run(["strip", "--strip-debug", *map(str, modules.values())], check=True)
    return modules


def unpack(lab: Lab, files: dict[str, Path], directory: str, host: str = HOST) -> None:
    """Put files into a directory of the guest: name there, path here."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, path in files.items():
            archive.add(path, name)
    command = [*lab.ssh_argv(host), f"mkdir -p {directory} && tar xmf - -C {directory}"]
    subprocess.run(command, input=buffer.getvalue(), check=True, timeout=120)


class Bench:
    """The host of the kernel tests, with the module under test loaded."""

    #: What one guest program may take.
    limit_seconds = 1700.0

    def __init__(self, lab: Lab, scratch: Path) -> None:
        self.lab, self.scratch = lab, scratch
        self.modules: dict[str, Path] = {}
        self.stopped: list[str] = []
        self.was_loaded = False
        self.outcomes: dict[str, Any] = {}

    def ssh(self, command: str, check: bool = True, timeout: float = 300) -> Any:
        """A shell command on the host."""
        return self.lab.ssh(HOST, command, check=check, timeout=timeout)

    def set_up(self) -> None:
        """Stop what is deployed, ship the programs, build and load the modules."""
        self.was_loaded = self.ssh("test -e /dev/reqlog", check=False).returncode == 0
        programs = [path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".json", ".yml")]
        files = {str(path.relative_to(ROOT / "src")): path for path in programs}
        files.update({str(path.relative_to(ROOT)): path for path in ROOT.glob("tests/vm/kernel_guest/*.py")})
        self.modules = build(self.lab, self.scratch)
        files.update({f"modules/{path.name}": path for path in self.modules.values()})
        files["modules/bmtest.ko"] = build_driver(self.lab, self.scratch)
        self.ssh(f"rm -rf {DIRECTORY}")
        unpack(self.lab, files, DIRECTORY)
        if self.was_loaded:
            count = "from bmigrate.kernel.control import Control; print(sum(not a.draining for a in Control().list()))"
            attached = self.python("-c", count).stdout.strip()
            assert attached == "0", f"{HOST} has {attached} attached volumes: the kernel tests need a host without"
        stop = "for u in $UNITS; do if systemctl is-active --quiet $u; then systemctl stop $u && echo $u; fi; done"
        self.stopped = self.ssh(f"UNITS={shlex.quote(' '.join(UNITS))}; {stop}").stdout.split()
        self.load("modules")

    def tear_down(self) -> None:
        """Leave the host as it was."""
        self.unload()
        again = ["modprobe reqlog"] if self.was_loaded else []
        again += [f"systemctl start {unit}" for unit in reversed(self.stopped)]
        self.ssh(" && ".join([f"blkdiscard --zeroout {DISK}", f"rm -rf {DIRECTORY}", *again]))

    def load(self, name: str, *parameters: str) -> None:
        """Load the modules in the directory `name` instead of those that are loaded."""
        insert = f"cd {DIRECTORY}/{name} && insmod bufflink.ko && insmod reqlog.ko {' '.join(parameters)}"
        self.ssh(f"{UNLOAD} && {insert}")

    def unload(self) -> None:
        """Detach everything and unload."""
        self.ssh(UNLOAD)

    def python(self, *argv: str, check: bool = True, timeout: float = 600) -> Any:
        """A Python program in the guest, which finds the bindings and the guest programs."""
        return self.ssh(f"cd {DIRECTORY} && {PYTHON} {shlex.join(argv)}", check=check, timeout=timeout)

    def case(self, program: str, case: str) -> Any:
        """The result of one case. The first one that is asked for runs all of its program."""
        if program not in self.outcomes:
            self.outcomes[program] = json.loads(self.watched(f"case_{program}", DISK))
        outcome = self.outcomes[program][case]
        assert "result" in outcome, outcome["error"]
        return outcome["result"]

    def truth(self, workload: str, device: str, seed: int, *options: str) -> dict[str, Any]:
        """Run a workload on a device while it is tracked. What the log had, and what it missed."""
        print(f"seed {seed}: {workload} on {device}")
        output = self.watched("truth", workload, device, "--seed", str(seed), *options)
        result: dict[str, Any] = json.loads(output)
        return result

    def rows(self, kinds: Iterable[str], seed: int, operations: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """Rows of the truth table: the operations, or each, on a device of each of these kinds; see matrix.py."""
        chosen = ["--operations", ",".join(operations)] if operations else []
        result: dict[str, dict[str, Any]] = json.loads(self.watched("matrix", *kinds, "--seed", str(seed), *chosen))
        return result

    def race(self, seed: int) -> dict[str, Any]:
        """Copy a slow disk while it is written; see race.py."""
        result: dict[str, Any] = json.loads(self.watched("race", "--seed", str(seed)))
        return result

    def watched(self, program: str, *argv: str) -> str:
        """A guest program that must succeed and leave no trace of trouble in the kernel log. Its last line."""
        answer = self.python("-m", "tests.vm.kernel_guest.watched", program, *argv, timeout=self.limit_seconds).stdout
        done = json.loads(answer.strip().splitlines()[-1])
        log = "\n".join(done["log"])
        assert done["status"] == 0, f"{program} {' '.join(argv)}:\n{done['output']}{done['errors']}\nkernel log:\n{log}"
        assert not TROUBLE.search(log), log
        return str(done["output"].strip().splitlines()[-1])

    def make_device(self, kind: str) -> str:
        """A device of another kind; see devices.py."""
        return str(self.python("-m", DEVICES, "make", kind).stdout.strip().splitlines()[-1])

    def drop_device(self, kind: str) -> None:
        """Take it away."""
        self.python("-m", DEVICES, "drop", kind)


@contextmanager
def bench_of(lab: Lab, scratch: Path) -> Iterator[Bench]:
    """The host with the modules under test for a while; afterwards with what was deployed there."""
    made = Bench(lab, scratch)
    try:
        made.set_up()
        yield made
    finally:
        made.tear_down()
