# SPDX-License-Identifier: GPL-3.0-or-later
"""What the file of a kernel module says of itself: build-id, vermagic, symbol versions, who signed it.

Promise: a damaged file raises ValueError and nothing else, whatever is in it. A signature is only read, never
verified: whether it is good, and whether its key counts, the kernel decides.
Formats: elf(5); struct modversion_info, struct module_signature and "~Module signature appended~" of the kernel.
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import der

NOTE_NAME = b"GNU\0"
NOTE_BUILD_ID = 3
SECTION_NOTE = 7
SECTION_NOBITS = 8
#: A CRC as unsigned long, and the name, filled up with zeros.
VERSION_BYTES = 64
SIGNATURE_MAGIC = b"~Module signature appended~\n"
#: algo, hash, id_type, signer_len, key_id_len, 3 bytes of padding, sig_len in big-endian order.
SIGNATURE_TRAILER = struct.Struct(">BBBBB3xI")
SIGNATURE_IS_PKCS7 = 2


@dataclass(frozen=True)
class ModuleFile:
    """One module file; what it does not say is None or empty."""

    build_id: str | None = None
    info: dict[str, str] = field(default_factory=dict)  # of .modinfo, the first value of each name
    versions: dict[str, int] = field(default_factory=dict)  # CRC of each symbol that it uses
    signature: der.Signature | None = None

    @property
    def vermagic(self) -> str | None:
        """For which kernel, built how."""
        return self.info.get("vermagic")


def parse(data: bytes) -> ModuleFile:
    """Read a module that is not packed. Raises ValueError."""
    try:
        found = {name: (offset, size) for name, kind, offset, size in sections(data) if kind != SECTION_NOBITS}
        parts = {name: data[offset : offset + size] for name, (offset, size) in found.items()}
        return ModuleFile(
            build_id=elf_build_id(data),
            info=_info(parts.get(b".modinfo", b"")),
            versions=_versions(parts.get(b"__versions", b"")),
            signature=signature(data),
        )
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"it is damaged: {error}") from error


def load(path: str) -> ModuleFile:
    """Read a module file, packed or not. Raises ValueError, which names the file, and OSError."""
    try:
        return parse(read_module(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sections(data: bytes) -> Iterator[tuple[bytes, int, int, int]]:
    """Name, type, offset and size of each section. Raises ValueError."""
    if data[:6] != b"\x7fELF\x02\x01" or len(data) < 64:
        raise ValueError("it is not a 64-bit little-endian ELF file")
    try:
        (table,) = struct.unpack_from("<Q", data, 40)
        entry_bytes, count, names = struct.unpack_from("<HHH", data, 58)
        entries = []
        for index in range(count):
            name, kind = struct.unpack_from("<II", data, table + index * entry_bytes)
            offset, size = struct.unpack_from("<QQ", data, table + index * entry_bytes + 24)
            if kind != SECTION_NOBITS and offset + size > len(data):
                raise ValueError("a section reaches beyond its end")
            entries.append((name, kind, offset, size))
        strings = data[entries[names][2] : entries[names][2] + entries[names][3]]
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError("its section table is damaged") from error
    for name, kind, offset, size in entries:
        yield strings[name:].split(b"\0", 1)[0], kind, offset, size


def _info(data: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in data.split(b"\0"):
        name, sign, value = item.partition(b"=")
        if sign:
            found.setdefault(name.decode("utf-8", "replace"), value.decode("utf-8", "replace"))
    return found


def _versions(data: bytes) -> dict[str, int]:
    found = {}
    for at in range(0, len(data) - VERSION_BYTES + 1, VERSION_BYTES):
        (crc,) = struct.unpack_from("<Q", data, at)
        found[data[at + 8 : at + VERSION_BYTES].split(b"\0", 1)[0].decode("ascii", "replace")] = crc
    return found


def signature(data: bytes) -> der.Signature | None:
    """Who signed a module, None when nobody did. Raises ValueError for one that cannot be read."""
    begin = len(unsigned(data))
    if begin == len(data):
        return None
    return der.signature(data[begin : len(data) - len(SIGNATURE_MAGIC) - SIGNATURE_TRAILER.size])


def unsigned(data: bytes) -> bytes:
    """A module without its signature; as it is when it has none. Raises ValueError."""
    if not data.endswith(SIGNATURE_MAGIC):
        return data
    end = len(data) - len(SIGNATURE_MAGIC) - SIGNATURE_TRAILER.size
    if end < 0:
        raise ValueError("its signature is cut off")
    _algorithm, _digest, kind, _signer, _key, length = SIGNATURE_TRAILER.unpack_from(data, end)
    if kind != SIGNATURE_IS_PKCS7 or length > end:
        raise ValueError("its signature is damaged or of an unknown type")
    return data[: end - length]


def notes_build_id(data: bytes) -> str | None:
    """The GNU build-id in a sequence of ELF notes, in hexadecimal, or None."""
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
    """The GNU build-id of an ELF file, in hexadecimal, or None; None also when it is not such a file."""
    try:
        for _name, kind, offset, size in sections(data):
            found = notes_build_id(data[offset : offset + size]) if kind == SECTION_NOTE else None
            if found:
                return found
    except ValueError:
        return None
    return None


def read_module(path: str) -> bytes:
    """Content of a kernel module file, unpacked when its name says it is packed. Raises ValueError, OSError."""
    try:
        if path.endswith(".xz"):
            with lzma.open(path) as packed:
                return packed.read()
        if path.endswith(".gz"):
            with gzip.open(path) as packed:
                return packed.read()
        if path.endswith(".zst"):
            done = subprocess.run(["zstd", "-dcq", path], capture_output=True, check=True)
            return done.stdout
    except (lzma.LZMAError, EOFError, subprocess.SubprocessError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error
    with open(path, "rb") as plain:
        return plain.read()
