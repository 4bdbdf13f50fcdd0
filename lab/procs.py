# SPDX-License-Identifier: GPL-3.0-or-later
"""Background processes that outlive the command that started them.

Promises: a process is known by its pid *and* its start time, so a pid that was given to somebody else is never
signalled. Must never look for processes by name.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from lab.waiting import wait


def start_ticks(pid: int) -> int | None:
    """When `pid` was started (clock ticks since boot), or None if it does not run; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


class Process:
    """A background process, remembered in a file."""

    def __init__(self, pid_file: Path) -> None:
        self.pid_file = pid_file

    def pid(self) -> int | None:
        """Its pid, if it is running."""
        try:
            noted = json.loads(self.pid_file.read_text())
        except FileNotFoundError:
            return None
        return noted["pid"] if start_ticks(noted["pid"]) == noted["start_ticks"] else None

    def spawn(self, argv: list[str], log: Path, cwd: Path, env: dict[str, str] | None = None) -> int:
        """Start `argv` in its own session, output appended to `log`, and remember it. Returns the pid."""
        with log.open("ab") as out, open(os.devnull, "rb") as nothing:
            child = subprocess.Popen(
                argv, stdin=nothing, stdout=out, stderr=out, cwd=cwd, env=env, start_new_session=True
            )
        ticks = start_ticks(child.pid)
        temporary = self.pid_file.with_suffix(".new")
        temporary.write_text(json.dumps({"pid": child.pid, "start_ticks": ticks, "argv0": argv[0]}) + "\n")
        temporary.replace(self.pid_file)
        # The child is meant to outlive this object: that is no mistake worth a ResourceWarning.
        child.returncode = 0
        return child.pid

    def end(self, number: signal.Signals = signal.SIGKILL, limit_seconds: float = 20) -> None:
        """Signal it and wait until it is gone; nothing happens if it does not run."""
        pid = self.pid()
        if pid is not None:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pid = None
        if pid is not None:
            wait(self.gone, limit_seconds, f"the end of process {pid}", 0.02)
        self.pid_file.unlink(missing_ok=True)

    def gone(self) -> bool:
        """Whether it has ended; reaps it when it was our own child."""
        pid = self.pid()
        if pid is None:
            return True
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return self.pid() is None
        return self.pid() is None
