# SPDX-License-Identifier: GPL-3.0-or-later
"""Is a device fit for a volume, and what is on it already?

Promise: nothing here writes to a device, and nothing that looks like somebody's data passes as
empty. The answers name what was found, so that an operator can decide about overwriting it.
"""

from __future__ import annotations

import json
import os
from typing import Any, Callable

from bmigrate.common import blockdev
from bmigrate.common.errors import RefusedError

Attempt = Callable[..., tuple[int, str]]
MIB = 1 << 20


def facts(device: str) -> dict[str, Any]:
    """What this host knows of a device: {path, present, size_bytes, logical_block_size, identity, ...}.

    Never raises for a missing device: ``present`` is False and ``problem`` says why.
    """
    result: dict[str, Any] = {"path": device, "present": False}
    try:
        number = blockdev.device_number(device)
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except RefusedError as error:
        return dict(result, problem=error.message, reason=error.reason)
    except OSError as exc:
        return dict(result, problem=f"{device} cannot be opened: {exc.strerror}", reason="device_missing")
    try:
        result.update(
            present=True,
            real_path=os.path.realpath(device),
            number=f"{os.major(number)}:{os.minor(number)}",
            size_bytes=blockdev.size_bytes(fd),
            logical_block_size=blockdev.logical_block_size(fd),
            identity=blockdev.identity(device),
            scheduler=blockdev.scheduler_of(blockdev.disk_dir(device)),
            untrackable=untrackable(device),
        )
    finally:
        os.close(fd)
    return result


def untrackable(device: str) -> str | None:
    """Why the content of a device can change without our seeing it, in words, or None.

    The kernel module looks again at attach; what it cannot see is here: drivers that write to
    the disk below themselves.
    """
    disk = blockdev.disk_dir(device)
    for prefix, kind in (("bcache", "bcache"), ("drbd", "DRBD")):
        if disk.name.startswith(prefix):
            return f"of {kind}, which changes the disk below it by itself"
    holders = disk / "holders"
    if (disk / "dm").exists() or (disk / "md").exists():
        # These handle bios, and bcache hands its own on to them without a trace.
        above = sorted(entry.name for entry in holders.iterdir()) if holders.is_dir() else []
        if any(name.startswith("bcache") for name in above):
            return "below bcache, which writes to it without a trace"
    for name, harmless, why in (
        ("zoned", "none", "zoned"),
        ("dax", "0", "written past the block layer (DAX)"),
    ):
        try:
            if (disk / "queue" / name).read_text().strip() != harmless:
                return why
        except OSError:
            continue  # the kernel knows no such thing
    return None


def contents(device: str, attempt: Attempt) -> list[str]:
    """What a device holds, in words; empty when nothing that looks like data was found.

    Three looks: libblkid's low-level probe, wipefs (which lists every signature, not only the
    winning one), and the first MiB, which must be all zero: a raw database without any signature
    would pass the other two.

    Raises:
        RefusedError: reason ``probe_failed``: a look was not possible; that never means empty.
    """
    found = []
    code, output = attempt(["blkid", "--probe", "--output", "export", device], 30.0)
    if code == 0 and output.strip():
        tags = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
        kind = tags.get("TYPE") or tags.get("PTTYPE")
        found.append(f"{kind or 'a signature'} (blkid)" + (f", label {tags['LABEL']}" if "LABEL" in tags else ""))
    elif code == 8:
        found.append("several signatures at once (blkid is ambivalent)")
    elif code not in (0, 2):
        raise _probe_failed(device, f"blkid: exit code {code}: {output.strip()[-200:]}")
    code, output = attempt(["wipefs", "--no-act", "--json", device], 30.0)
    if code != 0:
        raise _probe_failed(device, f"wipefs: exit code {code}: {output.strip()[-200:]}")
    if output.strip():
        try:
            signatures = json.loads(output).get("signatures", [])
        except (ValueError, AttributeError) as exc:
            raise _probe_failed(device, f"wipefs answered something that is not JSON: {exc}") from exc
        found += [f"{item.get('type')} at byte {item.get('offset')} (wipefs)" for item in signatures]
    if not first_mib_zero(device):
        found.append("bytes other than zero in its first MiB")
    return found


def first_mib_zero(device: str) -> bool:
    """Whether the first MiB (or the whole of a smaller device) is zero, read past the cache."""
    fd = blockdev.open_direct(device)
    try:
        length = min(MIB, blockdev.size_bytes(fd))
        length -= length % blockdev.logical_block_size(fd)
        view = blockdev.DirectReader(fd, MIB).read(0, length)
        return not any(view.cast("Q")) if length % 8 == 0 else not any(view)
    finally:
        os.close(fd)


def _probe_failed(device: str, why: str) -> RefusedError:
    return RefusedError(
        f"what {device} holds cannot be determined: {why}",
        hint="correct that; it is never taken for empty",
        reason="probe_failed",
    )


def fstab_entries(text: str, paths: list[str], sources: list[str]) -> list[str]:
    """Lines of an fstab that mount one of our mount points or devices.

    Args:
        text: content of /etc/fstab. paths: mount points. sources: device paths, real and by-id, and
            tags such as ``UUID=...``.
    """
    hits = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0].startswith("#"):
            continue
        if words[1].rstrip("/") in paths or words[0] in sources or _real(words[0]) in sources:
            hits.append(line.strip())
    return hits


def _real(source: str) -> str:
    """The device behind an fstab source, tags resolved over the links that udev makes."""
    for tag, directory in (
        ("UUID=", "by-uuid"),
        ("LABEL=", "by-label"),
        ("PARTUUID=", "by-partuuid"),
        ("PARTLABEL=", "by-partlabel"),
        ("ID=", "by-id"),
    ):
        if source.startswith(tag):
            value = source[len(tag) :].strip('"')
            return os.path.realpath(f"/dev/disk/{directory}/{value}")
    return os.path.realpath(source) if source.startswith("/") else source
