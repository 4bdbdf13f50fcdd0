# SPDX-License-Identifier: GPL-3.0-or-later
"""The client as a process of its own, started and stopped by the demo, which reads its log and tells it nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from demo import ledger
from demo.playbooks import ROOT
from lab import LabError, wait


class ClientProcess:
    """One run of ``demo.client``; use as a context manager.

    Args:
        conninfo: libpq connection string with both hosts.
        log: file for its events; must not exist.
        first_id: number of the first row.
    """

    def __init__(self, conninfo: str, log: Path, first_id: int) -> None:
        self.log = log
        log.touch(exist_ok=False)
        argv = [sys.executable, "-m", "demo.client", "--conninfo", conninfo, "--log", str(log)]
        self._process = subprocess.Popen(
            [*argv, "--first-id", str(first_id)], cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def events(self) -> list[dict[str, Any]]:
        """What it has logged up to now."""
        return ledger.read_events(self.log)

    def wait_for_commits(self, count: int, limit_seconds: float = 600.0) -> None:
        """Wait until so many more commits have been acknowledged than when called.

        Raises:
            LabError: not within the limit, or the client ended.
        """
        wanted = len(ledger.acknowledged(self.events())) + count

        def enough() -> bool:
            if self._process.poll() is not None:
                raise LabError(f"the client ended with {self._process.returncode}")
            return len(ledger.acknowledged(self.events())) >= wanted

        wait(enough, limit_seconds, f"{count} acknowledged commits", 0.25)

    def stop(self) -> None:
        """Let it finish its transaction and end it."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
