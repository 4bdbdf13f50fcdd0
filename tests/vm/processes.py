# SPDX-License-Identifier: GPL-3.0-or-later
"""Which process in a guest plays which part of the data path, by its unit or by its command line."""

from __future__ import annotations

import random
from typing import Any

from lab import wait
from tests.vm.rig import LIMIT_SECONDS, UNITS, Rig

ON_STANDBY = ("breceive", "hold", "ssh-server")


def main_process(rig: Rig, host: str, name: str) -> dict[str, Any]:
    """The main process of one of our units, running."""

    def look() -> dict[str, Any]:
        pid = int(rig.run(host, "systemctl", "show", "-P", "MainPID", UNITS[name]))
        found = [item for item in rig.agents[host].call("processes") if item["pid"] == pid]
        return found[0] if pid and found else {}

    return wait(look, LIMIT_SECONDS, f"{UNITS[name]} on {host} to run", 0.1)


def find(rig: Rig, host: str, target: str, chance: random.Random | None = None) -> dict[str, Any]:
    """The process that a round kills; empty when there is none right now.

    Args:
        chance: which one, where a session of several streams has several; without it, the oldest.
    """
    if target in ("breqd", "hold"):
        return main_process(rig, host, target)
    if target == "bmigrate":
        return main_process(rig, host, "ship")
    everything = rig.agents[host].call("processes")
    if target == "ssh-client":
        parent = main_process(rig, host, "ship")["pid"]
        found = [item for item in everything if item["parent"] == parent and item["name"] == "ssh"]
    else:
        found = [item for item in everything if is_receiver(item)]
    if not found:
        return {}
    found.sort(key=lambda item: (item["ticks"], item["pid"]))
    chosen = chance.choice(found) if chance else found[0]
    return _server_of(chosen, everything) if target == "ssh-server" else chosen


def _server_of(receiver: dict[str, Any], everything: list[dict[str, Any]]) -> dict[str, Any]:
    """The sshd above a receiver."""
    by_pid = {item["pid"]: item for item in everything}
    above = receiver
    while above and above["name"] != "sshd":
        above = by_pid.get(above["parent"], {})
    return above


def is_receiver(process: dict[str, Any]) -> bool:
    """Whether this is the Python program itself, not the shell that sshd started it with."""
    argv = process["argv"]
    return "python3" in argv[0] and any(word.endswith("breceive") for word in argv[1:3])
