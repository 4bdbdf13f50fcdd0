# SPDX-License-Identifier: GPL-3.0-or-later
"""Where things are. The three roots may be moved by environment variables for tests only."""

from __future__ import annotations

import os
from pathlib import Path


def etc() -> Path:
    """Directory of what the operator wants (default /etc/bmigrate)."""
    return Path(os.environ.get("BMIGRATE_ETC", "/etc/bmigrate"))


def state() -> Path:
    """Directory of durable state (default /var/lib/bmigrate)."""
    return Path(os.environ.get("BMIGRATE_STATE", "/var/lib/bmigrate"))


def run() -> Path:
    """Directory of state that ends with the boot (default /run/bmigrate)."""
    return Path(os.environ.get("BMIGRATE_RUN", "/run/bmigrate"))


def config_file(workload: str) -> Path:
    """Configuration of one workload."""
    return etc() / f"{workload}.yml"


def key_file(workload: str) -> Path:
    """Private ssh key of one workload on this host."""
    return etc() / "keys" / workload


def known_hosts_file(workload: str) -> Path:
    """Pinned ssh host keys of the peer of one workload."""
    return etc() / "keys" / f"{workload}.known_hosts"


def state_dir(workload: str) -> Path:
    """Durable state of one workload on this host."""
    return state() / workload


def primary_marker(workload: str) -> Path:
    """Exists only while the workload may run on this host; mounts and services assert it."""
    return run() / "primary" / workload


def clean_token(workload: str, volume: str) -> Path:
    """The clean flag as the early unit moved it into /run at this boot."""
    return run() / "clean" / workload / volume


def clean_flag(workload: str, volume: str) -> Path:
    """The durable clean flag, written only by the shutdown unit."""
    return state_dir(workload) / f"{volume}.clean"


def suspicion_note(workload: str, volume: str) -> Path:
    """A suspicion that the disk did not take yet."""
    return run() / "suspect" / workload / volume


def breqd_socket() -> Path:
    """Socket of the tracking daemon."""
    return run() / "breqd.sock"


def hold_socket() -> Path:
    """Socket of the hold service."""
    return run() / "hold.sock"


def ship_socket() -> Path:
    """Socket of the shipping daemon."""
    return run() / "ship.sock"
