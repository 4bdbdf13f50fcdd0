# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: commands that must succeed."""

from __future__ import annotations

import subprocess


def run(*argv: str) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout
