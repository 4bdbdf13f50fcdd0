# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: make and take away devices of kinds that the lab's disks are not. Prints the device's path.

usage: devices.py make KIND | devices.py drop KIND

Promises that `drop` leaves nothing behind, also after a `make` that failed half way. Only stock modules are used, and
bmtest, which the host has put into modules/.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.vm.kernel_guest.command import run

CONFIG = Path("/sys/kernel/config/nvmet")
NQN = "nqn.2025-01.org.example:bmigrate-test"
FILE = Path("/var/tmp/kernel-test.img")
FILE_BYTES = 32 << 20
BMTEST = Path(__file__).resolve().parents[3] / "modules/bmtest.ko"
BMTEST_PARAMETERS = Path("/sys/module/bmtest/parameters")
DRBD_CONFIG = Path("/run/kernel-test-drbd.conf")
BCACHE = Path("/sys/block/bcache0")
LOWER_MIB = 48
HALF = LOWER_MIB * 1024  # sectors: half of the disk below, less in some tables


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
    run("modprobe", "configfs")
    try:
        run("mount", "-t", "configfs", "none", "/sys/kernel/config")
    except RuntimeError:
        # By systemd, as soon as the module is there.
        if not os.path.ismount("/sys/kernel/config"):
            raise


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
    """A disk by scsi_debug, with unmap."""
    run("modprobe", "scsi_debug", f"dev_size_mb={LOWER_MIB}", "delay=0", "lbpu=1", "lbpws=1", *options)

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


def bmtest(mib: int = 24) -> str:
    """The test disk: what it can is said in tests/driver/bmtest.c."""
    run("insmod", str(BMTEST), f"size_mib={mib}")
    path = _wait(lambda: "/dev/bmtest0" if os.path.exists("/dev/bmtest0") else None, "bmtest disk")
    run("udevadm", "settle")
    return path


def set_bmtest(**parameters: int) -> None:
    """Change what the test disk does from now on."""
    for name, value in parameters.items():
        (BMTEST_PARAMETERS / name).write_text(str(value))


def drop_bmtest() -> None:
    """Take it away."""
    _unload("bmtest")


def _lower() -> str:
    """The disk below the stacked ones: it changes what it discards and erases, and fails when told."""
    return bmtest(LOWER_MIB)


def _loop() -> str:
    with FILE.open("wb") as file:
        file.truncate(24 << 20)
    return run("losetup", "--find", "--show", str(FILE)).strip()


def _drop_loop() -> None:
    for line in run("losetup", "--noheadings", "--output", "NAME", "--associated", str(FILE)).split():
        run("losetup", "--detach", line)
    FILE.unlink(missing_ok=True)


def _brd() -> str:
    run("modprobe", "brd", "rd_nr=1", "rd_size=24576")
    return "/dev/ram0"


def _zram() -> str:
    run("modprobe", "zram", "num_devices=1")
    Path("/sys/block/zram0/disksize").write_text("24M")
    return "/dev/zram0"


def _drop_zram() -> None:
    """Not before udev has let go of it."""
    if Path("/sys/block/zram0").exists():
        run("udevadm", "settle")
        Path("/sys/block/zram0/reset").write_text("1")
    _unload("zram")


def _map(name: str, *lines: str) -> str:
    """A device of the device mapper with this table."""
    table = "".join(f"{line}\n" for line in lines)
    subprocess.run(["dmsetup", "create", f"kernel-test-{name}"], input=table, text=True, check=True)
    # Not the link: the kernel tells a refused device by its own name.
    return os.path.realpath(f"/dev/mapper/kernel-test-{name}")


def _linear() -> str:
    """Two segments, the halves of a disk exchanged: a bio over the seam is split."""
    disk = _lower()
    return _map("linear", f"0 {HALF} linear {disk} {HALF}", f"{HALF} {HALF} linear {disk} 0")


def _striped() -> str:
    """Over two devices: with both stripes on one, Linux 7.3 writes some sectors to the wrong place (docs/kernel.md)."""
    one, two = _halves()
    return _map("striped", f"0 {2 * HALF} striped 2 128 {one} 0 {two} 0")


def _crypt() -> str:
    return _map("crypt", f"0 {2 * HALF} crypt aes-xts-plain64 {'5a' * 32}{'a5' * 32} 0 {_lower()} 0 1 allow_discards")


def _halves() -> tuple[str, str]:
    disk = _lower()
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
    disk = _lower()
    meta = _map("meta", f"0 8192 linear {disk} 0")
    data = _map("data", f"0 {2 * HALF - 8192} linear {disk} 8192")
    run("dd", "if=/dev/zero", f"of={meta}", "bs=4096", "count=1", "oflag=direct", "status=none")
    pool = _map("pool", f"0 {2 * HALF - 8192} thin-pool {meta} {data} 128 0")
    run("dmsetup", "message", "kernel-test-pool", "0", "create_thin 0")
    return _map("thin", f"0 {HALF} thin {pool} 0")


def _drop_dm() -> None:
    """The upper ones first."""
    for name in (
        "part",
        "bad",
        "upper",
        "thin",
        "pool",
        "meta",
        "data",
        "snapshot",
        "origin",
        "raid1",
        "striped",
        "one",
        "two",
        "crypt",
        "linear",
    ):
        if Path(f"/dev/mapper/kernel-test-{name}").exists():
            run("dmsetup", "remove", "--retry", f"kernel-test-{name}")
    _drop_lower()


def _drop_lower() -> None:
    if Path("/dev/bmtest0").exists():
        run("wipefs", "-qa", "/dev/bmtest0")
        run("blockdev", "--rereadpt", "/dev/bmtest0")
        run("udevadm", "settle")
    drop_bmtest()


def _md(level: str) -> str:
    """An array of mdadm's over the quarters of a disk, a mirror over its halves."""
    disk = _lower()
    parts, length = (2, HALF) if level == "1" else (4, HALF // 2)
    members = [_map(f"q{n}", f"0 {length} linear {disk} {n * length}") for n in range(parts)]
    arguments = ["--level", level, "--raid-devices", str(parts), "--metadata", "1.2", "--assume-clean", *members]
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
    _drop_lower()


def partitions(path: str) -> list[str]:
    """Two partitions with a gap between, of any disk: their paths."""
    sectors = int(run("blockdev", "--getsz", path))
    table = f"label: dos\nstart=2048, size={sectors - 8192}\nstart={sectors - 4096}, size=2048\n"
    subprocess.run(["sfdisk", "-q", "--wipe", "always", path], input=table, text=True, check=True)
    run("udevadm", "settle")
    name = os.path.basename(os.path.realpath(path))
    return sorted(f"/dev/{part.name}" for part in Path(f"/sys/block/{name}").glob(f"{name}*"))


def _virtio() -> str:
    """The last of the lab's disks."""
    [path] = Path("/dev/disk/by-id").glob("virtio-bm-small-*[!0-9]")
    return os.path.realpath(path)


def _drop_virtio_partition() -> None:
    run("wipefs", "-qa", _virtio())
    run("blockdev", "--rereadpt", _virtio())


def _on_partition() -> str:
    """A volume of the device mapper on a partition of a disk."""
    return _map("part", f"0 {HALF} linear {partitions(_lower())[0]} 2048")


BAD_SECTORS = 4096


def _bad() -> str:
    _lower()
    return _map("bad", f"0 {HALF} linear /dev/bmtest0 0")


def _reload(name: str, *lines: str) -> None:
    """Give a device of the device mapper another table, as lvresize would."""
    table = "".join(f"{line}\n" for line in lines)
    subprocess.run(["dmsetup", "load", name], input=table, text=True, check=True)
    run("dmsetup", "suspend", "--noflush", name)
    run("dmsetup", "resume", name)


def _bad_segments(bad: Callable[[int], str]) -> Callable[[], AbstractContextManager[None]]:
    """Every other segment fails to be written: of a write over a seam one half is done, and the whole reports an error.

    bad: the target of a bad segment, from the sector where it begins.
    """

    @contextmanager
    def failing() -> Iterator[None]:
        good = "linear /dev/bmtest0 {start}"
        lines = []
        for start in range(0, HALF, BAD_SECTORS):
            target = bad(start) if start // BAD_SECTORS % 2 else good.format(start=start)
            lines.append(f"{start} {BAD_SECTORS} {target}")
        _reload("kernel-test-bad", *lines)
        try:
            yield
        finally:
            _reload("kernel-test-bad", f"0 {HALF} linear /dev/bmtest0 0")

    return failing


@contextmanager
def _failing_below() -> Iterator[None]:
    """Every fourth write fails after it has changed the disk."""
    set_bmtest(fail_every=4, fail_changes=1)
    try:
        yield
    finally:
        set_bmtest(fail_every=0)


SCSI_PARAMETERS = Path("/sys/bus/pseudo/drivers/scsi_debug")
SCSI_GUARD_ERRORS = "0x20"


@contextmanager
def _failing_scsi() -> Iterator[None]:
    """Every third command is executed and then reports that the data's checksum was wrong."""
    (SCSI_PARAMETERS / "every_nth").write_text("3")
    (SCSI_PARAMETERS / "opts").write_text(SCSI_GUARD_ERRORS)
    try:
        yield
    finally:
        (SCSI_PARAMETERS / "opts").write_text("0")
        (SCSI_PARAMETERS / "every_nth").write_text("0")


@contextmanager
def _failing_null() -> Iterator[None]:
    """Some sectors cannot be written. In small pieces: null_blk takes no notice of a large one."""
    pieces = [f"{first}-{first + 99}" for first in range(2000, 48000, 4000)]
    for piece in pieces:
        (NULL_DISK / "badblocks").write_text(f"+{piece}")
    try:
        yield
    finally:
        for piece in pieces:
            (NULL_DISK / "badblocks").write_text(f"-{piece}")


GROUP = "kernelgroup"
# thin_check comes with a package that the guests do not have; a pool that was just made needs none.
LVM = ("--config", 'global{thin_check_executable=""} devices{scan="/dev"}')


def _lvm(volume: str) -> str:
    """A logical volume on a disk that is one physical volume."""
    run("vgcreate", *LVM, "--physicalextentsize", "1m", GROUP, scsi())
    make = ("lvcreate", *LVM, "--yes")
    fresh = (*make, "--wipesignatures", "n", "-n", "lv")
    if volume == "thin":
        run(*fresh, "--type", "thin", "--size", "32m", "--virtualsize", "24m", "--thinpool", "pool", GROUP)
    else:
        run(*fresh, "--zero", "n", "--size", "20m", GROUP)
    if volume in ("origin", "snapshot"):
        run(*make, "--snapshot", "--size", "22m", "-n", "snap", f"{GROUP}/lv")
    run("udevadm", "settle")
    return os.path.realpath(f"/dev/{GROUP}/{'snap' if volume == 'snapshot' else 'lv'}")


def _drop_lvm() -> None:
    if any(Path("/sys/block").glob("sd*/device/model")):
        subprocess.run(["vgremove", *LVM, "--force", "--yes", GROUP], capture_output=True, text=True)
    drop_scsi()


def _pmem() -> str:
    """Memory that the guest was booted with as persistent."""
    run("modprobe", "-a", "nd_e820", "nd_pmem")
    run("udevadm", "settle")
    if not os.path.exists("/dev/pmem0"):
        raise NoDevice("the guest was booted without memmap=")
    return "/dev/pmem0"


class NoDevice(Exception):
    """This host cannot have such a device; the text says why."""


def _drbd() -> str:
    """A DRBD device that never had a peer."""
    host = os.uname().nodename
    sides = (f"  on {name} {{ address 127.0.0.1:{port}; }}\n" for name, port in ((host, 7790), ("nobody", 7791)))
    resource = f"  device /dev/drbd0;\n  disk {_lower()};\n  meta-disk internal;\n{''.join(sides)}"
    DRBD_CONFIG.write_text(f"global {{ usage-count no; }}\nresource kernel-test {{\n{resource}}}\n")
    run("modprobe", "drbd")
    for command in (("create-md", "--force"), ("up",), ("primary", "--force")):
        run("drbdadm", "-c", str(DRBD_CONFIG), *command, "kernel-test")
    return "/dev/drbd0"


def _drbd_down() -> str | None:
    """Not while udev looks at it, which it does at a time of its own."""
    run("udevadm", "settle")
    try:
        run("drbdadm", "-c", str(DRBD_CONFIG), "down", "kernel-test")
    except RuntimeError as error:
        if "held open" not in str(error):
            raise
        return None
    return "down"


def _drop_drbd() -> None:
    if DRBD_CONFIG.exists():
        _wait(_drbd_down, "end of the DRBD device")
        DRBD_CONFIG.unlink()
    _unload("drbd")
    _drop_lower()


def _bcache() -> str:
    """A backing disk without a cache."""
    disk = _lower()
    run("modprobe", "bcache")
    run("make-bcache", "-B", disk)
    run("udevadm", "settle")
    if not BCACHE.exists():
        Path("/sys/fs/bcache/register").write_text(disk)
    return _wait(lambda: "/dev/bcache0" if BCACHE.exists() and os.path.exists("/dev/bcache0") else None, "bcache disk")


def _lower_is_free() -> str | None:
    try:
        os.close(os.open("/dev/bmtest0", os.O_RDONLY | os.O_EXCL))
    except OSError:
        return None
    return "free"


def _drop_bcache() -> None:
    if BCACHE.exists():
        (BCACHE / "bcache/stop").write_text("1")
        _wait(lambda: "" if BCACHE.exists() else "gone", "end of the bcache disk")
        _wait(_lower_is_free, "end of bcache's hold on the disk below")
    _drop_lower()


def _null_zoned() -> str:
    run("modprobe", "null_blk", "nr_devices=1", "gb=1", "zoned=1", "zone_size=64", "queue_mode=2")
    return "/dev/nullb0"


NULL_DISK = Path("/sys/kernel/config/nullb/kerneltest")


def null_disk() -> str:
    """A request-based disk of 24 MiB in memory, some of whose sectors can be made bad: NULL_DISK / "badblocks"."""
    run("modprobe", "null_blk", "nr_devices=0")
    mount_configfs()
    NULL_DISK.mkdir()
    for name, value in (("size", "24"), ("blocksize", "512"), ("memory_backed", "1"), ("queue_mode", "2")):
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
    "virtio": (_virtio, lambda: None),
    "virtio-partition": (lambda: partitions(_virtio())[0], _drop_virtio_partition),
    "scsi": (scsi, drop_scsi),
    "loop": (_loop, _drop_loop),
    "nvme": (lambda: _nvme(False), _drop_nvme),
    "nvme-head": (lambda: _nvme(True), _drop_nvme),
    "null": (null_disk, drop_null),
    "bmtest": (bmtest, drop_bmtest),
    "bmtest-partition": (lambda: partitions(bmtest())[0], _drop_lower),
    "dm-linear": (_linear, _drop_dm),
    "dm-striped": (_striped, _drop_dm),
    "dm-crypt": (_crypt, _drop_dm),
    "dm-raid1": (_raid1, _drop_dm),
    "dm-origin": (lambda: _snapshot()[0], _drop_dm),
    "dm-snapshot": (lambda: _snapshot()[1], _drop_dm),
    "dm-thin": (_thin, _drop_dm),
    "dm-error": (_bad, _drop_dm),
    "dm-flakey": (_bad, _drop_dm),
    "dm-nested": (_nested, _drop_dm),
    "dm-on-partition": (_on_partition, _drop_dm),
    "lvm-linear": (lambda: _lvm("linear"), _drop_lvm),
    "lvm-thin": (lambda: _lvm("thin"), _drop_lvm),
    "lvm-origin": (lambda: _lvm("origin"), _drop_lvm),
    "lvm-snapshot": (lambda: _lvm("snapshot"), _drop_lvm),
    "md-raid0": (lambda: _md("0"), _drop_md),
    "md-raid0-in-place": (_md_in_place, _drop_md),
    "md-raid1": (lambda: _md("1"), _drop_md),
    "md-raid10": (lambda: _md("10"), _drop_md),
    "brd": (_brd, lambda: _unload("brd")),
    "zram": (_zram, _drop_zram),
    "drbd": (_drbd, _drop_drbd),
    "bcache": (_bcache, _drop_bcache),
    "zoned": (_null_zoned, drop_null),
    "pmem": (_pmem, lambda: None),
}

# What else is attached while a device is written: the disks and partitions below it.
ALSO: dict[str, tuple[str, ...]] = {
    "bmtest-partition": ("/dev/bmtest0", "/dev/bmtest0p2"),
    "dm-nested": ("/dev/mapper/kernel-test-one", "/dev/bmtest0"),
    "dm-on-partition": ("/dev/bmtest0p1", "/dev/bmtest0"),
    "lvm-linear": ("PV",),
    "md-raid0-in-place": ("/dev/mapper/kernel-test-q0", "/dev/mapper/kernel-test-q3"),
}


def also(kind: str) -> list[str]:
    """Those of a device that is there."""
    disks = [f"/dev/{path.parts[3]}" for path in Path("/sys/block").glob("sd*/device/model")]
    return [os.path.realpath(path) for name in ALSO.get(kind, ()) for path in (disks if name == "PV" else [name])]


# How writes are made to fail. Not for mirrors, snapshots and pools: they drop the disk that failed.
FAILING: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "scsi": _failing_scsi,
    "null": _failing_null,
    "dm-error": _bad_segments(lambda start: "error"),
    "dm-flakey": _bad_segments(lambda start: f"flakey /dev/bmtest0 {start} 0 3600 1 error_writes"),
    **dict.fromkeys(
        ("bmtest", "bmtest-partition", "dm-linear", "dm-striped", "dm-crypt", "dm-nested", "dm-on-partition"),
        _failing_below,
    ),
}

if __name__ == "__main__":
    verb, kind = sys.argv[1:]
    make, drop = KINDS[kind]
    drop()
    if verb == "make":
        print(make())
