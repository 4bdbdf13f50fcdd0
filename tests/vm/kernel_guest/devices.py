# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: make and take away devices of kinds that the lab's disks are not. Prints the device's path.

usage: devices.py make KIND | devices.py drop KIND

Promises that `drop` leaves nothing behind, also after a `make` that failed half way. Only stock modules are used.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.vm.kernel_guest.command import run

CONFIG = Path("/sys/kernel/config/nvmet")
NQN = "nqn.2025-01.org.example:bmigrate-test"
FILE = Path("/var/tmp/kernel-test.img")
FILE_BYTES = 96 << 20


def _wait(find: Callable[[], str | None], what: str) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = find()
        if found:
            return found
        time.sleep(0.05)
    raise TimeoutError(f"no {what} appeared")


def mount_configfs() -> None:
    """Where the kernel takes orders for nvmet and null_blk."""
    if not os.path.ismount("/sys/kernel/config"):
        run("modprobe", "configfs")
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")


def _nvme(multipath: bool) -> str:
    """An nvme namespace over TCP to ourselves: a request-based disk, or with multipath a bio-based head over one."""
    # A busy emulator may stand still for longer than the usual time-outs allow.
    patience = ("io_timeout=255", "admin_timeout=255")
    run("modprobe", "nvme_core", f"multipath={'Y' if multipath else 'N'}", *patience)
    run("modprobe", "-a", "nvme_tcp", "nvmet_tcp")
    with FILE.open("wb") as file:
        file.truncate(FILE_BYTES)
    mount_configfs()
    subsystem = CONFIG / "subsystems" / NQN
    namespace = subsystem / "namespaces/1"
    port = CONFIG / "ports/1"
    namespace.mkdir(parents=True)
    (subsystem / "attr_allow_any_host").write_text("1")
    (namespace / "device_path").write_text(run("losetup", "--find", "--show", str(FILE)).strip())
    (namespace / "enable").write_text("1")
    port.mkdir()
    for name, value in (("trtype", "tcp"), ("adrfam", "ipv4"), ("traddr", "127.0.0.1"), ("trsvcid", "4420")):
        (port / f"addr_{name}").write_text(value)
    (port / "subsystems" / NQN).symlink_to(subsystem)
    with open("/dev/nvme-fabrics", "w") as fabrics:
        fabrics.write(f"transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn={NQN},keep_alive_tmo=0")
    return _wait(lambda: "/dev/nvme0n1" if os.path.exists("/dev/nvme0n1") else None, "nvme namespace")


def _drop_nvme() -> None:
    for control in Path("/sys/class/nvme").glob("nvme*/delete_controller"):
        control.write_text("1")
    port, subsystem = CONFIG / "ports/1", CONFIG / "subsystems" / NQN
    if (port / "subsystems" / NQN).is_symlink():
        (port / "subsystems" / NQN).unlink()
    for directory in (port, subsystem / "namespaces/1", subsystem):
        if directory.exists():
            directory.rmdir()
    _unload("nvme_tcp", "nvmet_tcp", "nvmet", "nvme_fabrics", "nvme_core")
    for line in run("losetup", "--noheadings", "--output", "NAME", "--associated", str(FILE)).split():
        run("losetup", "--detach", line)
    FILE.unlink(missing_ok=True)


def _unload(*modules: str) -> None:
    """rmmod what is loaded; a disk that was just let go of may hold its driver for a moment."""
    for module in modules:
        for _ in range(100):
            if not Path("/sys/module", module).exists():
                break
            if not subprocess.run(["rmmod", module], capture_output=True).returncode:
                break
            time.sleep(0.05)
        else:
            run("rmmod", module)


def scsi(*options: str) -> str:
    """A disk of 64 MiB by scsi_debug, with unmap."""
    run("modprobe", "scsi_debug", "dev_size_mb=64", "delay=0", "lbpu=1", "lbpws=1", *options)

    def find() -> str | None:
        for model in Path("/sys/block").glob("sd*/device/model"):
            if model.read_text().strip() == "scsi_debug":
                return f"/dev/{model.parts[3]}"
        return None

    path = _wait(find, "scsi_debug disk")
    run("udevadm", "settle")
    return path


def drop_scsi() -> None:
    """Take it away."""
    _unload("scsi_debug")


def _brd() -> str:
    run("modprobe", "brd", "rd_nr=1", "rd_size=16384")
    return "/dev/ram0"


def _zram() -> str:
    run("modprobe", "zram", "num_devices=1")
    Path("/sys/block/zram0/disksize").write_text("16M")
    return "/dev/zram0"


def _drop_zram() -> None:
    if Path("/sys/block/zram0").exists():
        Path("/sys/block/zram0/reset").write_text("1")
    _unload("zram")


HALF = 65536  # sectors: half of the scsi_debug disk, less in some tables


def _map(name: str, *lines: str) -> str:
    """A device of the device mapper with this table."""
    table = "".join(f"{line}\n" for line in lines)
    subprocess.run(["dmsetup", "create", f"kernel-test-{name}"], input=table, text=True, check=True)
    # Not the link: the kernel tells a refused device by its own name.
    return os.path.realpath(f"/dev/mapper/kernel-test-{name}")


def _linear() -> str:
    """Two segments, the halves of a disk exchanged: a bio over the seam is split."""
    disk = scsi()
    return _map("linear", f"0 {HALF} linear {disk} {HALF}", f"{HALF} {HALF} linear {disk} 0")


def _striped() -> str:
    disk = scsi()
    return _map("striped", f"0 {2 * HALF} striped 2 128 {disk} 0 {disk} {HALF}")


def _crypt() -> str:
    return _map("crypt", f"0 {2 * HALF} crypt aes-xts-plain64 {'5a' * 32}{'a5' * 32} 0 {scsi()} 0 1 allow_discards")


def _halves() -> tuple[str, str]:
    disk = scsi()
    return _map("one", f"0 {HALF} linear {disk} 0"), _map("two", f"0 {HALF} linear {disk} {HALF}")


def _raid1() -> str:
    one, two = _halves()
    return _map("raid1", f"0 {HALF} raid raid1 3 0 region_size 1024 2 - {one} - {two}")


def _snapshot() -> tuple[str, str]:
    """Origin and snapshot of it; both may be written."""
    one, two = _halves()
    run("dd", "if=/dev/zero", f"of={two}", "bs=4096", "count=1", "oflag=direct", "status=none")
    origin = _map("origin", f"0 {HALF} snapshot-origin {one}")
    return origin, _map("snapshot", f"0 {HALF} snapshot {one} {two} N 8")


def _thin() -> str:
    """A thin volume, larger than what its pool can hold is written."""
    disk = scsi()
    meta = _map("meta", f"0 8192 linear {disk} 0")
    data = _map("data", f"0 {2 * HALF - 8192} linear {disk} 8192")
    run("dd", "if=/dev/zero", f"of={meta}", "bs=4096", "count=1", "oflag=direct", "status=none")
    pool = _map("pool", f"0 {2 * HALF - 8192} thin-pool {meta} {data} 128 0")
    run("dmsetup", "message", "kernel-test-pool", "0", "create_thin 0")
    return _map("thin", f"0 {HALF} thin {pool} 0")


def _drop_dm() -> None:
    """The upper ones first."""
    for name in (
        "upper",
        "thin",
        "pool",
        "meta",
        "data",
        "snapshot",
        "origin",
        "raid1",
        "one",
        "two",
        "crypt",
        "striped",
        "linear",
    ):
        if Path(f"/dev/mapper/kernel-test-{name}").exists():
            run("dmsetup", "remove", "--retry", f"kernel-test-{name}")
    drop_scsi()


def _md(level: str) -> str:
    """An array of mdadm's over four quarters of a disk."""
    disk = scsi()
    quarters = [_map(f"q{n}", f"0 {HALF // 2} linear {disk} {n * HALF // 2}") for n in range(4)]
    arguments = ["--level", level, "--raid-devices", "4", "--metadata", "1.2", "--assume-clean", *quarters]
    run("mdadm", "--create", "/dev/md/kernel-test", "--run", *arguments)
    run("udevadm", "settle")
    return os.path.realpath("/dev/md/kernel-test")


def _md_in_place() -> str:
    """A raid0 that submits its bios again in place, for its members."""
    path = _md("0")
    Path(f"/sys/block/{os.path.basename(path)}/queue/iostats").write_text("0")
    return path


def _nested() -> str:
    """A volume on kernel-test-one."""
    one, _ = _halves()
    return _map("upper", f"0 {HALF // 2} linear {one} 4096")


def _drop_md() -> None:
    if Path("/dev/md/kernel-test").exists():
        run("mdadm", "--stop", "/dev/md/kernel-test")
    for number in range(4):
        if Path(f"/dev/mapper/kernel-test-q{number}").exists():
            run("dmsetup", "remove", "--retry", f"kernel-test-q{number}")
    drop_scsi()


def _null_zoned() -> str:
    run("modprobe", "null_blk", "nr_devices=1", "gb=1", "zoned=1", "zone_size=64", "queue_mode=2")
    return "/dev/nullb0"


NULL_DISK = Path("/sys/kernel/config/nullb/kerneltest")


def null_disk() -> str:
    """A request-based disk of 16 MiB in memory, some of whose sectors can be made bad: NULL_DISK / "badblocks"."""
    run("modprobe", "null_blk", "nr_devices=0")
    mount_configfs()
    NULL_DISK.mkdir()
    for name, value in (("size", "16"), ("blocksize", "512"), ("memory_backed", "1"), ("queue_mode", "2")):
        (NULL_DISK / name).write_text(value)
    (NULL_DISK / "power").write_text("1")
    # Named after the directory since Linux 6.0, before that by its index.
    paths = (f"/dev/{NULL_DISK.name}", f"/dev/nullb{(NULL_DISK / 'index').read_text().strip()}")
    return _wait(lambda: next(filter(os.path.exists, paths), None), "null_blk disk")


def drop_null() -> None:
    """Take it away."""
    if NULL_DISK.exists():
        NULL_DISK.rmdir()
    _unload("null_blk")


KINDS: dict[str, tuple[Callable[[], str], Callable[[], None]]] = {
    "nvme": (lambda: _nvme(False), _drop_nvme),
    "nvme-head": (lambda: _nvme(True), _drop_nvme),
    "scsi": (scsi, drop_scsi),
    "brd": (_brd, lambda: _unload("brd")),
    "zram": (_zram, _drop_zram),
    "dm-linear": (_linear, _drop_dm),
    "dm-striped": (_striped, _drop_dm),
    "dm-crypt": (_crypt, _drop_dm),
    "dm-raid1": (_raid1, _drop_dm),
    "dm-origin": (lambda: _snapshot()[0], _drop_dm),
    "dm-snapshot": (lambda: _snapshot()[1], _drop_dm),
    "dm-thin": (_thin, _drop_dm),
    "md-raid0": (lambda: _md("0"), _drop_md),
    "md-raid0-in-place": (_md_in_place, _drop_md),
    "dm-nested": (_nested, _drop_dm),
    "md-raid1": (lambda: _md("1"), _drop_md),
    "md-raid10": (lambda: _md("10"), _drop_md),
    "zoned": (_null_zoned, drop_null),
}

if __name__ == "__main__":
    verb, kind = sys.argv[1:]
    make, drop = KINDS[kind]
    drop()
    if verb == "make":
        print(make())
