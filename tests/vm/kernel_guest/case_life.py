# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: what happens to a tracked volume during its life. breqd is the real one.

usage: see cases.py
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from bmigrate.common import blockdev
from bmigrate.common.errors import BmigrateError
from bmigrate.kernel.control import Control
from tests.vm.kernel_guest import devices
from tests.vm.kernel_guest.cases import main, wait_for, write
from tests.vm.kernel_guest.command import run
from tests.vm.kernel_guest.host import Host, covers
from tests.vm.kernel_guest.tracker import fingerprints
from tests.vm.kernel_guest.workloads import partition_table

STORM_SECONDS = 60


def unplugged(device: str) -> dict[str, Any]:
    """A disk goes away, and another one comes under its name: suspect, and tracked anew."""
    disk = devices.scsi()
    try:
        with Host(disk) as host:
            host.in_step()
            first = host.status()["attachment_id"]
            Path(f"/sys/block/{os.path.basename(disk)}/device/delete").write_text("1")
            wait_for(lambda: not os.path.exists(disk), "the disk to go")
            gone = wait_for(lambda: host.status()["suspect"], "a suspicion")
            wait_for(lambda: not any(entry.gone for entry in _entries()), "breqd to let go of the disk")
            devices.drop_scsi()
            assert devices.scsi() == disk
            status = host.until("")
            write(disk, 64, 8)
            return {"gone": gone, "anew": status["attachment_id"] != first, "seen": covers(host.claim(), 64 * 512)}
    finally:
        devices.drop_scsi()


def _entries() -> list[Any]:
    with Control() as control:
        return list(control.list())


def resized(device: str) -> dict[str, Any]:
    """A logical volume grows and shrinks under the tracker: suspect each time, and the map has the new size."""
    disk = devices.scsi()
    try:
        run("pvcreate", "-q", "-y", disk)
        run("vgcreate", "-q", "kerneltest", disk)
        run("lvcreate", "-q", "-y", "-Wn", "-Zn", "-L", "16M", "-n", "life", "kerneltest")
        volume = "/dev/kerneltest/life"
        result: dict[str, Any] = {}
        with Host(volume) as host:
            for size in (32, 8):
                host.in_step()
                run("lvresize", "-q", "-y", "-f", "-L", f"{size}M", volume)
                status = host.until("was resized")
                _until_size(host, size << 20)
                write(volume, (size << 11) - 8, 8)
                result[str(size)] = covers(host.claim(), (size << 20) - 4096, 4096) and bool(status["suspect"])
        return result
    finally:
        subprocess.run(["vgremove", "-q", "-y", "-f", "kerneltest"], capture_output=True)
        devices.drop_scsi()


def _until_size(host: Host, size_bytes: int) -> None:
    wait_for(lambda: host.status()["size_bytes"] == size_bytes, "a map of the new size")


def partitions(device: str) -> dict[str, Any]:
    """A partition is moved, and then deleted, under the tracker."""
    disk = devices.scsi()
    try:
        partition_table(disk)
        part = f"{disk}2"
        result = {}
        with Host(part) as host:
            host.in_step()
            partition_table(disk, 2048)
            run("udevadm", "settle")
            status = wait_for(lambda: host.status()["suspect"], "a suspicion of the moved partition")
            result["moved"] = status
            wait_for(lambda: host.status()["attached"], "the partition to be tracked anew")
            host.in_step()
            run("sfdisk", "-q", "--delete", disk, "2")
            run("udevadm", "settle")
            wait_for(lambda: not host.status()["attached"], "the partition to be missed")
            result["deleted"] = host.status()["suspect"]
        return result
    finally:
        devices.drop_scsi()


def detached_under_load(device: str) -> dict[str, Any]:
    """DETACH while somebody writes: what was written before is in the kept map; afterwards nothing is believed."""
    stop, written = threading.Event(), []

    def work() -> None:
        pick = random.Random(3)
        blocks = int(run("blockdev", "--getsz", device)) // 8
        while not stop.is_set():
            sector = pick.randrange(blocks) * 8
            write(device, sector, 8)
            written.append(sector)

    with Host(device) as host:
        host.in_step()
        thread = threading.Thread(target=work)
        thread.start()
        try:
            wait_for(lambda: len(written) > 100, "writes")
            before = list(written)
            assert host.ask("detach")["detached"]
            count = len(written)
            wait_for(lambda: len(written) > count + 20, "writes after the detach")
        finally:
            stop.set()
            thread.join()
        refused_without = host.status()["suspect"]
        host.ask("attach", mode="resume")
        status = host.status()
        dirty = host.claim()
        return {
            "between": refused_without,
            "suspect": status["suspect"],
            "lost": sum(not covers(dirty, sector * 512, 4096) for sector in before),
            "after": sum(not covers(dirty, sector * 512, 4096) for sector in written[len(before) :]),
        }


def replaced(device: str) -> dict[str, Any]:
    """The module is replaced: not under an attached volume; and when it was detached for that, writes were missed."""
    with Host(device) as host:
        host.in_step()
        busy = subprocess.run(["rmmod", "reqlog"], capture_output=True).returncode
        host.ask("detach")
        host.kill(signal.SIGTERM)
        run("rmmod", "reqlog")
        write(device, 800, 8)
        run("insmod", "modules/reqlog.ko")
        host.start()
        status = host.status()
        write(device, 1600, 8)
        dirty = host.claim()
        seen = [covers(dirty, sector * 512) for sector in (800, 1600)]
        return {"busy": busy, "suspect": status["suspect"], "attached": status["attached"], "seen": seen}


def foreign(device: str) -> dict[str, Any]:
    """Somebody else detaches the volume and writes, while breqd is dead: never silent."""
    with Host(device) as host:
        host.in_step()
        host.kill()
        with Control() as control:
            [entry] = [item for item in control.list() if not item.draining]
            control.detach(entry.slot, entry.attachment_id)
        write(device, 800, 8)
        host.start()
        return {"suspect": host.status()["suspect"]}


def selftest(device: str) -> dict[str, Any]:
    """On kinds of devices: the passive test proves after a write, the active one on its own, and touches nothing."""
    result: dict[str, Any] = {}
    for kind in ("disk", "partition", "nvme", "nvme-head", "dm-linear", "dm-crypt", "dm-thin", "md-raid1"):
        path = _make(kind, device)
        try:
            with Host(path) as host:
                host.in_step()
                before = fingerprints(path)
                idle = _selftest("--json")
                active = _selftest("--active")
                same = bool((before == fingerprints(path)).all())
                write(path, 64, 8)
                passive = _selftest()
                state = host.status()["self_test"]["state"]
                result[kind] = [idle, active, same, passive, state, host.status()["suspect"]]
        finally:
            _drop(kind)
    return result


def _selftest(*options: str) -> int:
    return subprocess.run(
        [sys.executable, "-m", "bmigrate", "breqd", "selftest", *options], capture_output=True
    ).returncode


def _make(kind: str, device: str) -> str:
    if kind == "disk":
        return device
    if kind == "partition":
        disk = devices.scsi()
        partition_table(disk)
        return f"{disk}1"
    return devices.KINDS[kind][0]()


def _drop(kind: str) -> None:
    if kind == "partition":
        devices.drop_scsi()
    elif kind != "disk":
        devices.KINDS[kind][1]()


def selftest_in_use(device: str) -> dict[str, Any]:
    """The active test is refused while somebody has the device open for writing; one who reads is in no way."""
    script = "import os, sys; fd = os.open(sys.argv[1], int(sys.argv[2])); print(1, flush=True); sys.stdin.read()"
    result = {}
    with Host(device) as host:
        host.in_step()
        for name, flags in (("reader", os.O_RDONLY), ("writer", os.O_RDWR), ("holder", os.O_RDONLY | os.O_EXCL)):
            process = subprocess.Popen(
                [sys.executable, "-c", script, device, str(flags)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            try:
                assert process.stdout is not None and process.stdout.readline()
                listed = any(f"process {process.pid} " in text for text in blockdev.writers(device))
                result[name] = [_selftest("--active"), listed]
            finally:
                process.communicate()
    return result


def settled(device: str) -> dict[str, Any]:
    """A mounted volume that handles bios itself comes under tracking while files are written to it."""
    disk = devices.KINDS["dm-linear"][0]()
    where = Path("/run/kernel-test-mounted")
    where.mkdir(exist_ok=True)
    result: dict[str, Any] = {}
    stop = threading.Event()
    rounds: list[int] = []

    def work() -> None:
        pick = random.Random(5)
        while not stop.is_set():
            (where / str(pick.randrange(200))).write_bytes(pick.randbytes(20000))
            os.sync()
            rounds.append(1)

    try:
        run("mkfs.ext4", "-q", "-F", disk)
        run("mount", disk, str(where))
        thread = threading.Thread(target=work)
        thread.start()
        try:
            wait_for(lambda: len(rounds) > 3, "files")
            with Host(disk) as host:
                # Never all clean while files are written; whatever changes after the fingerprint comes after this.
                assert host.ask("attach", mode="seed")["changed"] and host.claim()
                before = fingerprints(disk)
                count = len(rounds)
                wait_for(lambda: len(rounds) > count + 10, "files after the attach: is it still frozen?")
                stop.set()
                thread.join()
                run("umount", str(where))
                changed = (before != fingerprints(disk)).nonzero()[0]
                dirty = host.claim()
                result["changed"] = len(changed)
                result["lost"] = sum(not covers(dirty, int(at) * 512) for at in changed)
                result["suspect"] = host.status()["suspect"]
        finally:
            stop.set()
            thread.join()
            subprocess.run(["umount", str(where)], capture_output=True)
        return result
    finally:
        devices.KINDS["dm-linear"][1]()


def killed_in_the_freeze(device: str) -> dict[str, Any]:
    """breqd dies between freeze and thaw: the next one thaws, before anything else."""
    disk = devices.KINDS["dm-linear"][0]()
    where = Path("/run/kernel-test-mounted")
    where.mkdir(exist_ok=True)
    try:
        run("mkfs.ext4", "-q", "-F", disk)
        run("mount", disk, str(where))
        os.environ["BMIGRATE_FAULTS"] = "breqd.frozen=kill"
        try:
            with Host(disk, starts=False) as host:
                host.start(answers=False)
                died = host.process.wait(60) if host.process else None
                writer = subprocess.Popen(["sh", "-c", f"echo x > {where}/file && sync"])
                # Frozen: the write hangs. There is no condition to wait for, so it gets a second to prove otherwise.
                try:
                    writer.wait(1)
                    hung = False
                except subprocess.TimeoutExpired:
                    hung = True
                del os.environ["BMIGRATE_FAULTS"]
                host.start()
                return {"died": died, "hung": hung, "wrote": writer.wait(60), "attached": host.status()["attached"]}
        finally:
            os.environ.pop("BMIGRATE_FAULTS", None)
            subprocess.run(["fsfreeze", "--unfreeze", str(where)], capture_output=True)
            subprocess.run(["umount", str(where)], capture_output=True)
    finally:
        devices.KINDS["dm-linear"][1]()


def raw_writer(device: str) -> dict[str, Any]:
    """A process that writes to such a device without an exclusive open: not attached while it does, and later it is."""
    disk = devices.KINDS["dm-linear"][0]()
    script = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); print(1, flush=True); sys.stdin.read()"
    try:
        process = subprocess.Popen([sys.executable, "-c", script, disk], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None and process.stdout.readline()
            with Host(disk) as host:
                problem = host.status()
                entries = len([entry for entry in _entries() if not entry.draining])
                process.communicate()
                wait_for(lambda: host.status()["attached"], "the volume to be attached when its writer has gone")
                return {"suspect": problem["suspect"], "attached": problem["attached"], "entries": entries}
        finally:
            process.communicate()
    finally:
        devices.KINDS["dm-linear"][1]()


def storm(device: str) -> dict[str, Any]:
    """Writes for a minute while breqd is stopped: memory stays bounded, nothing is lost, the widening is told."""
    with Host(device) as host:
        before = fingerprints(device)
        host.in_step()
        start = host.status()
        assert host.process is not None
        memory = []
        host.process.send_signal(signal.SIGSTOP)
        try:
            fio = subprocess.Popen(
                ["fio", "--name=storm", f"--filename={device}", "--rw=randwrite", "--bs=4k", "--direct=1",
                 "--ioengine=libaio", "--iodepth=32", "--time_based", f"--runtime={STORM_SECONDS}", "--randrepeat=0",
                 "--norandommap", "--refill_buffers", "--output-format=json", "--size=24M", "--offset=4M"],
                stdout=subprocess.PIPE,
            )  # fmt: skip
            while fio.poll() is None:
                memory.append(_kernel_memory())
                time.sleep(0.5)
            assert not fio.returncode
        finally:
            host.process.send_signal(signal.SIGCONT)
        host.call("barrier", workload="v0")
        status = host.status()
        dirty = host.claim()
        changed = before != fingerprints(device)
        marked = bytearray(len(changed))
        for offset, length in dirty:
            marked[offset // 512 : (offset + length) // 512] = b"\1" * (length // 512)
        lost = [int(at) for at in changed.nonzero()[0] if not marked[at]]
        half = len(memory) // 2
        return {
            "changed": int(changed.sum()),
            "lost": len(lost),
            "records": status["total_records"] - start["total_records"],
            "overflow_regions": status["overflow_regions"] - start["overflow_regions"],
            "widened_bytes": status["widened_bytes"] - start["widened_bytes"],
            "dirty_bytes": sum(length for _, length in dirty),
            "suspect": status["suspect"],
            "grown_in_the_second_half_kib": max(memory[half:]) - max(memory[:half]),
            "daemon_kib": _daemon_kib(host.process.pid),
        }


def _kernel_memory() -> int:
    """What the kernel has allocated for itself and cannot give back, KiB."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("SUnreclaim", "Percpu", "VmallocUsed"))


def _daemon_kib(process: int) -> int:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def blind(device: str) -> dict[str, Any]:
    """For a module that records nothing (see the test): how long until it is told, and what it costs."""
    with Host(device) as host:
        host.in_step()
        began = time.monotonic()
        sector = 0
        while host.status()["self_test"]["state"] != "blind":
            sector += 8
            write(device, sector, 8)
            time.sleep(0.1)
            assert time.monotonic() < began + 120, host.status()
        status = host.status()
        code = _selftest()
        drain = _refused(lambda: host.call("barrier", workload="v0", drain="d"))
        return {"suspect": status["suspect"], "exit": code, "drain": drain}


def _refused(action: Any) -> str:
    """The reason with which an action is refused."""
    try:
        action()
    except BmigrateError as error:
        return str(error.reason)
    return "nothing"


if __name__ == "__main__":
    main(globals())
