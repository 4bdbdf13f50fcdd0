# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs a test in a copy of the tree and says how it ended, by pytest's own report.

Promises: "failed" means that one assertion of the test itself failed; an error in a fixture, a timeout, an import that
fails and a test that was not found are told apart from it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

LIMIT_SECONDS = 3 * 3600


@dataclass(frozen=True)
class Outcome:
    """How a test ended.

    Attributes:
        kind: passed, failed (an assertion), or broken (anything else).
        message: of the assertion or the error, its first line. text: everything that pytest said of it.
    """

    kind: str
    message: str = ""
    text: str = ""

    def shows(self, pattern: str) -> bool:
        """Whether it failed on the assertion that the pattern describes."""
        return self.kind == "failed" and re.search(pattern, self.text) is not None


def run(tree: Path, nodes: list[str], log: Path, environment: dict[str, str] | None = None) -> Outcome:
    """Run tests in a copy of the tree; of several that fail the first is told.

    Args:
        tree: the copy. nodes: node ids or files. log: where the output goes. environment: on top of this process's.
    """
    report = log.with_suffix(".xml")
    argv = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-x", f"--junitxml={report}", *nodes]
    env = {**os.environ, "PYTHONPATH": "src:.", "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    with log.open("ab") as output:
        done = subprocess.run(argv, cwd=tree, env=env, stdout=output, stderr=output, timeout=LIMIT_SECONDS)
    if not report.is_file():
        return Outcome("broken", f"pytest ended with {done.returncode} and no report, see {log}")
    return judge(report.read_text(), done.returncode)


def judge(report: str, returncode: int) -> Outcome:
    """What a JUnit report and pytest's exit code say together."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    for case in cases:
        for kind in ("error", "failure", "skipped"):
            found = case.find(kind)
            if found is None:
                continue
            text = f"{found.get('message') or ''}\n{found.text or ''}"
            line = text.strip().splitlines()[0] if text.strip() else kind
            asserted = kind == "failure" and line.startswith(("AssertionError", "assert "))
            return Outcome("failed" if asserted else "broken", line, text)
    if returncode or not cases:
        return Outcome("broken", f"pytest ended with {returncode} after {len(cases)} tests")
    return Outcome("passed")
