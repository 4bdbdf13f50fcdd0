# SPDX-License-Identifier: GPL-3.0-or-later
"""What must hold for every file of the repository: a licence line at the top, a size a reader can take in, no
markers of unfinished work. Prints what is wrong and exits with 1."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

MAX_BYTES = 40_000
# What a program wrote into a document that people write: a table of results is as long as it is.
GENERATED = re.compile(rb"<!-- truth table: begin -->.*?<!-- truth table: end -->", re.DOTALL)
WITHOUT_LICENCE_LINE = {"LICENSE"}
# Written so that this file does not find itself.
_WORDS = ("TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error")
_CALLS = ("pytest.sk" + "ip", "pytest.mark.xf" + "ail", "pytest.mark.sk" + "ip")
MARKERS = re.compile(rf"\b({'|'.join(_WORDS)})\b|({'|'.join(map(re.escape, _CALLS))})\b")
BINARY = {".png", ".webp"}


def complaints(path: Path) -> list[str]:
    """What is wrong with one file."""
    found = []
    raw = path.read_bytes()
    size = len(GENERATED.sub(b"", raw))
    if size > MAX_BYTES and path.name not in WITHOUT_LICENCE_LINE:
        found.append(f"{path}: {size} bytes; the limit is {MAX_BYTES}")
    if path.suffix in BINARY:
        return found
    text = raw.decode("utf-8")
    head = "\n".join(text.splitlines()[:5])
    if text and path.name not in WITHOUT_LICENCE_LINE and "SPDX-License-Identifier:" not in head:
        found.append(f"{path}: no SPDX line at the top")
    if module_licence_is_wrong(path, head):
        found.append(f"{path}: files of the kernel module are GPL-2.0-only")
    for number, line in enumerate(text.splitlines(), start=1):
        if MARKERS.search(line):
            found.append(f"{path}:{number}: {line.strip()[:100]}")
    return found


def module_licence_is_wrong(path: Path, head: str) -> bool:
    """Whether a file in module_src/ names another licence than the kernel's."""
    return path.parts[0] == "module_src" and "GPL-2.0-only" not in head and bool(head)


def main() -> int:
    """Check all files that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], check=True, capture_output=True
    )
    paths = sorted({Path(name) for name in listed.stdout.decode().split("\0") if name})
    found = [line for path in paths if path.is_file() and not path.is_symlink() for line in complaints(path)]
    print("\n".join(found) if found else f"{len(paths)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
