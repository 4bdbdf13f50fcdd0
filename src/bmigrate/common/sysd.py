# SPDX-License-Identifier: GPL-3.0-or-later
"""The service manager's protocol: readiness, watchdog, and the file descriptor store.

Small enough to need no library on the hosts (sd_notify(3), sd_listen_fds(3)). Outside systemd all
calls do nothing, so that programs run by hand.
"""

from __future__ import annotations

import array
import os
import socket

FIRST_FD = 3


def _send(text: str, fds: list[int] | None = None) -> bool:
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    ancillary = []
    if fds:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendmsg([text.encode()], ancillary, 0, address)
    return True


def notify(text: str) -> bool:
    """Tell the service manager, e.g. ``READY=1`` or ``STATUS=...``; False outside systemd."""
    return _send(text)


def watchdog_interval() -> float | None:
    """Seconds between two ``WATCHDOG=1`` (half of the limit), or None when there is no watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = int(os.environ.get("WATCHDOG_USEC", "0") or 0)
    return microseconds / 2e6 if microseconds else None


def store_fd(name: str, fd: int) -> bool:
    """Leave a descriptor with the service manager; it comes back by name after a restart or a crash.

    Args:
        name: letters, digits and ``._-`` only, at most 255.
    """
    return _send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])


def remove_fd(name: str) -> bool:
    """Have the service manager close its copies of the descriptors of that name."""
    return _send(f"FDSTOREREMOVE=1\nFDNAME={name}")


def listen_fds() -> dict[str, int]:
    """The descriptors that the service manager passed to this start, by name; close-on-exec set."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    result: dict[str, int] = {}
    for index in range(int(os.environ.get("LISTEN_FDS", "0"))):
        fd = FIRST_FD + index
        os.set_inheritable(fd, False)
        name = names[index] if index < len(names) else f"unknown{index}"
        if name in result:
            os.close(fd)
            continue
        result[name] = fd
    return result
