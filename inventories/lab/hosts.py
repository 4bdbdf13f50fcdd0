#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-3.0-or-later
"""Dynamic inventory: the guests of the lab that BMIGRATE_LAB names, as they are right now.

Promises: valid and empty when no lab is up; host keys pinned, never waved through. Must never start anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab import Lab


def host_variables(status: dict[str, Any], name: str) -> dict[str, Any]:
    """How Ansible reaches one guest, and which disks it has."""
    guest = status["guests"][name]
    return {
        "ansible_host": "127.0.0.1",
        "ansible_port": guest["ssh_port"],
        "ansible_user": "root",
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_ssh_private_key_file": status["key"],
        "ansible_ssh_common_args": (
            f"-o UserKnownHostsFile={status['known_hosts']} -o GlobalKnownHostsFile=none"
            " -o StrictHostKeyChecking=yes -o IdentitiesOnly=yes"
        ),
        "lab_lan_address": guest["lan_address"],
        "lab_postgresql_port": guest["postgresql_port"],
        "lab_disks": {disk: facts["guest_path"] for disk, facts in guest["disks"].items()},
    }


def inventory() -> dict[str, Any]:
    """The whole inventory in Ansible's script format."""
    status = Lab().status()
    names = sorted(status["guests"])
    return {
        "bmigrate": {"hosts": names},
        "_meta": {"hostvars": {name: host_variables(status, name) for name in names}},
    }


def main() -> int:
    """`--list` gives everything, so `--host` has nothing to add."""
    json.dump({} if "--host" in sys.argv[1:] else inventory(), sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
