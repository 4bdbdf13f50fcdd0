# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernel refuses, with a name for each reason.

Promises that every refusal of the modules arrives as a KernelError whose `code` a program can compare, and whose text
says what failed, for which volume, on which host, and what to do next. It must never hide an error number.
"""

from __future__ import annotations

import errno as errnos
import os
import socket


class KernelError(OSError):
    """A request that the kernel, or the check of what it is, refused.

    Attributes: code (a word, stable), hint (what to do next), volume (what was asked for, if any), errno.
    """

    code = "kernel"

    def __init__(self, message: str, errno: int, code: str = "", hint: str = "", volume: str = "") -> None:
        self.host = socket.gethostname()
        self.hint = hint
        self.volume = volume
        self.message = message
        if code:
            self.code = code
        where = f"{volume} on {self.host}" if volume else self.host
        super().__init__(errno, f"{where}: {message}" + (f"; {hint}" if hint else ""))


class NotLoaded(KernelError):
    """The module is not loaded: its device is missing. Code not_loaded."""

    code = "not_loaded"


class AbiMismatch(KernelError):
    """The loaded module speaks another version of the interface. Code abi_mismatch."""

    code = "abi_mismatch"


class Busy(KernelError):
    """Somebody else reads the channel. Code busy."""

    code = "busy"


class StaleBatch(KernelError):
    """CONSUMED or a barrier named something that this reader was not given. Code stale."""

    code = "stale"


class AttachRefused(KernelError):
    """A volume cannot be attached; code says why: one of abi.REASONS. slot and attachment_id are set for `attached`."""

    code = "refused"
    slot = 0
    attachment_id = 0


class NotAttached(KernelError):
    """There is no attachment with this slot and id. Code not_attached."""

    code = "not_attached"


def not_loaded(path: str, error: OSError) -> NotLoaded:
    """The error for a device file that is not there."""
    return NotLoaded(
        f"{path} does not exist", error.errno or errnos.ENOENT, hint="load the kernel module: modprobe reqlog"
    )


def not_permitted(path: str, error: OSError) -> KernelError:
    """The error for a device file that only root may open."""
    return KernelError(
        f"{path}: {os.strerror(error.errno or 0)}",
        error.errno or errnos.EPERM,
        code="permission",
        hint="run as root with CAP_SYS_ADMIN",
    )


def unexpected(what: str, error: OSError, volume: str = "") -> KernelError:
    """The error for an error number that has no name of its own."""
    number = error.errno or 0
    return KernelError(f"{what}: {os.strerror(number)}", number, volume=volume, hint="see the kernel log (dmesg)")


def abi_mismatch(module: str, loaded: int, wanted: int) -> AbiMismatch:
    """The error for a module of another interface version."""
    return AbiMismatch(
        f"the loaded module {module} has interface version {loaded}, this program needs {wanted}",
        errnos.EPROTO,
        hint="install the module and the programs of one release, detach all volumes, and load the module again",
    )
