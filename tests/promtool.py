# SPDX-License-Identifier: GPL-3.0-or-later
"""Prometheus' own checker of rules: Debian's, unpacked and not installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.sshd import unpacked


def promtool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run it; the caller looks at the exit status."""
    program = unpacked("prometheus") / "usr" / "bin" / "promtool"
    return subprocess.run([str(program), *arguments], cwd=cwd, capture_output=True, text=True, check=False)
