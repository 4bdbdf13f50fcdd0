# SPDX-License-Identifier: GPL-3.0-or-later
"""In a guest: run a program and say what it printed, how it ended, and what the kernel logged meanwhile.

usage: python3 -m tests.vm.kernel_guest.watched PROGRAM ARGUMENT...
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.vm.kernel_guest.command import run


def main() -> None:
    before = run("dmesg").splitlines()
    program, *arguments = sys.argv[1:]
    argv = [sys.executable, "-m", f"tests.vm.kernel_guest.{program}", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True)
    log = run("dmesg").splitlines()[len(before) :]
    print(json.dumps({"status": done.returncode, "output": done.stdout, "errors": done.stderr, "log": log}))


if __name__ == "__main__":
    main()
