# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the shipped playbooks from the repository root exactly as an operator types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class PlaybookError(Exception):
    """A playbook ended with an error; its output is in the log."""


def run(name: str, instance: str, log: Path, **extra: str) -> None:
    """``ansible-playbook NAME`` with extra-vars, its output into a log.

    Args:
        name: a playbook at the root, e.g. ``failover.yml``.
        instance: the lab whose inventory is used.
        log: file that gets the whole output, appended.
        extra: extra-vars, all strings.

    Raises:
        PlaybookError: exit code not 0; the text holds the last lines.
    """
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), name]
    for key, value in extra.items():
        argv += ["-e", json.dumps({key: value})]
    environment = {**os.environ, "BMIGRATE_LAB": instance, "ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_NOCOLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n$ ansible-playbook {name} {' '.join(argv[2:])}\n")
        output.flush()
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode != 0:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])
        raise PlaybookError(f"ansible-playbook {name} exited with {done.returncode}; the end of {log}:\n{last}")


def report_of(directory: Path) -> dict[str, Any]:
    """The JSON report that failover.yml left in a directory of its own."""
    (path,) = directory.glob("handover-*.json")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report
