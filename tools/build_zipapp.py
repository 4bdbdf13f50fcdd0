#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build build/bmigrate.pyz, the one file that carries all programs to the hosts.

Reproducible: the same sources give the same bytes (sorted names, fixed time stamp, fixed modes, no
byte code), so that a second install reports no change. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHEBANG = b"#!/usr/bin/python3 -sE\n"
TIME_STAMP = (2000, 7, 1, 0, 0, 0)
MAIN = b"""# SPDX-License-Identifier: GPL-3.0-or-later
import sys

from bmigrate.__main__ import main

sys.exit(main())
"""


def build(source: Path, target: Path) -> str:
    """Write the zipapp and return its SHA-256; the file is replaced only when its content differs."""
    temporary = target.with_name(target.name + ".new")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as stream:
        stream.write(SHEBANG)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            members = [("__main__.py", MAIN)]
            members += [
                (path.relative_to(source).as_posix(), path.read_bytes())
                for path in sorted((source / "bmigrate").rglob("*.py"))
            ]
            for name, content in members:
                info = zipfile.ZipInfo(name, TIME_STAMP)
                info.compress_type = zipfile.ZIP_DEFLATED
                info.external_attr = 0o644 << 16
                info.create_system = 3
                archive.writestr(info, content)
    temporary.chmod(0o755)
    content = temporary.read_bytes()
    if target.exists() and target.read_bytes() == content:
        temporary.unlink()
    else:
        os.replace(temporary, target)
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=ROOT / "src", help="directory that holds bmigrate/")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bmigrate.pyz")
    arguments = parser.parse_args()
    print(build(arguments.source, arguments.output), arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
