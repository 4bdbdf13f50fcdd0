# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate resume: the other half of pause.py, found by its own name."""

from __future__ import annotations

from bmigrate.cli.pause import add_resume as add_parser
from bmigrate.cli.pause import run

__all__ = ["add_parser", "run"]
