# SPDX-License-Identifier: GPL-3.0-or-later
"""Watches, all along, on which hosts a volume is mounted: a small loop in each guest, judged on the host.

Promises: every span in which a guest had the volume mounted is found, to a tenth of a second, on one
clock; ``together`` is pure. Must never mount or unmount anything.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from lab import Lab

WATCH = """
import os, time
log = open("/run/mount-watch.log", "a", buffering=1)
last = None
while True:
    number = os.stat("{device}").st_rdev
    wanted = f"{{os.major(number)}}:{{os.minor(number)}}"
    with open("/proc/1/mountinfo") as mounts:
        now = any(line.split()[2] == wanted for line in mounts)
    log.write(f"{{time.time():.3f}} {{int(now)}}\\n")
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


class MountWatch:
    """Both guests' watchers. A guest that was off has to be watched again with ``start``."""

    def __init__(self, lab: Lab, devices: dict[str, str]) -> None:
        self.lab = lab
        self.devices = devices
        self._spans: list[Span] = []
        self._clock_error = 0.2  # two samples

    def start(self, host: str) -> None:
        """Begin, or begin again after a boot."""
        self.lab.ssh(host, "cat > /run/mount-watch.py", input_text=WATCH.format(device=self.devices[host]))
        self.lab.ssh(
            host,
            "systemctl stop mount-watch 2>/dev/null; systemctl reset-failed mount-watch 2>/dev/null; "
            ": > /run/mount-watch.log; "
            "systemd-run --quiet --unit=mount-watch python3 /run/mount-watch.py",
        )

    def collect(self, host: str) -> int:
        """End the watcher of a host and take its log; returns the number of samples."""
        began = time.time()
        text = self.lab.ssh(host, "systemctl stop mount-watch; date +%s.%N; cat /run/mount-watch.log").stdout
        ended = time.time()
        clock, *lines = text.splitlines()
        self._clock_error = max(self._clock_error, ended - began)
        self._spans += spans(host, lines, (began + ended) / 2 - float(clock))
        return len(lines)

    def overlaps(self) -> list[tuple[Span, Span]]:
        """Moments at which two hosts had the volume mounted; must be empty."""
        return together(self._spans, self._clock_error)

    def spans_of(self, host: str) -> list[Span]:
        """What was collected for a host."""
        return [span for span in self._spans if span.host == host]
