# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's disks keep what was flushed and only that: checked against a plain model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.volatile import CHUNK, SECTOR, VolatileDisk

SECTORS = 3 * CHUNK // SECTOR + 7
SIZE = SECTORS * SECTOR

ranges = st.tuples(st.integers(0, SECTORS - 1), st.integers(1, 40)).map(lambda r: (r[0], min(r[1], SECTORS - r[0])))
steps = st.one_of(
    st.tuples(st.just("write"), ranges, st.integers(1, 255)),
    st.tuples(st.just("zero"), ranges, st.just(0)),
    st.tuples(st.just("flush"), st.just((0, 0)), st.just(0)),
)


def _file(directory: Path, content: bytes) -> Path:
    path = directory / "disk.raw"
    path.write_bytes(content)
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=40))
def test_reads_see_every_write_and_the_file_only_the_flushed(
    tmp_path_factory: pytest.TempPathFactory, todo: list[tuple[str, tuple[int, int], int]]
) -> None:
    start = bytes(i % 251 for i in range(SIZE))
    path = _file(tmp_path_factory.mktemp("disk"), start)
    disk = VolatileDisk(str(path))
    now, flushed = bytearray(start), start
    for kind, (first, count), value in todo:
        at, size = first * SECTOR, count * SECTOR
        if kind == "write":
            disk.write(at, bytes([value]) * size)
            now[at : at + size] = bytes([value]) * size
        elif kind == "zero":
            disk.zero(at, size)
            now[at : at + size] = bytes(size)
        else:
            disk.flush()
            flushed = bytes(now)
            assert disk.volatile_bytes == 0
        assert path.read_bytes() == flushed
        assert disk.read(0, SIZE) == now
    disk.close()
    assert path.read_bytes() == flushed


def test_a_full_cache_is_written_back_and_counted(tmp_path: Path) -> None:
    path = _file(tmp_path, bytes(SIZE))
    disk = VolatileDisk(str(path), limit_bytes=CHUNK)
    disk.write(0, b"x" * SECTOR)
    assert (disk.forced_flushes, path.read_bytes()[:1]) == (0, b"\0")
    disk.write(CHUNK, b"y" * SECTOR)
    assert (disk.forced_flushes, path.read_bytes()[:1]) == (1, b"x")
    disk.close()


@pytest.mark.parametrize(("offset", "length"), [(1, SECTOR), (0, 100), (SIZE - SECTOR, 2 * SECTOR)])
def test_what_is_no_whole_sector_of_the_disk_is_refused(tmp_path: Path, offset: int, length: int) -> None:
    disk = VolatileDisk(str(_file(tmp_path, bytes(SIZE))))
    with pytest.raises(ValueError, match="not whole sectors"):
        disk.write(offset, bytes(length))
    disk.close()
