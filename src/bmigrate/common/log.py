# SPDX-License-Identifier: GPL-3.0-or-later
"""Logging for daemons: one line per event, to the journal with fields of its own, or to stderr.

What an operator may want to be told of is an ``event``: it has a name that never changes, and in the journal a
MESSAGE_ID and the fields BMIGRATE_EVENT, BMIGRATE_WORKLOAD, BMIGRATE_VOLUME and BMIGRATE_STATE (docs/monitoring.md):
``journalctl BMIGRATE_EVENT=suspect``. The fields need python3-systemd; without it, and outside of a unit, the text
goes to stderr with the journal's priority prefixes. Nothing secret is ever logged.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from typing import Any

#: name -> what happened. A name here is a promise: rules and dashboards match it.
EVENTS = {
    "state": "the shipper of a workload is in another state",
    "session": "a session with the standby began",
    "suspect": "tracking may have missed writes of a volume",
    "blind": "the kernel module did not record what the device wrote",
    "trim": "the workload discarded so much that the passes meanwhile say nothing about who is faster",
    "untracked": "a volume of a primary is not tracked",
}
_NAMESPACE = uuid.UUID("3d0c2a57-8a5e-4b7e-9a43-2f2f6a1c7e10")


def message_id(event: str) -> str:
    """The MESSAGE_ID of an event: 32 hexadecimal digits, the same on every host and in every version."""
    return uuid.uuid5(_NAMESPACE, event).hex


class _JournalFormatter(logging.Formatter):
    """Prefixes ``<N>`` so that the journal keeps the level; plain text on a terminal."""

    LEVELS = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        level = next((number for least, number in self.LEVELS if record.levelno >= least), 7)
        return "\n".join(f"<{level}>{line}" for line in text.splitlines())


def _journal(program: str) -> logging.Handler | None:
    """The journal's own handler; None outside of a unit, or where python3-systemd is not installed."""
    if "JOURNAL_STREAM" not in os.environ:
        return None
    try:
        from systemd.journal import JournalHandler
    except ImportError:
        return None
    handler: logging.Handler = JournalHandler(SYSLOG_IDENTIFIER=program)
    return handler


def setup(program: str, verbose: bool = False) -> logging.Logger:
    """Configure the root logger for a program and return the program's logger."""
    handler = _journal(program)
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_JournalFormatter(f"{program}: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    return logging.getLogger(program)


def event(logger: logging.Logger, level: int, name: str, text: str, workload: str, **fields: Any) -> None:
    """Log something that has a name.

    Args:
        name: of EVENTS.
        text: the whole message, for people.
        fields: more of what it is about; ``volume="x"`` becomes BMIGRATE_VOLUME=x, None is left out.

    Raises:
        KeyError: no such event.
    """
    EVENTS[name]
    extra = {f"BMIGRATE_{key.upper()}": str(value) for key, value in fields.items() if value is not None}
    extra.update(BMIGRATE_EVENT=name, BMIGRATE_WORKLOAD=workload, MESSAGE_ID=message_id(name))
    logger.log(level, "%s", text, extra=extra)
