# SPDX-License-Identifier: GPL-3.0-or-later
"""Opening the modules' device files, and their ioctls.

Promises that a device is only used after its ABI version was found to be the one in `abi`. Private to this package.
"""

from __future__ import annotations

import ctypes
import errno as errnos
import fcntl
import os
from typing import TypeVar

from bmigrate.kernel import errors

Some = TypeVar("Some", bound="Handle")


def open_checked(path: str, flags: int, module: str, ioc_abi: int, wanted: int) -> int:
    """Open `path` and check the module's ABI version.

    Args: path of the device; flags for os.open; module: its name, for messages; ioc_abi: the ioctl that tells the
    version; wanted: the version that this program needs. Returns the file descriptor.
    Raises NotLoaded, AbiMismatch, Busy, or KernelError with code permission.
    """
    try:
        fd = os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errnos.ENOENT, errnos.ENODEV, errnos.ENXIO):
            raise errors.not_loaded(path, error) from error
        if error.errno in (errnos.EPERM, errnos.EACCES):
            raise errors.not_permitted(path, error) from error
        if error.errno == errnos.EBUSY:
            raise errors.Busy(
                f"{path} has another reader", errnos.EBUSY, hint="only one breqd may run on a host; stop the other one"
            ) from error
        raise errors.unexpected(f"cannot open {path}", error) from error
    try:
        version = ctypes.c_uint32()
        try:
            call(fd, ioc_abi, version)
        except OSError as error:
            raise errors.unexpected(f"{path} does not tell its interface version", error) from error
        if version.value != wanted:
            raise errors.abi_mismatch(module, version.value, wanted)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Handle:
    """An open device file: a context manager that closes it; usable with poll and selectors."""

    _fd = -1

    def __enter__(self: Some) -> Some:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The descriptor; -1 after close."""
        return self._fd

    def close(self) -> None:
        """Close the device; what the kernel keeps of it stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def call(fd: int, number: int, payload: ctypes.Structure | ctypes.c_uint32 | ctypes.c_uint64) -> int:
    """An ioctl that fills or reads `payload` in place, also when it fails. Returns its result. Raises OSError."""
    return fcntl.ioctl(fd, number, payload, True)
