# SPDX-License-Identifier: GPL-3.0-or-later
"""The bindings without a kernel module: build-ids of real ELF files, errors that say what to do, and no NumPy."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bmigrate.kernel import abi, buildid, channel, control
from bmigrate.kernel.errors import AttachRefused, KernelError, NotLoaded

ROOT = Path(__file__).resolve().parents[2]
BUILD_ID = "0123456789abcdef0123456789abcdef01234567"


def note(name: bytes, kind: int, description: bytes) -> bytes:
    """An ELF note, little-endian."""
    padded = name + b"\0" * (-len(name) % 4) + description + b"\0" * (-len(description) % 4)
    return b"".join(n.to_bytes(4, "little") for n in (len(name), len(description), kind)) + padded


@pytest.fixture(scope="module")
def elf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relocatable file as a .ko is one, with a build-id of our choice, made by the real linker."""
    directory = tmp_path_factory.mktemp("elf")
    (directory / "a.c").write_text("int answer = 42;\n")
    subprocess.run(["gcc", "-c", "a.c", "-o", "a.o"], cwd=directory, check=True)
    link = ["ld", "-r", f"--build-id=0x{BUILD_ID}", "a.o", "-o", "a.ko"]
    subprocess.run(link, cwd=directory, check=True)
    return directory / "a.ko"


def test_the_build_id_of_a_file_is_the_linkers(elf: Path) -> None:
    assert buildid.of_file(elf) == BUILD_ID


def test_a_file_without_build_id_is_said_to_have_none(elf: Path) -> None:
    with pytest.raises(ValueError, match="no GNU build-id"):
        buildid.of_file(elf.with_suffix(".o"))


@pytest.mark.parametrize("length", [0, 3, 63, 64, 200])
def test_a_cut_off_file_is_refused(elf: Path, tmp_path: Path, length: int) -> None:
    cut = tmp_path / "cut.ko"
    cut.write_bytes(elf.read_bytes()[:length])
    with pytest.raises(ValueError, match="cut"):
        buildid.of_file(cut)


def test_the_loaded_build_is_compared_by_its_note(elf: Path, tmp_path: Path) -> None:
    notes = tmp_path / "reqlog" / "notes"
    notes.mkdir(parents=True)
    other = note(b"Linux\0", 0x101, b"x" * 5)
    (notes / ".note.gnu.build-id").write_bytes(other + note(b"GNU\0", 3, bytes.fromhex(BUILD_ID)))
    assert buildid.of_loaded("reqlog", tmp_path) == BUILD_ID
    assert buildid.is_loaded_build("reqlog", elf, tmp_path)
    (notes / ".note.gnu.build-id").write_bytes(note(b"GNU\0", 3, bytes.fromhex(BUILD_ID[:-1] + "8")))
    assert not buildid.is_loaded_build("reqlog", elf, tmp_path)


def test_a_module_that_is_not_loaded_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotLoaded) as caught:
        buildid.of_loaded("reqlog", tmp_path)
    assert caught.value.code == "not_loaded" and "modprobe" in str(caught.value)


@pytest.mark.parametrize("length", [1, 11, 13, 17])
def test_a_cut_off_note_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="cut off"):
        buildid.from_notes(note(b"GNU\0", 3, b"12345678")[:length])


@pytest.mark.parametrize("opener", [channel.Channel, control.Control])
def test_a_missing_device_says_what_to_load(opener: type, tmp_path: Path) -> None:
    with pytest.raises(NotLoaded, match="modprobe reqlog") as caught:
        opener(str(tmp_path / "none"))
    assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize("opener", [channel.Channel, control.Control])
def test_a_file_that_is_no_device_of_ours_is_refused(opener: type, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    with pytest.raises(KernelError, match="does not tell its interface version") as caught:
        opener(str(path))
    assert caught.value.errno == errno.ENOTTY


def test_a_file_is_not_identified_as_a_volume(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(512))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(AttachRefused) as caught:
            control.identify(fd)
    finally:
        os.close(fd)
    assert caught.value.code == "not_block" and caught.value.volume == str(path)


@pytest.mark.parametrize("number", sorted(abi.REASONS))
def test_a_refusal_names_volume_reason_and_remedy(number: int) -> None:
    request = abi.ReqlogAttach(reason=number, slot=5, id=77)
    refusal = control._refusal(request, OSError(errno.EOPNOTSUPP, "x"), "/dev/example")
    code, meaning, hint = abi.REASONS[number]
    assert refusal.code == code and refusal.errno == errno.EOPNOTSUPP
    assert all(part in str(refusal) for part in ("/dev/example", meaning, hint))
    assert isinstance(refusal, AttachRefused) and (refusal.slot, refusal.attachment_id) == (5, 77)


def test_the_bindings_import_no_numpy() -> None:
    """Start-up time of the other programs is downtime."""
    program = (
        "import sys, bmigrate.kernel.channel, bmigrate.kernel.control, bmigrate.kernel.buildid;"
        "sys.exit('numpy' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT / "src")}).returncode
        == 0
    )
