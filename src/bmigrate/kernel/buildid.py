# SPDX-License-Identifier: GPL-3.0-or-later
"""Which build of a module is loaded, and which one a file is.

Promises to tell two builds apart whose versions are equal: the GNU build-id is a hash that the linker makes of the
whole module. The format is in elf(5): notes of a name size, a description size and a type, each part padded to 4 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from bmigrate.kernel import errors

_NT_GNU_BUILD_ID = 3
_SHT_NOTE = 7
_SYS_MODULE = Path("/sys/module")


def notes(data: bytes, byte_order: str = "<") -> Iterator[tuple[bytes, int, bytes]]:
    """The notes in `data`: (name without its NUL, type, description). Raises ValueError when it is cut off."""
    offset = 0
    while offset < len(data):
        if offset + 12 > len(data):
            raise ValueError("an ELF note is cut off")
        name_bytes, description_bytes, kind = struct.unpack_from(byte_order + "III", data, offset)
        name_at = offset + 12
        description_at = name_at + (name_bytes + 3) // 4 * 4
        offset = description_at + (description_bytes + 3) // 4 * 4
        if description_at + description_bytes > len(data):
            raise ValueError("an ELF note is cut off")
        name = data[name_at : name_at + name_bytes].rstrip(b"\0")
        yield name, kind, data[description_at : description_at + description_bytes]


def from_notes(data: bytes, byte_order: str = "<") -> str | None:
    """The GNU build-id in `data` as hexadecimal digits, None if there is none. Raises ValueError."""
    for name, kind, description in notes(data, byte_order):
        if name == b"GNU" and kind == _NT_GNU_BUILD_ID and description:
            return description.hex()
    return None


def of_file(path: str | Path) -> str:
    """The build-id of a module file (.ko, not compressed). Raises ValueError when it has none, OSError."""
    data = Path(path).read_bytes()
    if data[:4] != b"\x7fELF" or len(data) < 64 or data[4] not in (1, 2) or data[5] not in (1, 2):
        raise ValueError(f"{path} is not an ELF file")
    order = "<" if data[5] == 1 else ">"
    try:
        for offset, size in _note_sections(data, order, wide=data[4] == 2):
            found = from_notes(data[offset : offset + size], order)
            if found:
                return found
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    raise ValueError(f"{path} has no GNU build-id")


def _note_sections(data: bytes, order: str, wide: bool) -> Iterator[tuple[int, int]]:
    table = struct.unpack_from(order + ("Q" if wide else "I"), data, 0x28 if wide else 0x20)[0]
    entry_bytes, count = struct.unpack_from(order + "HH", data, 0x3A if wide else 0x2E)
    for index in range(count):
        at = table + index * entry_bytes
        kind = struct.unpack_from(order + "I", data, at + 4)[0]
        if kind == _SHT_NOTE:
            offset, size = struct.unpack_from(order + ("QQ" if wide else "II"), data, at + (24 if wide else 16))
            if offset + size > len(data):
                raise ValueError("a section reaches beyond the end")
            yield offset, size


def of_loaded(module: str, root: Path = _SYS_MODULE) -> str:
    """The build-id of the loaded module. Raises NotLoaded, ValueError when the kernel tells none."""
    path = root / module / "notes" / ".note.gnu.build-id"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        if (root / module).is_dir():
            raise ValueError(f"the loaded module {module} has no build-id") from error
        raise errors.NotLoaded(
            f"the module {module} is not loaded", error.errno or 0, hint=f"modprobe {module}"
        ) from error
    found = from_notes(data, "<" if struct.pack("=H", 1) == b"\1\0" else ">")
    if not found:
        raise ValueError(f"the loaded module {module} has no build-id")
    return found


def is_loaded_build(module: str, path: str | Path, root: Path = _SYS_MODULE) -> bool:
    """Whether the loaded module is the very build in the file `path`. Raises as of_loaded and of_file do."""
    return of_loaded(module, root) == of_file(path)
