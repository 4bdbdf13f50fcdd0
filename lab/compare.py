# SPDX-License-Identifier: GPL-3.0-or-later
"""Compares two raw disk files on the host: the truth that needs none of the software under test.

Promises: every byte of both files is looked at; holes are zeros. Must never write to them.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_CHUNK = 1 << 20
_BLOCK = 4096
_SECTOR = 512
_FIRST = 16


@dataclass
class Comparison:
    """What two files have in common; sizes and offsets in bytes."""

    sizes_bytes: dict[str, int]
    sha256: dict[str, str]
    different_blocks: int = 0
    different_sectors: int = 0
    first_offsets: list[int] = field(default_factory=list)
    nonzero_sectors: dict[str, int] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether the files are the same, size included."""
        return self.different_sectors == 0 and len(set(self.sizes_bytes.values())) == 1

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"equal": self.equal, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"{name}: {size} bytes, sha256 {self.sha256[name]}" for name, size in self.sizes_bytes.items()]
        if self.equal:
            lines.append("equal")
        else:
            lines.append(f"{self.different_blocks} blocks of 4 KiB and {self.different_sectors} sectors differ")
            lines.append("first at " + ", ".join(str(offset) for offset in self.first_offsets))
        return "\n".join(lines)


def sha256_file(path: Path) -> str:
    """SHA-256 of the whole file, holes as zeros."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while True:
            part = file.read(_CHUNK)
            if not part:
                return digest.hexdigest()
            digest.update(part)


def _nonzero_sectors(path: Path) -> int:
    count = 0
    zeros = bytes(_SECTOR)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // _SECTOR * _SECTOR
            except OSError:
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            while at < end:
                part = os.pread(file.fileno(), min(_CHUNK, end - at), at)
                if part.count(0) != len(part):
                    count += sum(part[i : i + _SECTOR] != zeros for i in range(0, len(part), _SECTOR))
                at += len(part)
    return count


def _differences(left: Path, right: Path, into: Comparison) -> None:
    with left.open("rb", buffering=0) as one, right.open("rb", buffering=0) as two:
        common = min(into.sizes_bytes.values())
        for start in range(0, common, _CHUNK):
            size = min(_CHUNK, common - start)
            a, b = os.pread(one.fileno(), size, start), os.pread(two.fileno(), size, start)
            if a != b:
                _look_closer(a, b, start, into)


def _look_closer(a: bytes, b: bytes, start: int, into: Comparison) -> None:
    for block in range(0, len(a), _BLOCK):
        if a[block : block + _BLOCK] == b[block : block + _BLOCK]:
            continue
        into.different_blocks += 1
        for sector in range(block, min(block + _BLOCK, len(a)), _SECTOR):
            if a[sector : sector + _SECTOR] != b[sector : sector + _SECTOR]:
                into.different_sectors += 1
                if len(into.first_offsets) < _FIRST:
                    into.first_offsets.append(start + sector)


def compare_files(files: dict[str, Path], count_nonzero: bool = False) -> Comparison:
    """Compare two files, given by name.

    Args:
        files: exactly two, as in {"alpha": ..., "beta": ...}.
        count_nonzero: also count the sectors that are not all zeros.
    """
    (name_a, a), (name_b, b) = files.items()
    with ThreadPoolExecutor(2) as pool:
        digests = dict(zip(files, pool.map(sha256_file, files.values())))
    result = Comparison({name_a: a.stat().st_size, name_b: b.stat().st_size}, digests)
    if digests[name_a] != digests[name_b]:
        _differences(a, b, result)
    if count_nonzero:
        result.nonzero_sectors = {name: _nonzero_sectors(path) for name, path in files.items()}
    return result
