#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Build build/bmigrate.pyz, the one file that carries all programs to the hosts.

Reproducible: the same sources and the same Python give the same bytes (sorted names, fixed time
stamp, fixed modes), so that a second install reports no change. Byte code is in it beside the source,
because a zipapp cannot cache its own, and a step of a handover is a new process: a host whose Python
has another byte code takes the source. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import py_compile
import sys
import tempfile
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


def byte_code(path: Path, name: str) -> bytes:
    """The byte code of a source file, never checked against it: both travel in one archive.

    Args:
        name: what a traceback calls the file.
    """
    with tempfile.TemporaryDirectory() as directory:
        compiled = py_compile.compile(
            str(path),
            os.path.join(directory, "code"),
            dfile=name,
            doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        return Path(str(compiled)).read_bytes()


def build(source: Path, target: Path) -> str:
    """Write the zipapp and return its SHA-256; the file is replaced only when its content differs."""
    temporary = target.with_name(target.name + ".new")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as stream:
        stream.write(SHEBANG)
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            members = [("__main__.py", MAIN)]
            for path in sorted((source / "bmigrate").rglob("*.py")):
                name = path.relative_to(source).as_posix()
                members += [(name, path.read_bytes()), (name + "c", byte_code(path, name))]
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
