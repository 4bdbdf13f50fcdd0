# SPDX-License-Identifier: GPL-3.0-or-later
"""Many small transfers with one device, several at a time where it takes its time for each.

A disk behind a network answers after a millisecond, however small the request, and takes dozens at once: one after the
other, blocks that lie scattered move at a few MiB/s. A disk that answers at once is served faster by one thread. So the
first few of a call are done one after the other, and their time decides about the rest.

Promises: when ``each`` returns or raises, every item was done, or left out because one had failed, and nothing is under
way any more. Items may be done in any order: they must not overlap.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Callable, TypeVar

WORKERS = 8
PROBES = 4
"""Items that are done first, one after the other, to see how long one takes."""
WORTH_SECONDS = 0.001
"""What the rest must take, one after the other, for threads to be woken."""
_ALIVE_SECONDS = 1.0

T = TypeVar("T")


def nothing() -> None:
    """The default of what is called beside the items."""


class Scatter:
    """A few threads for the items of one caller, made when first needed. ``close`` it.

    Args:
        name: of the threads.
        prepare: called in a thread before its share of each call, to make it like the caller's.
    """

    def __init__(self, name: str, prepare: Callable[[], None] = nothing) -> None:
        self._name = name
        self._prepare = prepare
        self._pool: ThreadPoolExecutor | None = None

    def each(self, act: Callable[[T], None], items: Sequence[T], alive: Callable[[], None] = nothing) -> None:
        """Do ``act`` for every item; must be called by one thread at a time.

        Args:
            alive: called about once a second while others work, and after each of the first items.

        Raises:
            what ``act`` or ``alive`` raised first; nothing is under way any more, and some items may not be done.
        """
        began = time.perf_counter()
        for item in items[:PROBES]:
            act(item)
            alive()
        rest = items[PROBES:]
        if len(rest) < 2 or (time.perf_counter() - began) / PROBES * len(rest) < WORTH_SECONDS:
            for item in rest:
                act(item)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(WORKERS, self._name)
        failed: list[BaseException] = []

        def share(part: Sequence[T]) -> None:
            try:
                self._prepare()
                for item in part:
                    if failed:
                        return
                    act(item)
            except BaseException as error:
                failed.append(error)

        # Every nth to the nth: together they go through the device in order.
        pending = {self._pool.submit(share, rest[number::WORKERS]) for number in range(min(WORKERS, len(rest)))}
        while pending:
            _, pending = wait(pending, _ALIVE_SECONDS)
            if pending and not failed:
                try:
                    alive()
                except BaseException as error:
                    failed.append(error)
        if failed:
            raise failed[0]

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
