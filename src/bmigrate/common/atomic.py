# SPDX-License-Identifier: GPL-3.0-or-later
"""Durable small files: replaced whole, fsynced, under a lock.

A reader sees the old content or the new one, never a mixture, also after a power cut: write to a
temporary file in the same directory, fsync it, rename it, fsync the directory. Without the first
fsync the rename could survive a power cut and the content not; without the second the rename
itself could be lost after we acted on it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Union

from bmigrate.common.errors import DefectError, RefusedError

PathLike = Union[str, Path]


def fsync_directory(path: PathLike) -> None:
    """Make renames and unlinks in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(path: PathLike, mode: int = 0o700) -> None:
    """Create a directory with its parents, and make the entries durable."""
    path = Path(path)
    missing = []
    probe = path
    while not probe.exists():
        missing.append(probe)
        probe = probe.parent
    for directory in reversed(missing):
        try:
            directory.mkdir(mode=mode)
        except FileExistsError:
            continue
        fsync_directory(directory.parent)


def replace(path: PathLike, content: str | bytes, mode: int = 0o600) -> None:
    """Replace a file atomically and durably.

    Raises:
        OSError: nothing was replaced; the old content is still there.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise
    fsync_directory(path.parent)


def replace_json(path: PathLike, value: Any, mode: int = 0o600) -> None:
    """``replace`` with JSON content, sorted keys, one final newline."""
    replace(path, json.dumps(value, sort_keys=True, indent=1) + "\n", mode)


def read_json(path: PathLike, default: Any = None) -> Any:
    """The JSON content of a file, or ``default`` when the file does not exist.

    Raises:
        DefectError: the file exists and is not JSON; it is never taken for missing.
    """
    try:
        text = Path(path).read_text()
    except FileNotFoundError:
        return default
    try:
        return json.loads(text)
    except ValueError as exc:
        raise DefectError(
            f"state file {path} is damaged: {exc}", hint="restore it from a backup; do not delete it", reason="damaged"
        ) from exc


def unlink_durably(path: PathLike) -> bool:
    """Remove a file and fsync its directory; False when it was not there."""
    path = Path(path)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    fsync_directory(path.parent)
    return True


class Lock:
    """An flock on a file with the owner's pid inside, as a context manager.

    Args:
        path: the lock file; created, never removed (removing it would let two owners in).
        wait_seconds: how long to wait for another owner before giving up.

    Raises:
        RefusedError: reason ``busy``, naming the owner's pid.
    """

    def __init__(self, path: PathLike, wait_seconds: float = 30.0) -> None:
        self.path = Path(path)
        self.wait_seconds = wait_seconds
        self._fd: int | None = None

    def __enter__(self) -> Lock:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + self.wait_seconds
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as exc:
                if exc.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    os.close(fd)
                    raise
                if time.monotonic() >= deadline:
                    owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
                    os.close(fd)
                    raise RefusedError(
                        f"{self.path} is locked by process {owner}",
                        hint="another command works on this workload; wait for it and try again",
                        reason="busy",
                    ) from exc
                time.sleep(0.02)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
