# SPDX-License-Identifier: GPL-3.0-or-later
"""Which process in a guest plays which part of the data path, by its unit or by its command line."""

from __future__ import annotations

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


def find(rig: Rig, host: str, target: str) -> dict[str, Any]:
    """The process that a round kills; empty when there is none right now."""
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
        if target == "ssh-server" and found:
            by_pid = {item["pid"]: item for item in everything}
            above = found[0]
            while above and above["name"] != "sshd":
                above = by_pid.get(above["parent"], {})
            found = [above] if above else []
    return found[0] if found else {}


def is_receiver(process: dict[str, Any]) -> bool:
    """Whether this is the Python program itself, not the shell that sshd started it with."""
    argv = process["argv"]
    return "python3" in argv[0] and any(word.endswith("breceive") for word in argv[1:3])
