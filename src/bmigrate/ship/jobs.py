# SPDX-License-Identifier: GPL-3.0-or-later
"""Requests that a workload's thread answers later: converge, drain, verify.

A job is answered exactly once, from whatever thread ends it; the daemon's loop takes the answers in
and writes them to the socket. Jobs hold no logic.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Callable, Optional

from bmigrate.common.errors import BmigrateError

Answer = Callable[[Optional[dict[str, Any]], Optional[BmigrateError]], None]


class Job:
    """One request.

    Args:
        kind: converge, drain or verify.
        fields: of the request.
        answer: called once with (result, None) or (None, error).
        timeout_seconds: from now.

    Attributes:
        cancelled: the client is gone; nobody waits for the answer.
    """

    def __init__(self, kind: str, fields: dict[str, Any], answer: Answer, timeout_seconds: float) -> None:
        self.kind = kind
        self.fields = fields
        self.deadline = time.monotonic() + timeout_seconds
        self.cancelled = False
        self._answer = answer
        self._lock = threading.Lock()
        self._answered = False

    @property
    def over(self) -> bool:
        """Answered, or nobody waits."""
        return self._answered or self.cancelled

    def done(self, result: dict[str, Any]) -> None:
        """Answer with a result."""
        self._once(result, None)

    def failed(self, error: BmigrateError) -> None:
        """Answer with an error."""
        self._once(None, error)

    def _once(self, result: dict[str, Any] | None, error: BmigrateError | None) -> None:
        with self._lock:
            if self._answered:
                return
            self._answered = True
        self._answer(result, error)
