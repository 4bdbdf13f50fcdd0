# SPDX-License-Identifier: GPL-3.0-or-later
"""The transport for hosts without an ssh client: Debian's paramiko, in a child process that plays ssh.

Why a process: its pipes are the same stream as that of ``openssh``, so that every promise about ends, kills and last
words is kept by the same code; and what paramiko computes and locks is not in the shipper. The child is
``paramikochild``. It accepts the pinned host key only, offers the workload's key only, and reads no configuration.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import bmigrate
from bmigrate.common import paths
from bmigrate.common.config import Config
from bmigrate.common.errors import RefusedError
from bmigrate.ship.transport import Stream, Transport
from bmigrate.ship.transport.openssh import ChildStream

PACKAGE = "python3-paramiko"


def command(config: Config) -> list[str]:
    """The argv of the child: names and paths only."""
    peer = config.peer
    return [
        sys.executable, "-m", "bmigrate.ship.transport.paramikochild",
        peer.address, str(peer.port), str(paths.key_file(config.workload)),
        str(paths.known_hosts_file(config.workload)), "breceive", "--workload", config.workload,
    ]  # fmt: skip


class Paramiko(Transport):
    """Transport ``paramiko``."""

    def open(self, config: Config) -> Stream:
        """Start the child to the peer of the workload."""
        if importlib.util.find_spec("paramiko") is None:
            raise RefusedError(
                "there is no paramiko on this host", hint=f"install {PACKAGE}, or use transport: openssh",
                reason="no_client",
            )  # fmt: skip
        if not paths.key_file(config.workload).exists():
            raise RefusedError(
                f"the key {paths.key_file(config.workload)} does not exist", hint="run install.yml",
                reason="key_missing",
            )  # fmt: skip
        # The child imports this very code, from its directory or its zip file, and paramiko from where it is here.
        root = str(Path(bmigrate.__file__).parents[1])
        return ChildStream(config, command(config), {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])})
