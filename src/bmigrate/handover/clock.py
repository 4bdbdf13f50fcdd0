# SPDX-License-Identifier: GPL-3.0-or-later
"""Time stamps of a step, so that the report can print the downtime by phase.

Both clocks are noted: CLOCK_REALTIME places a step among those of the other host, the monotonic
one measures how long it took whatever the other does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


class Stopwatch:
    """Measures one step and its parts."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self._began = time.monotonic()
        self.parts: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure a named part, also when it fails."""
        at, began = time.time(), time.monotonic()
        try:
            yield
        finally:
            self.parts.append({"name": name, "at": at, "seconds": round(time.monotonic() - began, 6)})

    def result(self, **fields: Any) -> dict[str, Any]:
        """The step's result: times in seconds (``*_at`` since the epoch), parts, and the fields given."""
        times = {
            "started_at": self.started_at,
            "finished_at": time.time(),
            "seconds": round(time.monotonic() - self._began, 6),
            "parts": self.parts,
        }
        return dict(times, **fields)
