# SPDX-License-Identifier: GPL-3.0-or-later
"""How bytes reach ``breceive``: the interface that every transport keeps, and the choice of one.

A transport promises a ``Stream``: two descriptors that carry bytes in order, both ways, and an end
that can be forced from any thread. It must never retry, resume or buffer beyond the operating
system: a connection that broke is over, and what was in it is claimed still. The same contract
tests run against each transport (tests/contract).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Protocol

from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError


class Stream(Protocol):
    """One open connection to a receiver.

    Attributes:
        read_fd: bytes from the receiver; end of file when the connection is over.
        write_fd: bytes to the receiver; EPIPE when the connection is over.
    """

    read_fd: int
    write_fd: int

    def kill(self) -> None:
        """End the connection at once, from any thread; reads and writes that block come back."""

    def close(self) -> None:
        """Kill, wait until the connection's processes are gone, close the descriptors. May be repeated."""

    def stderr_tail(self) -> str:
        """The last text that the transport or the receiver wrote to its standard error."""

    def failure(self) -> BmigrateError:
        """Why the connection ended, as far as the transport can tell."""


class Transport(ABC):
    """Opens streams to the receiver of a workload's peer."""

    @abstractmethod
    def open(self, config: Config) -> Stream:
        """Start a connection. The peer may still refuse it: that shows as end of file, then ``failure()``.

        Args:
            config: the workload's configuration on this host.

        Raises:
            RefusedError: the transport cannot be used here (no client, no key).
        """


def create(name: str) -> Transport:
    """The transport of that name in the configuration.

    Raises:
        RefusedError: reason ``not_supported``.
    """
    if name == "openssh":
        from bmigrate.ship.transport.openssh import OpenSSH

        return OpenSSH()
    if name == "paramiko":
        from bmigrate.ship.transport.paramiko import Paramiko

        return Paramiko()
    raise RefusedError(
        f"transport {name!r} is not supported", hint="use 'openssh' or 'paramiko'", reason="not_supported"
    )


def closed_by_peer(host: str, tail: str) -> UnreachableError:
    """The error for a connection that ended without a reason that we know.

    What breceive logs is left out: it says why it ends in an ERROR frame, and its log here would only be
    the last good news before it was killed.
    """
    words = [line.strip() for line in tail.splitlines() if line.strip() and not line.startswith("breceive:")]
    said = f": {words[-1]}" if words else ""
    return UnreachableError(
        f"the connection to {host} ended{said}",
        host=host,
        hint=f"see the journal of {host} (breceive, bmigrate-hold, ssh) if this goes on",
        reason="connection_lost",
    )


def set_pipe_size(fd: int, size: int = 1 << 20) -> None:
    """Ask for a larger pipe; a refusal (the user's limit is reached) only costs speed."""
    import fcntl

    F_SETPIPE_SZ = 1031
    try:
        fcntl.fcntl(fd, F_SETPIPE_SZ, size)
    except OSError as exc:
        if exc.errno not in (1, 16, 22):
            raise


def close_quietly(*fds: int) -> None:
    """Close descriptors that may be closed already."""
    for fd in fds:
        if fd >= 0:
            try:
                os.close(fd)
            except OSError:
                continue
