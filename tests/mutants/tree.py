# SPDX-License-Identifier: GPL-3.0-or-later
"""A copy of the tree, with one patch in it.

Promises: the tree itself is never touched, and a patch that does not apply as it stands is an error. Line numbers may
have moved; the lines around may not have changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class PatchError(Exception):
    """A patch does not apply."""


def copy(target: Path, *below: str) -> None:
    """Copy what git tracks or would add, as it is now.

    Args:
        target: a directory that exists. below: only these paths; all when there is none.
    """
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *below]
    listed = subprocess.run(argv, cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    # Some tests ask git which files there are.
    subprocess.run(["git", "init", "-q"], cwd=target, check=True)


def apply(patch: Path, target: Path, check_only: bool = False) -> None:
    """Apply a patch to a copy of the tree.

    Args:
        check_only: change nothing; `target` may be the tree itself.

    Raises:
        PatchError: with what git said.
    """
    argv = ["git", "apply", "--whitespace=nowarn", *(["--check"] if check_only else []), str(patch)]
    # In a work tree of somebody else's, git apply would pass over paths that it takes to be outside.
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(target.resolve().parent))
    done = subprocess.run(argv, cwd=target, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PatchError(
            f"{patch.name} does not apply: {done.stderr.strip()}\n"
            "the code that it sabotages has changed: change the patch with it, and see that its test still fails"
        )
