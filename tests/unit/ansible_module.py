# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the real Ansible modules as programs, with fake programs in their PATH that note how they were called.

What a test gets back is what a playbook would: the module's JSON. Only the programs that a module
starts are fakes; argument parsing, check mode and exit are Ansible's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNNER = """
import runpy, sys
import ansible.module_utils
from ansible.module_utils import basic
ansible.module_utils.__path__.append(sys.argv[1])
basic._ANSIBLE_ARGS = sys.stdin.buffer.read()
basic._ANSIBLE_PROFILE = "legacy"
module = sys.argv[2]
sys.argv = [module]
runpy.run_path(module, run_name="__main__")
"""
FAKE = """#!{python}
import json, os, sys
folder = os.path.dirname(os.path.realpath(__file__))
name = os.path.basename(sys.argv[0])
with open(os.path.join(folder, "calls"), "a") as log:
    log.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
with open(os.path.join(folder, name + ".answers")) as stream:
    answers = json.load(stream)
words = " ".join(sys.argv[1:])
for start, rc, out in answers:
    if words.startswith(start):
        sys.stdout.write(out if isinstance(out, str) else json.dumps(out))
        sys.exit(rc)
sys.stderr.write("nobody expected: " + words)
sys.exit(99)
"""


class Programs:
    """A folder of fake programs. Each answers by the first entry whose beginning fits its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, *answers: Any) -> None:
        """A program and its answers: (beginning of its arguments, exit code, stdout as text or object)."""
        (self.folder / f"{name}.answers").write_text(json.dumps(answers))
        path = self.folder / name
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """Every call so far, program name first."""
        log = self.folder / "calls"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def envelope(data: Any = None, changed: bool = False, error: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a program of ours prints."""
    return {"schema": 1, "ok": error is None, "changed": changed, "workload": "w", "data": data, "error": error}


def run_module(
    name: str, arguments: dict[str, Any], programs: Programs | None = None, check: bool = False, diff: bool = False
) -> dict[str, Any]:
    """Run library/NAME.py and return its answer.

    Args:
        arguments: the module's options. programs: put before everything else in PATH.
        check, diff: as with --check and --diff.
    """
    words = dict(arguments, _ansible_check_mode=check, _ansible_diff=diff)
    path = os.environ["PATH"] if programs is None else f"{programs.folder}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, str(ROOT / "module_utils"), str(ROOT / "library" / f"{name}.py")],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": words}),
        capture_output=True,
        text=True,
        env=dict(os.environ, PATH=path),
        timeout=60,
        check=False,
    )
    assert done.stdout.strip(), f"{name} answered nothing: {done.stderr}"
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def load(name: str) -> Any:
    """Import library/NAME.py, for tests of its pure functions."""
    import importlib.util

    import ansible.module_utils

    shared = str(ROOT / "module_utils")
    if shared not in ansible.module_utils.__path__:
        ansible.module_utils.__path__.append(shared)
    spec = importlib.util.spec_from_file_location(f"library_{name}", ROOT / "library" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
