# SPDX-License-Identifier: GPL-3.0-or-later
"""Logging for daemons: one line per event to stderr, with the journal's priority prefixes."""

from __future__ import annotations

import logging
import os
import sys


class _JournalFormatter(logging.Formatter):
    """Prefixes ``<N>`` so that the journal keeps the level; plain text on a terminal."""

    LEVELS = ((logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if "JOURNAL_STREAM" not in os.environ:
            return text
        level = next((number for least, number in self.LEVELS if record.levelno >= least), 7)
        return "\n".join(f"<{level}>{line}" for line in text.splitlines())


def setup(program: str, verbose: bool = False) -> logging.Logger:
    """Configure the root logger for a program and return the program's logger."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JournalFormatter(f"{program}: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    return logging.getLogger(program)
