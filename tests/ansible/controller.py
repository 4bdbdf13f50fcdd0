# SPDX-License-Identifier: GPL-3.0-or-later
"""ansible-playbook as a process that a test can end with SIGKILL at a named task, with all its children.

Promises: only processes below the one started here are signalled. What runs on the hosts at that
moment goes on there, as it would when a controller dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from lab import Lab, wait
from tests.ansible.playbooks import LIMIT_SECONDS, ROOT, TOOLS, environment


def descendants(pid: int) -> list[int]:
    """All processes below a process, from /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(words[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


class Controller:
    """One run of a playbook with extra-vars, its output in ``log``."""

    def __init__(self, lab: Lab, log: Path, name: str, **extra: Any) -> None:
        self.log = log
        argv = [str(TOOLS / "ansible-playbook"), name, "-e", json.dumps(extra)]
        with log.open("w") as output:
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                # With skipped hosts hidden, the name of a task is printed when its first result is there.
                env={**environment(lab), "PYTHONUNBUFFERED": "1", "ANSIBLE_DISPLAY_SKIPPED_HOSTS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def wait_for_task(self, task: str, limit_seconds: float = LIMIT_SECONDS) -> None:
        """Wait until a task has begun.

        Raises:
            AssertionError: the playbook ended before.
        """

        def begun() -> bool:
            if f"TASK [handover : {task}]" in self.output():
                return True
            assert self.process.poll() is None, f"ended before {task!r}:\n{self.output()[-4000:]}"
            return False

        wait(begun, limit_seconds, f"task {task!r}", 0.02)

    def kill(self) -> None:
        """SIGKILL to it and to everything below it."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(60)

    def finish(self, limit_seconds: float = LIMIT_SECONDS) -> int:
        """Wait for its end; returns its exit code."""
        return self.process.wait(limit_seconds)
