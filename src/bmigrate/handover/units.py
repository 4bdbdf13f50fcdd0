# SPDX-License-Identifier: GPL-3.0-or-later
"""The systemd units of one workload: their texts, and bringing a directory in line with them.

Promise: the same configuration gives the same bytes; a workload's mounts and services start only
where its primary marker exists, never by local-fs.target, and stop before the shutdown unit closes
the volumes. Files that this version did not write are never touched.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from bmigrate.common import atomic, paths
from bmigrate.common.config import Config, Mount
from bmigrate.common.errors import RefusedError
from bmigrate.handover import names

HEADER = "# Written by `bmigrate units` for workload {workload}; changes here are lost.\n"
DROPIN = "50-bmigrate.conf"
MARK = "# Written by `bmigrate units` for workload "


def mount_text(config: Config, mount: Mount) -> str:
    """The mount unit of one mount.

    By the volume's device path, never by UUID: the replica has the same one.
    DefaultDependencies=no keeps it out of local-fs.target (with breqd, ordered after that, it would
    make a cycle); Conflicts and Before=umount.target put back the one default that is needed.
    No Requires= on our daemons: restarting one of them must never unmount anything.
    After=bmigrate-shutdown.service means: at poweroff this is unmounted before that unit's ExecStop.
    """
    return (
        HEADER.format(workload=config.workload)
        + f"""[Unit]
Description=Volume {mount.volume} of workload {config.workload}
DefaultDependencies=no
Conflicts=umount.target
Before=umount.target
AssertPathExists={paths.primary_marker(config.workload)}
Wants=bmigrate-early.service breqd.service bmigrate-shutdown.service
After=bmigrate-early.service breqd.service bmigrate-hold.service bmigrate-shutdown.service

[Mount]
What={_specifier(config.device(mount.volume))}
Where={_specifier(mount.path)}
Type={mount.fstype}
Options={_specifier(mount.options)}
TimeoutSec=600
"""
    )


def service_text(config: Config) -> str:
    """The drop-in of each service of the workload: only where the workload may run, only when mounted."""
    units = " ".join(names.mount_unit(mount.path) for mount in config.mounts)
    return (
        HEADER.format(workload=config.workload)
        + f"""[Unit]
AssertPathExists={paths.primary_marker(config.workload)}
Requires={units}
After={units} breqd.service bmigrate-shutdown.service
"""
    )


def bitmap_text(config: Config) -> str:
    """The drop-in of breqd that lets it write to a bitmap directory elsewhere."""
    return HEADER.format(workload=config.workload) + f"[Service]\nReadWritePaths={config.bitmap_directory}\n"


def _specifier(text: str) -> str:
    return text.replace("%", "%%")


def wanted(config: Config) -> dict[str, str]:
    """Relative path -> content of every unit file of the workload."""
    files = {names.mount_unit(mount.path): mount_text(config, mount) for mount in config.mounts}
    for service in config.services:
        files[f"{service}.d/{DROPIN}"] = service_text(config)
    if config.bitmap_directory:
        files[f"breqd.service.d/50-bmigrate-{config.workload}.conf"] = bitmap_text(config)
    return files


def present(directory: Path, workload: str) -> dict[str, str]:
    """Relative path -> content of the files in a directory that carry this workload's header."""
    found = {}
    header = HEADER.format(workload=workload)
    for pattern in ("*.mount", f"*.service.d/{DROPIN}", f"breqd.service.d/50-bmigrate-{workload}.conf"):
        for path in directory.glob(pattern):
            try:
                content = path.read_text()
            except OSError as exc:
                raise RefusedError(f"{path} cannot be read: {exc.strerror}", reason="unreadable") from exc
            if content.startswith(header):
                found[str(path.relative_to(directory))] = content
    return found


def bring_in_line(config: Config, directory: Path, *, check: bool = False, remove: bool = False) -> dict[str, Any]:
    """Write, change and remove files so that the directory holds exactly what is wanted.

    Args:
        config: the workload. directory: where units live (/etc/systemd/system).
        check: only say what would change. remove: nothing is wanted any more (uninstall).

    Returns:
        {changed, written: [...], removed: [...], diff: [{before, after, before_header, after_header}]}.

    Raises:
        RefusedError: a file of that name exists that somebody else wrote; reason ``foreign_unit``.
    """
    want = {} if remove else wanted(config)
    have = present(directory, config.workload)
    written: list[str] = []
    removed = sorted(set(have) - set(want))
    diffs = []
    for name in sorted(want):
        path = directory / name
        if have.get(name) == want[name]:
            continue
        if name not in have and path.exists():
            raise RefusedError(
                f"{path} exists and was not written by bmigrate for workload {config.workload}",
                hint="move it away; two owners of one unit cannot be",
                reason="foreign_unit",
            )
        written.append(name)
        diffs.append(_diff(path, have.get(name, ""), want[name]))
    diffs += [_diff(directory / name, have[name], "") for name in removed]
    if not check:
        for name in written:
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
            atomic.replace(path, want[name], mode=0o644)
        for name in removed:
            os.unlink(directory / name)
            if name.endswith(".conf"):
                _drop_empty((directory / name).parent)
    return {"changed": bool(written or removed), "written": written, "removed": removed, "diff": diffs}


def _drop_empty(directory: Path) -> None:
    if not any(directory.iterdir()):
        directory.rmdir()


def _diff(path: Path, before: str, after: str) -> dict[str, str]:
    return {"before": before, "after": after, "before_header": str(path), "after_header": str(path)}


def as_text(diffs: list[dict[str, str]]) -> str:
    """Unified form of the differences, for people."""
    lines: list[str] = []
    for item in diffs:
        lines += difflib.unified_diff(
            item["before"].splitlines(),
            item["after"].splitlines(),
            item["before_header"],
            item["after_header"],
            lineterm="",
        )
    return "\n".join(lines)
