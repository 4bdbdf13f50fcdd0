# SPDX-License-Identifier: GPL-3.0-or-later
"""Makes the guests' initramfs: busybox, a handful of modules, our own /init.

A distribution's initramfs spends seconds of an emulated boot on finding hardware that a guest of the lab does not
have. The kernel reads several cpio archives one after the other, so a guest's own configuration is simply a second
archive behind the first. Pure but for reading the files that go in.
"""

from __future__ import annotations

import lzma
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "crc32c-intel", "ext4", "virtio_net")


@dataclass(frozen=True)
class Entry:
    """One member of an archive; a directory has no content."""

    path: str
    mode: int
    content: bytes = b""


def directory(path: str) -> Entry:
    """A directory that everybody may read."""
    return Entry(path, stat.S_IFDIR | 0o755)


def regular(path: str, content: bytes, permissions: int = 0o644) -> Entry:
    """A file owned by root."""
    return Entry(path, stat.S_IFREG | permissions, content)


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, each directory above them first."""
    found: dict[str, Entry] = {}
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.path).parents):
            if str(parent) != ".":
                found.setdefault(str(parent), directory(str(parent)))
        found[entry.path] = entry
    return list(found.values())


def cpio(entries: Iterable[Entry]) -> bytes:
    """An archive in the kernel's `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    out = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.path.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.content
        out += bytes(-len(out) % 4)
    return bytes(out)


def load_order(modules_dep: str, wanted: Iterable[str]) -> list[str]:
    """Paths of the wanted modules and of all that they need, dependencies first; built-in ones are left out."""
    paths: dict[str, str] = {}
    needs: dict[str, list[str]] = {}
    for line in modules_dep.splitlines():
        path, _, rest = line.partition(":")
        paths[PurePosixPath(path).name.split(".")[0].replace("-", "_")] = path
        needs[path] = rest.split()
    order: list[str] = []
    for name in wanted:
        path = paths.get(name.replace("-", "_"), "")
        # modules.dep lists what must be loaded last first
        for one in [*reversed(needs.get(path, [])), path]:
            if one and one not in order:
                order.append(one)
    return order


def _module(path: Path) -> bytes:
    """A module as busybox can load it: newer kernels come with compressed ones."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def build(root: Path, release: str, init: bytes) -> bytes:
    """The archive for the kernel `release` installed under `root`, with `init` as its first program."""
    modules = root / "lib/modules" / release
    order = load_order((modules / "modules.dep").read_text(), MODULES)
    names = [PurePosixPath(path).name.removesuffix(".xz") for path in order]
    entries = [
        *(directory(name) for name in ("dev", "proc", "sys", "sysroot", "config")),
        regular("bin/busybox", (root / "usr/bin/busybox").read_bytes(), 0o755)
        if (root / "usr/bin/busybox").exists()
        else regular("bin/busybox", (root / "bin/busybox").read_bytes(), 0o755),
        regular("init", init, 0o755),
        regular("modules/order", "".join(f"{name}\n" for name in names).encode()),
        *(regular(f"modules/{name}", _module(modules / path)) for name, path in zip(names, order)),
    ]
    return cpio(with_parents(entries))
