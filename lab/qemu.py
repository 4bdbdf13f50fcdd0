# SPDX-License-Identifier: GPL-3.0-or-later
"""QEMU's command line and monitor.

Promises: a guest is emulated (TCG) unless the processor says it can virtualise; it reaches the host's loopback only
through the forwarded ports, and the other guest only through the LAN. Knows nothing of ssh or of what runs inside.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import tscrate
from lab.disks import DISKS
from lab.errors import LabError

COMMAND_LINE = (
    "root=/dev/vda rw console=ttyS0,115200 mitigations=off no_timer_check rcupdate.rcu_expedited=1 "
    "rcutree.jiffies_till_first_fqs=25 rcutree.jiffies_till_next_fqs=25 "
    "random.trust_cpu=on apparmor=0 audit=0 8250.nr_uarts=1 panic=0 oops=panic systemd.show_status=error "
    "systemd.log_level=warning nowatchdog rcupdate.rcu_cpu_stall_suppress=1 cryptomgr.notests "
    "edd=off net.ifnames=0 selinux=0"
)


# With -icount QEMU's time stamp counter counts the nanoseconds of the guest's clock.
COUNTING_KHZ = 1_000_000


@dataclass(frozen=True)
class Ports:
    """The loopback ports of one guest: TCP for ssh and PostgreSQL, UDP for its end of the LAN."""

    ssh: int
    postgresql: int
    lan: int


def mac(network: str, index: int) -> str:
    """The address of a guest's network card; `network` is nat or lan, `index` 1 for alpha."""
    return f"52:54:00:0a:{'00' if network == 'nat' else '4d'}:{index:02x}"


def can_virtualise() -> bool:
    """Whether the processor's flags have vmx or svm, and /dev/kvm may be opened (it may exist and hang without)."""
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    words = set(flags.group(1).split()) if flags else set()
    return bool(words & {"vmx", "svm"}) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def counts_instructions() -> bool:
    """BMIGRATE_LAB_ICOUNT: whether a guest's clock advances by one nanosecond for each instruction that it executes."""
    return os.environ.get("BMIGRATE_LAB_ICOUNT", "") not in ("", "0")


def _processor(counting: bool, takes_turns: bool) -> tuple[list[str], str]:
    """How the guest's processor is made, and what its kernel is told about clocks."""
    if counting:
        # One thread, or there is no one count. Idle time passes as it does outside (sleep=on): a guest that only waits
        # for its disk would otherwise find that its timeouts are over. Without `rep movsb`, of which QEMU counts
        # each repetition, the kernel copies eight bytes at a time.
        accelerate = ["-accel", "tcg,thread=single,tb-size=256", "-icount", "shift=0,align=off,sleep=on"]
        processor = "max,la57=off,svm=off,erms=off"
        return [*accelerate, "-cpu", processor], tscrate.kernel_arguments(COUNTING_KHZ)
    if can_virtualise():
        return ["-accel", "kvm", "-cpu", "host"], ""
    # The guest must not measure its clock while the host is busy: see tscrate.py.
    # A tracepoint is switched by putting an int3 into running code for a moment. QEMU 7.2, with processors that
    # translate side by side, once in many hundred times goes on to run an int3 that the kernel has replaced already.
    # Newer kernels panic then; the one of Debian 12 sees that there is none, tries again, and stands still for ever
    # (kprobe_int3_handler). Guests with other kernels are there for tests that switch tracepoints all the time under
    # load, and take turns with their processors.
    threads = "single" if takes_turns else "multi"
    accelerate = ["-accel", f"tcg,thread={threads},tb-size=256", "-cpu", "max,la57=off,svm=off"]
    return accelerate, tscrate.kernel_arguments(tscrate.measure_khz())


def arguments(
    vm: str, index: int, ports: Ports, peer_lan_port: int, kernel: Path, label: str, modules: Path | None = None
) -> list[str]:
    """The argv that starts the guest `vm` in its own directory, where all files named here without a path are.

    modules: a file system that the guest sees as a read-only disk behind all others.
    """
    counting = counts_instructions()
    cpus = "1" if counting else os.environ.get("BMIGRATE_LAB_CPUS", "2")
    memory = os.environ.get("BMIGRATE_LAB_MEMORY_MIB", "1024")
    forward = f"hostfwd=tcp:127.0.0.1:{ports.ssh}-10.0.2.15:22,hostfwd=tcp:127.0.0.1:{ports.postgresql}-10.0.2.15:5432"
    accelerate, clock = _processor(counting, modules is not None)
    more = os.environ.get("BMIGRATE_LAB_APPEND", "")
    argv = [
        "qemu-system-x86_64",
        *("-name", label),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-machine", "q35,sata=off,smbus=off,usb=off,vmport=off,hpet=off,i8042=off"),
        *accelerate,
        *("-smp", cpus, "-m", memory),
        *("-kernel", str(kernel), "-initrd", "initramfs.cpio", "-append", f"{COMMAND_LINE} {more} {clock}"),
        *("-chardev", "file,id=console,path=console.log,append=on", "-serial", "chardev:console"),
        *("-qmp", "unix:monitor.sock,server=on,wait=off"),
        *("-rtc", "base=utc", "-device", "virtio-rng-pci"),
        *("-netdev", f"user,id=nat,restrict=on,ipv6=off,{forward}"),
        *("-device", f"virtio-net-pci,netdev=nat,romfile=,mac={mac('nat', index)}"),
        "-netdev",
        f"dgram,id=lan,local.type=inet,local.host=127.0.0.1,local.port={ports.lan},"
        f"remote.type=inet,remote.host=127.0.0.1,remote.port={peer_lan_port}",
        *("-device", f"virtio-net-pci,netdev=lan,romfile=,mac={mac('lan', index)}"),
        "-blockdev",
        "driver=qcow2,node-name=root,discard=unmap,cache.no-flush=on,"
        "file.driver=file,file.filename=root.qcow2,file.cache.no-flush=on",
        *("-device", f"virtio-blk-pci,drive=root,serial=bm-root-{vm}"),
    ]
    for disk in DISKS:
        # The disk's server is killed a moment before QEMU when the power is cut; waiting for it to come back keeps
        # the guest from ever seeing an error that a real power cut would not show.
        argv += [
            "-blockdev",
            f"driver=nbd,node-name=disk{disk.number},server.type=unix,server.path=disks.sock,"
            f"export={disk.number},reconnect-delay=3600,discard=unmap",
            "-device",
            f"virtio-blk-pci,drive=disk{disk.number},serial={disk.serial(vm)},"
            f"logical_block_size={disk.block_bytes},physical_block_size={disk.block_bytes}",
        ]
    if modules:
        file = f"file.driver=file,file.filename={modules}"
        argv += ["-blockdev", f"driver=raw,node-name=modules,read-only=on,{file}"]
        argv += ["-device", "virtio-blk-pci,drive=modules,serial=bm-modules"]
    return argv


def connect(path: Path) -> socket.socket:
    """A connection to a unix socket, however long its path is.

    Raises:
        OSError: nobody listens there.
    """
    conn = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        conn.connect(f"/proc/self/fd/{directory}/{path.name}")
    except OSError:
        conn.close()
        raise
    finally:
        os.close(directory)
    return conn


def monitor(path: Path, command: str, arguments: dict[str, Any] | None = None, limit_seconds: float = 20) -> Any:
    """Run one QMP command and return its result; None when QEMU ended without an answer.

    Raises:
        LabError: QEMU refused it.
        OSError: nobody listens there.
    """
    with connect(path) as conn:
        conn.settimeout(limit_seconds)
        with conn.makefile("rw") as stream:
            stream.readline()
            result = None
            for name, extra in (("qmp_capabilities", {}), (command, arguments or {})):
                message = {"execute": name, "arguments": extra}
                stream.write(json.dumps(message) + "\n")
                stream.flush()
                answer = _answer(stream)
                if answer is None:
                    return None
                if "error" in answer:
                    raise LabError(f"QEMU refused {name}: {answer['error'].get('desc')}")
                result = answer["return"]
            return result


def _answer(stream: Any) -> dict[str, Any] | None:
    """The next line that is not an event."""
    for line in stream:
        message: dict[str, Any] = json.loads(line)
        if "return" in message or "error" in message:
            return message
    return None
