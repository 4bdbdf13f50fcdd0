# SPDX-License-Identifier: GPL-3.0-or-later
"""Back-off: bounded whatever is measured, none without a reason, and enough of it on a device that serves badly."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmigrate.common import blockdev
from bmigrate.common.errors import UnreachableError
from bmigrate.ship import gentle, governor, pacer
from bmigrate.ship.governor import Governor, Sample

MIB = 1 << 20


class Device:
    """A disk for which time passes only here: a write takes longer the larger the share of time the shipper reads."""

    def __init__(self, slow: float, stalled: float = 0.0) -> None:
        self.governor = Governor(MIB)
        self.slow, self.stalled = slow, stalled
        self.now = 100.0
        self.writes, self.write_seconds, self.stall = 0, 0.0, 0.0
        self.read_seconds = self.rested = 0.0

    def _pass(self, seconds: float, reading: bool) -> None:
        """The foreground does 400 writes a second meanwhile."""
        count = int(seconds * 400) + 1
        self.writes += count
        self.write_seconds += count * (0.002 * (self.slow if reading else 1.0))
        self.stall += seconds * (0.3 + (self.stalled if reading else 0.0))
        self.now += seconds

    def run(self, seconds: float) -> None:
        """The shipper reads whenever it may."""
        end = self.now + seconds
        while self.now < end:
            count = self.governor.read_bytes
            busy = count / (100 * MIB)
            self._pass(busy, True)
            self.read_seconds += busy
            self.governor.read(count, busy)
            rest = self.governor.factor * busy
            if self.governor.wants_sample(self.now):
                probe = self.governor.take(Sample(self.now, self.writes, self.write_seconds, self.stall))
                if probe:
                    self._pass(probe, False)
                    self.rested += probe
                    self.governor.take(Sample(self.now, self.writes, self.write_seconds, self.stall))
            if rest:
                self._pass(rest, False)
                self.rested += rest


def test_no_rest_when_nobody_is_served_worse() -> None:
    """A database that waits for its disk a third of the time all day long is no reason; only the probes are paid."""
    device = Device(slow=1.0)
    device.run(60)
    assert device.governor.factor == 0 and device.governor.reason is None
    assert device.rested < 0.08 * 60, "the probes cost more than they may"


@pytest.mark.parametrize(("slow", "stalled", "reason"), [(20.0, 0.0, "io_latency"), (1.0, 0.6, "io_pressure")])
def test_rest_when_the_foreground_suffers(slow: float, stalled: float, reason: str) -> None:
    device = Device(slow, stalled)
    device.run(60)
    assert device.governor.reason == reason and device.governor.factor > 0.3
    assert device.read_seconds > 60 / (2 + governor.MAX_FACTOR) * 0.8, "slowed down, never stopped"
    device.slow, device.stalled = 1.0, 0.0
    device.run(60)
    assert device.governor.factor == 0 and device.governor.reason is None, "it does not forget to go on"


def test_totals_that_begin_anew_say_nothing() -> None:
    """A service that was restarted has a smaller total: taken for relief, everything after it would be suffering."""
    found = Governor(MIB)
    now, writes = 100.0, 0
    rest = found.take(Sample(now, writes, 3600.0, 3600.0))
    assert rest, "the first window is one without reading"
    now, writes = now + rest, writes + 100
    found.take(Sample(now, writes, 0.2, 0.1))
    for number in range(1, 40):
        seconds = 0.5
        now, writes = now + seconds, writes + 200
        found.take(Sample(now, writes, 0.2 + number * 0.4, 0.1 + number * 0.15))
        assert found.factor == 0 and found.reason is None


def test_reads_are_short_on_a_slow_device() -> None:
    """A read of the shipper must not keep a slow disk for a quarter of a second."""
    slow = Governor(MIB)
    for _ in range(40):
        slow.read(slow.read_bytes, slow.read_bytes / (4 * MIB))
    assert slow.read_bytes == 64 * 1024
    fast = Governor(MIB)
    for _ in range(40):
        fast.read(fast.read_bytes, fast.read_bytes / (2000 * MIB))
    assert fast.read_bytes == MIB
    slow.idle()
    assert slow.read_bytes == MIB and slow.factor == 0


@given(
    st.lists(
        st.tuples(st.floats(0, 10), st.integers(0, 10**6), st.floats(0, 10**4), st.none() | st.floats(0, 10**6)),
        max_size=60,
    )
)
def test_bounded_whatever_is_measured(steps: list[tuple[float, int, float, float | None]]) -> None:
    """Counters that stand still, leap, or are missing: the factor stays in its bounds, and a rest is one window."""
    control, now, writes, seconds = Governor(MIB), 0.0, 0, 0.0
    for passed, more, took, stalled in steps:
        now, writes, seconds = now + passed, writes + more, seconds + took
        assert control.take(Sample(now, writes, seconds, stalled)) in (0.0, governor.WINDOW_SECONDS)
        control.read(MIB, passed)
        assert 0 <= control.factor <= governor.MAX_FACTOR
        assert governor.MIN_READ_BYTES <= control.read_bytes <= MIB


def test_never_while_losing_ground_or_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest under way ends when a drain begins; losing ground and no writes mean no rest and large reads."""
    monkeypatch.setattr(gentle, "write_times", lambda number: (10**6, 1.0))
    polite = pacer.Pacer(0)
    polite.foreground_writes = True
    polite._governors[7] = suffering = Governor(MIB)
    suffering.factor, suffering._read_bytes = 4.0, 65536.0
    for flag in ("losing", "urgent", "foreground_writes"):
        polite.losing = flag == "losing"
        polite.foreground_writes = flag != "foreground_writes"
        (polite.urgent.set if flag == "urgent" else polite.urgent.clear)()
        suffering.factor = 4.0
        began = time.monotonic()
        polite.rest(7, MIB, 10.0)
        assert time.monotonic() - began < 1.0 and polite.read_bytes(7) == MIB
    polite.foreground_writes = True
    polite.urgent.clear()
    suffering.factor = 4.0
    threading.Timer(0.2, polite.urgent.set).start()
    began = time.monotonic()
    polite.rest(7, MIB, 100.0)
    assert time.monotonic() - began < 1.5, "a rest of two seconds must end when a drain begins"


# -- the limiter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cause", pacer.LIMITERS)
def test_the_limiter_is_what_took_most_of_a_pass(cause: str) -> None:
    """Of all that was charged, if it was a fifth of the time at least; a new walk begins at nothing."""
    polite = pacer.Pacer(0)
    assert polite.limiter(1.0) is None
    for other in pacer.LIMITERS:
        polite.charge(other, 3.0 if other == cause else 2.0)
    assert polite.limiter(14.0) == cause
    assert polite.limiter(16.0) is None, "most of the time went elsewhere"
    assert polite.limiter(0.0) is None
    polite.begin()
    assert polite.limiter(1.0) is None


def test_waiting_for_the_bandwidth_limit_is_charged_to_it() -> None:
    """And nothing is when there is no limit, or no time for one."""
    limited, free, urgent = pacer.Pacer(4 * MIB), pacer.Pacer(0), pacer.Pacer(4 * MIB)
    urgent.urgent.set()
    for item in (limited, free, urgent):
        item.before_send(3 * MIB, lambda: None)
        item.before_send(1, lambda: None)
    assert limited.spent["bandwidth_limit"] > 0.2
    assert limited.limiter(1.0) == "bandwidth_limit"
    for item in (free, urgent):
        assert item.spent["bandwidth_limit"] < 0.1


def test_a_session_that_is_over_ends_the_wait_for_the_bandwidth_limit() -> None:
    """Not after the minutes that a low limit asks for."""
    limited = pacer.Pacer(1)
    limited.before_send(pacer.MIN_BURST_BYTES, lambda: None)

    def over() -> None:
        raise UnreachableError("the link is gone", reason="disconnected")

    with pytest.raises(UnreachableError):
        limited.before_send(MIB, over)


@pytest.mark.parametrize("reason", ["io_latency", "io_pressure"])
def test_a_rest_is_charged_to_why_it_is_taken(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    monkeypatch.setattr(gentle, "write_times", lambda number: None)
    polite = pacer.Pacer(0)
    polite.foreground_writes = True
    polite._governors[7] = suffering = Governor(MIB)
    suffering.factor, suffering.reason = 2.0, reason
    polite.rest(7, MIB, 0.1)
    assert 0.2 <= polite.spent[reason] < 1.0 and polite.limiter(0.3) == reason


# -- the edge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("some avg10=12.34 avg60=1.00 total=2500000\nfull avg10=99.00 total=1\n", 2.5),
        ("full avg10=99.00 total=7\n", None),
        ("", None),
        ("some avg10=1.0 total=x\n", None),
    ],
)
def test_pressure_file_is_parsed(text: str, value: float | None) -> None:
    """Only the line "some" counts; noise means unknown."""
    assert gentle.parse_pressure(text) == value


def test_the_pressure_of_the_services_and_of_nobody_else(tmp_path: Path) -> None:
    """One unit, the instances of a template below a slice of their own, and not the rest of the host."""
    places = ("system.slice/app.service", "system.slice/system-db.slice/db@15-main.service", "system.slice/ssh.service")
    for number, place in enumerate(places):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "io.pressure").write_text(f"some avg10=0 total={(number + 1) * 1000000}\n")
    files = gentle.pressure_files(("app", "db.service"), tmp_path)
    assert sorted(file.parent.name for file in files) == ["app.service", "db@15-main.service"]
    assert gentle.stalled_seconds(files) == 2.0
    assert gentle.stalled_seconds([]) is None and gentle.stalled_seconds([tmp_path / "gone"]) is None


def test_write_times_of_a_device_and_of_none() -> None:
    assert gentle.write_times(os.makedev(4095, 1)) is None
    numbers = [line.split()[:2] for line in Path("/proc/partitions").read_text().splitlines()[2:]]
    for major, minor in numbers[:1]:
        times = gentle.write_times(os.makedev(int(major), int(minor)))
        assert times is not None and times[0] >= 0 and times[1] >= 0


# -- the I/O class -----------------------------------------------------------------------------------

IOPRIO_GET = {"x86_64": 252, "aarch64": 31, "riscv64": 31, "loongarch64": 31, "ppc64le": 274, "s390x": 283}


def _io_class() -> int:
    """The class of the calling thread, from the kernel (ioprio_get(2))."""
    value = ctypes.CDLL(None, use_errno=True).syscall(IOPRIO_GET[platform.machine()], 1, 0)
    assert value >= 0, os.strerror(ctypes.get_errno())
    return int(value) >> 13


def test_the_idle_class_is_the_threads_and_not_the_processs() -> None:
    """Only who reads stands back: the classes are set and read back in a thread of its own."""
    before = _io_class()
    with ThreadPoolExecutor(1) as reader:
        for wanted in (gentle.CLASS_IDLE, gentle.CLASS_NONE, gentle.CLASS_IDLE):
            assert reader.submit(gentle.set_io_class, wanted).result()
            assert reader.submit(_io_class).result() == wanted
    assert _io_class() == before


def test_the_idle_class_ends_when_nobody_may_come_first_any_more() -> None:
    """In a hurry, and while passes do not help, the reader stands in line like everybody; back to idle afterwards."""
    polite = pacer.Pacer(0)
    with ThreadPoolExecutor(1) as reader:

        def entered() -> int:
            reader.submit(polite.enter).result()
            return reader.submit(_io_class).result()

        assert entered() == gentle.CLASS_IDLE
        polite.losing = True
        assert entered() == gentle.CLASS_NONE, "still behind the workload that it loses ground to"
        polite.losing = False
        assert entered() == gentle.CLASS_IDLE
        polite.urgent.set()
        assert entered() == gentle.CLASS_NONE
        polite.urgent.clear()
        assert entered() == gentle.CLASS_IDLE


# -- the I/O scheduler -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "release", "honoured"),
    [
        ("bfq", "5.10.0-30-amd64", True),
        ("mq-deadline", "5.10.0-30-amd64", False),
        ("mq-deadline", "6.1.0", True),
        ("mq-deadline", "strange", False),
        ("none", "6.12.0", False),
        ("kyber", "6.12.0", False),
    ],
)
def test_which_schedulers_honour_the_idle_class(name: str, release: str, honoured: bool) -> None:
    assert gentle.honours_idle(name, release) == honoured


def _disk(root: Path, name: str, scheduler: str | None) -> Path:
    """A disk as sysfs shows it."""
    disk = root / name
    (disk / "queue").mkdir(parents=True)
    (disk / "slaves").mkdir()
    if scheduler is not None:
        (disk / "queue" / "scheduler").write_text(scheduler + "\n")
    return disk


def test_the_scheduler_that_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the disk itself, or of what it is made of, partitions and stacks included; unknown is not "not honoured"."""
    sda = _disk(tmp_path, "sda", "none mq-deadline kyber [bfq]")
    sdb = _disk(tmp_path, "sdb", "[none] mq-deadline")
    (sda / "sda1").mkdir()
    (sda / "sda1" / "partition").write_text("1\n")
    md, dm = _disk(tmp_path, "md0", None), _disk(tmp_path, "dm-0", "none")
    (dm / "slaves" / "sda1").symlink_to(sda / "sda1")
    (md / "slaves" / "dm-0").symlink_to(dm)
    places = {"/dev/sda": sda, "/dev/sdb": sdb, "/dev/md0": md, "/dev/zram0": _disk(tmp_path, "zram0", None)}
    monkeypatch.setattr(blockdev, "disk_dir", lambda path: places[path])
    assert gentle.scheduler("/dev/sda") == ("bfq", True)
    assert gentle.scheduler("/dev/sdb") == ("none", False)
    assert gentle.scheduler("/dev/md0") == ("bfq", True), "a dm device schedules nothing itself"
    (md / "slaves" / "sdb").symlink_to(sdb)
    assert gentle.scheduler("/dev/md0") == ("bfq+none", False)
    assert gentle.scheduler("/dev/zram0") == (None, None)


def test_no_scheduler_of_what_is_no_block_device(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert gentle.scheduler(str(tmp_path / "file")) == gentle.scheduler(str(tmp_path / "gone")) == (None, None)
