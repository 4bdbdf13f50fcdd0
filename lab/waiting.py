# SPDX-License-Identifier: GPL-3.0-or-later
"""Waiting for something to become true: a condition, looked at often, with a limit and a name."""

from __future__ import annotations

import time
from typing import Callable, TypeVar

from lab.errors import LabError

T = TypeVar("T")


def wait(
    predicate: Callable[[], T],
    limit_seconds: float,
    what: str,
    interval_seconds: float = 0.2,
    explain: Callable[[], str] | None = None,
) -> T:
    """Call `predicate` until it returns something true, and return that.

    Args:
        predicate: looked at every `interval_seconds`; what it raises is not caught.
        limit_seconds: how long to wait at most.
        what: named in the error, as in "ssh on alpha".
        explain: asked for more text when the limit is reached, say the last lines of a log.

    Raises:
        LabError: it did not become true in time.
    """
    end = time.monotonic() + limit_seconds
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= end:
            more = "\n" + explain() if explain else ""
            raise LabError(f"waited {limit_seconds:.0f} s for {what}, in vain{more}")
        time.sleep(interval_seconds)
