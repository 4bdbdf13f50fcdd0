# SPDX-License-Identifier: GPL-3.0-or-later
"""The bitmap file: its space is real, its header is checked, and it never lies on a volume that it tracks."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from bmigrate.breqd import bitmapfile, placement
from bmigrate.breqd.bitmapfile import BitmapFile
from bmigrate.common import blockdev, faults
from bmigrate.common.errors import DefectError, RefusedError

SIZE = 64 * 1024 * 1024 + 3584
LABEL = {"workload": "w", "volume": "v", "identity": {"size_bytes": SIZE, "serial": "x"}}


def make(path: Path, all_dirty: bool = False) -> BitmapFile:
    """A map of the fault disk."""
    return bitmapfile.create(path, SIZE, 4096, LABEL, all_dirty)


def test_what_is_stored_is_there_for_the_next_daemon(tmp_path: Path) -> None:
    first = make(tmp_path / "v.bitmap")
    first.map[2047] = 0x81
    first.failed[1] = 2
    crc = first.crc()
    again = BitmapFile(tmp_path / "v.bitmap")
    assert (again.size_bytes, again.granule_bytes, again.label) == (SIZE, 4096, LABEL)
    assert again.map[2047] == 0x81 and again.failed[1] == 2 and again.map_bytes == 2049
    assert again.crc() == crc and again.map_id == first.map_id
    again.failed[1] = 0
    assert again.crc() != crc


def test_a_seed_marks_every_block_and_no_bit_behind_the_last(tmp_path: Path) -> None:
    item = make(tmp_path / "v.bitmap", all_dirty=True)
    blocks = SIZE // 4096 + 1
    assert bytes(item.map) == b"\xff" * (blocks // 8) + bytes([0xFF >> (8 - blocks % 8)])
    assert not item.failed.any()


def test_space_is_reserved_when_the_file_is_made(tmp_path: Path) -> None:
    make(tmp_path / "v.bitmap")
    status = os.stat(tmp_path / "v.bitmap")
    assert status.st_blocks * 512 >= status.st_size, "a sparse map dies of SIGBUS on a full disk"


def test_holes_are_filled_when_a_sparse_copy_is_opened(tmp_path: Path) -> None:
    make(tmp_path / "v.bitmap")
    content = (tmp_path / "v.bitmap").read_bytes()
    copy = tmp_path / "copy.bitmap"
    with open(copy, "wb") as stream:
        stream.write(content[:4096])
        stream.truncate(len(content))
    assert os.stat(copy).st_blocks * 512 < len(content)
    BitmapFile(copy)
    assert os.stat(copy).st_blocks * 512 >= len(content)


def test_a_full_disk_is_a_clear_error_and_leaves_the_old_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make(tmp_path / "v.bitmap")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(RefusedError) as refused:
        make(tmp_path / "v.bitmap", all_dirty=True)
    assert refused.value.reason == "no_space" and "bitmap_directory" in str(refused.value)
    monkeypatch.undo()
    assert BitmapFile(tmp_path / "v.bitmap").map_id == old.map_id
    assert [entry.name for entry in tmp_path.iterdir()] == ["v.bitmap"]


def test_dying_before_the_rename_leaves_the_old_map(tmp_path: Path) -> None:
    old = make(tmp_path / "v.bitmap")
    faults.configure("breqd.bitmap_rename=error:5")
    try:
        with pytest.raises(OSError):
            make(tmp_path / "v.bitmap", all_dirty=True)
    finally:
        faults.configure("")
    assert BitmapFile(tmp_path / "v.bitmap").map_id == old.map_id


@pytest.mark.parametrize(
    ("offset", "value", "why"),
    [
        (0, b"BREQDMAQ", "not a bitmap file"),
        (8, struct.pack("<I", 2), "checksum"),
        (16, struct.pack("<I", 8192), "checksum"),
        (24, struct.pack("<Q", SIZE + 4096), "checksum"),
        (4092, b"\0\0\0\0", "checksum"),
    ],
)
def test_a_damaged_header_is_never_read_as_a_map(tmp_path: Path, offset: int, value: bytes, why: str) -> None:
    make(tmp_path / "v.bitmap")
    with open(tmp_path / "v.bitmap", "r+b") as stream:
        stream.seek(offset)
        stream.write(value)
    with pytest.raises(DefectError, match=why) as damaged:
        BitmapFile(tmp_path / "v.bitmap")
    assert damaged.value.reason == "bad_bitmap"


def _with_header(path: Path, offset: int, value: bytes) -> None:
    """Change the header and make its checksum right again."""
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    content[4092:4096] = struct.pack("<I", zlib.crc32(content[:4092]))
    path.write_bytes(content)


def test_another_version_or_geometry_is_refused_although_its_checksum_is_right(tmp_path: Path) -> None:
    for offset, value, why in ((8, struct.pack("<I", 9), "version 9"), (24, struct.pack("<Q", SIZE * 2), "geometry")):
        make(tmp_path / "v.bitmap")
        _with_header(tmp_path / "v.bitmap", offset, value)
        with pytest.raises(DefectError, match=why):
            BitmapFile(tmp_path / "v.bitmap")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "v.bitmap")
    os.truncate(tmp_path / "v.bitmap", 8192)
    with pytest.raises(DefectError, match="8192 bytes"):
        BitmapFile(tmp_path / "v.bitmap")


def test_granule_auto_keeps_the_map_within_128_mib() -> None:
    assert bitmapfile.choose_granule(1 << 40, None) == 4096
    assert bitmapfile.choose_granule(4 << 40, None) == 4096, "4 TiB and 4 KiB are just 128 MiB"
    assert bitmapfile.choose_granule((4 << 40) + 32768, None) == 8192
    for size in (1, 1 << 30, 1 << 42, 1 << 45):
        granule = bitmapfile.choose_granule(size, None)
        assert granule >= 4096 and size / granule / 8 <= 128 << 20
    assert bitmapfile.choose_granule(1 << 30, 65536) == 65536


def test_a_map_on_the_volume_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory's own devices are taken for volumes: whichever it is, it is refused by name."""
    below = {1000, 1001}
    monkeypatch.setattr(placement, "devices_below", lambda _directory: below)
    monkeypatch.setattr(blockdev, "device_number", lambda device: {"/dev/p": 1001, "/dev/q": 7}[device])
    placement.refuse_protected(tmp_path, [("other", "/dev/q")])
    with pytest.raises(RefusedError) as refused:
        placement.refuse_protected(tmp_path, [("other", "/dev/q"), ("pgdata", "/dev/p")])
    assert refused.value.reason == "bitmap_on_volume" and refused.value.volume == "pgdata"


def test_the_devices_below_the_root_file_system_are_found() -> None:
    """On a machine whose root lies on a block device, that device is among them, and a partition brings its disk."""
    number = os.stat("/").st_dev
    found = placement.devices_below(Path("/etc/not/there"))
    if Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").exists():
        assert number in found
    for device in found:
        directory = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
        assert directory.exists()
        if (directory / "partition").exists():
            major, minor = (directory.parent / "dev").read_text().split(":")
            assert os.makedev(int(major), int(minor)) in found
