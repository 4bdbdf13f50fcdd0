# SPDX-License-Identifier: GPL-3.0-or-later
"""What several unit tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

from bmigrate.common import atomic, paths
from bmigrate.common import state as states
from bmigrate.common.config import Config, Peer, Volume
from bmigrate.ship.engine import Engine
from bmigrate.ship.transport.openssh import OpenSSH

# How long an example takes says something of the machine, which is shared, and nothing of the code.
settings.register_profile("bmigrate", deadline=None)
settings.load_profile("bmigrate")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three directories of a host, in a temporary place."""
    for name in ("etc", "state", "run"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"BMIGRATE_{name.upper()}", str(tmp_path / name))
    return tmp_path


@pytest.fixture
def primary(root: Path) -> states.WorkloadState:
    """A primary's state on disk."""
    first = {"number": 1, "id": "g1"}
    item = states.WorkloadState("pg", "alpha", role="primary", generation=first, history=[first], shipping=True)
    atomic.make_directory(paths.state_dir("pg"))
    states.save(item)
    return item


@pytest.fixture
def engine(root: Path) -> Engine:
    """The shipper of workload ``wl`` with the volume ``data``, not started."""
    hosts = {"alpha": Peer("alpha", "10.77.0.1"), "beta": Peer("beta", "10.77.0.2")}
    volumes = (Volume("data", {"alpha": "/dev/null", "beta": "/dev/null"}),)
    return Engine(Config(workload="wl", host="alpha", hosts=hosts, volumes=volumes), OpenSSH("ssh"))
