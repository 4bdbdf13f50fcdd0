# SPDX-License-Identifier: GPL-3.0-or-later
"""Watches, all along, on which hosts a volume is mounted: a small loop in each guest, judged on the host.

Promises: every span in which a guest had the volume mounted is found, to a tenth of a second, on one
clock, also when the guest loses its power later: what it saw is sent here at once. ``together`` is
pure. Must never mount or unmount anything.
"""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from lab import Lab, wait

#: Samples ten times a second; says what it saw when that changes, and once a second.
WATCH = """
import os, time
last, told = None, 0.0
while True:
    at = time.time()
    number = os.stat("{device}").st_rdev
    wanted = f"{{os.major(number)}}:{{os.minor(number)}}"
    with open("/proc/1/mountinfo") as mounts:
        now = int(any(line.split()[2] == wanted for line in mounts))
    if last is not None and last[1] != now:
        print(f"{{last[0]:.3f}} {{last[1]}}", flush=True)
    if last is None or last[1] != now or at - told >= 1:
        print(f"{{at:.3f}} {{now}}", flush=True)
        told = at
    last = at, now
    time.sleep(0.1)
"""


@dataclass(frozen=True)
class Span:
    """A volume was mounted on a host from ``begin`` to ``end``, seconds of the lab host's clock."""

    host: str
    begin: float
    end: float


def spans(host: str, lines: list[str], offset: float) -> list[Span]:
    """The spans in a watcher's log of "TIME MOUNTED" lines; ``offset`` is added to its times."""
    found: list[Span] = []
    begin = last = None
    for line in lines:
        words = line.split()
        if len(words) != 2:
            continue  # the last line of a guest that lost its power
        at, mounted = float(words[0]) + offset, words[1] == "1"
        if mounted:
            begin = at if begin is None else begin
            last = at
        elif begin is not None and last is not None:
            found.append(Span(host, begin, last))
            begin = last = None
    if begin is not None and last is not None:
        found.append(Span(host, begin, last))
    return found


def together(all_spans: list[Span], clock_error: float) -> list[tuple[Span, Span]]:
    """Pairs of spans of different hosts that overlap by more than the clocks may be wrong (seconds)."""
    return [
        (one, two)
        for number, one in enumerate(all_spans)
        for two in all_spans[number + 1 :]
        if one.host != two.host and min(one.end, two.end) - max(one.begin, two.begin) > clock_error
    ]


@dataclass
class _Watcher:
    process: subprocess.Popen[bytes]
    log: Path
    offset: float


class MountWatch:
    """Both guests' watchers, their samples kept below ``directory``.

    A guest that was off has to be watched again with ``start``.
    """

    def __init__(self, lab: Lab, devices: dict[str, str], directory: Path) -> None:
        self.lab = lab
        self.devices = devices
        self.directory = directory
        self._watchers: dict[str, list[_Watcher]] = {name: [] for name in devices}
        self._clock_error = 0.2  # two samples

    def start(self, host: str) -> None:
        """Begin, or begin again after a boot; returns when the first sample is here."""
        began = time.time()
        clock = float(self.lab.ssh(host, "date +%s.%N").stdout)
        ended = time.time()
        self._clock_error = max(self._clock_error, ended - began)
        log = self.directory / f"mounts-{host}-{len(self._watchers[host])}"
        program = self.directory / f"watch-{host}.py"
        program.write_text(WATCH.format(device=self.devices[host]))
        # A connection of its own; ssh takes options after the name, too.
        argv = [*self.lab.ssh_argv(host), "-o", "ControlPath=none", "python3 -u -"]
        with log.open("wb") as out, program.open("rb") as text:
            process = subprocess.Popen(argv, stdin=text, stdout=out, start_new_session=True)
        self._watchers[host].append(_Watcher(process, log, (began + ended) / 2 - clock))
        wait(lambda: log.stat().st_size > 0 or process.poll() is not None, 120, f"the watcher of {host}", 0.1)
        assert process.poll() is None, f"the watcher of {host} ended at once"

    def stop(self) -> None:
        """End the watchers."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.process.terminate()
                watcher.process.wait(timeout=60)

    def is_watched(self, host: str) -> bool:
        """Whether the newest watcher of a host still samples."""
        return self._watchers[host][-1].process.poll() is None

    def spans_of(self, host: str) -> list[Span]:
        """When a host had the volume mounted, up to now."""
        return [
            span
            for watcher in self._watchers[host]
            for span in spans(host, watcher.log.read_text().splitlines(), watcher.offset)
        ]

    def overlaps(self) -> list[tuple[Span, Span]]:
        """Moments at which two hosts had the volume mounted; must be empty."""
        return together([span for host in self._watchers for span in self.spans_of(host)], self._clock_error)
