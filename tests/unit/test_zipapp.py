# SPDX-License-Identifier: GPL-3.0-or-later
"""The file that carries the programs: the same bytes each time, with byte code that is used, or else the source."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.util import MAGIC_NUMBER
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def build(target: Path, seed: str) -> bytes:
    """Built by a process of its own, as the role does."""
    command = [sys.executable, str(ROOT / "tools" / "build_zipapp.py"), "--output", str(target)]
    subprocess.run(command, check=True, capture_output=True, env={"PYTHONHASHSEED": seed})
    return target.read_bytes()


def changed(source: Path, target: Path, suffix: str, old: bytes, new: bytes) -> None:
    """A copy in which the members with this suffix have other bytes."""
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w") as out:
        for info in archive.infolist():
            content = archive.read(info)
            if info.filename.endswith(suffix):
                assert old in content
                content = content.replace(old, new)
            out.writestr(info, content)


def version(app: Path) -> subprocess.CompletedProcess[str]:
    """What `bmigrate --version` says."""
    link = app.with_name("bmigrate")
    link.unlink(missing_ok=True)
    link.symlink_to(app)
    return subprocess.run([sys.executable, "-sE", str(link), "--version"], capture_output=True, text=True)


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    assert build(tmp_path / "one.pyz", "1") == build(tmp_path / "two.pyz", "2")


@pytest.mark.parametrize(
    "suffix, old, new",
    [
        ("__init__.pyc", MAGIC_NUMBER, b"\0\0\r\n"),
        ("main.pyc", MAGIC_NUMBER, b"\0\0\r\n"),
        ("main.py", b"def ", b"syntax error "),
    ],
)
def test_byte_code_is_taken_if_it_fits_and_the_source_if_not(
    tmp_path: Path, suffix: str, old: bytes, new: bytes
) -> None:
    """Byte code of another Python: the source runs. Broken source beside byte code that fits: nobody reads it."""
    app, other = tmp_path / "app.pyz", tmp_path / "other.pyz"
    build(app, "0")
    changed(app, other, suffix, old, new)
    said, expected = version(other), version(app)
    assert said.returncode == 0, said.stderr
    assert said.stdout == expected.stdout != ""
