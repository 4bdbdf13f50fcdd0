# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Reads the GNU build-id of a kernel module, from its file or from what the kernel shows of it.

Equal build-ids mean the very same build; equal versions mean nothing. Reads only.
"""

from __future__ import annotations

import gzip
import lzma
import struct

NOTE_NAME = b"GNU\0"
NOTE_BUILD_ID = 3
SECTION_NOTE = 7


def notes_build_id(data: bytes) -> str | None:
    """The GNU build-id in a sequence of ELF notes, in hexadecimal, or None (format: elf(5), Nhdr)."""
    at = 0
    while at + 12 <= len(data):
        name_bytes, desc_bytes, kind = struct.unpack_from("<III", data, at)
        name = data[at + 12 : at + 12 + name_bytes]
        start = at + 12 + (name_bytes + 3) // 4 * 4
        if kind == NOTE_BUILD_ID and name == NOTE_NAME:
            return data[start : start + desc_bytes].hex()
        at = start + (desc_bytes + 3) // 4 * 4
    return None


def elf_build_id(data: bytes) -> str | None:
    """The GNU build-id of a 64-bit little-endian ELF file, in hexadecimal, or None (format: elf(5))."""
    if data[:6] != b"\x7fELF\x02\x01":
        return None
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_bytes, count = struct.unpack_from("<HH", data, 58)
    for index in range(count):
        (kind,) = struct.unpack_from("<I", data, table + index * entry_bytes + 4)
        offset, size = struct.unpack_from("<QQ", data, table + index * entry_bytes + 24)
        found = notes_build_id(data[offset : offset + size]) if kind == SECTION_NOTE else None
        if found:
            return found
    return None


def read_module(path: str) -> bytes:
    """Content of a kernel module file, unpacked when its name says it is packed."""
    if path.endswith(".xz"):
        with lzma.open(path) as packed:
            return packed.read()
    if path.endswith(".gz"):
        with gzip.open(path) as packed:
            return packed.read()
    with open(path, "rb") as plain:
        return plain.read()
