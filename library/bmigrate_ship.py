#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Asks the shipping daemon of a primary: wait until in step, pause, resume, verify, status.

It promises to change only whether the daemon may ship (pause, resume). It must never touch a role.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_ship
short_description: Wait for, pause, resume or verify the shipping of a workload
version_added: "0.1.0"
description:
  - Calls C(bmigrate status), C(sync), C(pause), C(resume) or C(verify) on the primary of a workload.
  - Pausing what is paused, or resuming what ships, changes nothing and says so.
options:
  state:
    description:
      - V(status) reads how shipping goes.
      - V(in_step) waits until the replica is in step, at most O(timeout_seconds).
      - V(paused) and V(shipping) pause and resume.
      - V(verified) compares the replica with the volume block by block, by checksum; a difference is a failure.
    type: str
    choices: [status, in_step, paused, shipping, verified]
    default: status
  workload:
    description: Name of the workload.
    type: str
    required: true
  timeout_seconds:
    description: How long V(in_step) waits.
    type: int
    default: 3600
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Reads the state and says whether it would be changed; does not wait and does not compare.
    support: full
  diff_mode:
    description: Shows the state of shipping before and after.
    support: full
"""

EXAMPLES = r"""
- name: Wait until the replica is in step
  bmigrate_ship:
    workload: pgdemo
    state: in_step
    timeout_seconds: 1800

- name: Compare the replica with the volume
  bmigrate_ship:
    workload: pgdemo
    state: verified
"""

RETURN = r"""
data:
  description: State of shipping, or the result of the comparison.
  returned: success
  type: dict
cmd:
  description: Last command that was run.
  returned: always
  type: list
  elements: str
rc:
  description: Exit code of the program.
  returned: always
  type: int
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_cli import call

ACTIONS = {"status": "status", "in_step": "sync", "paused": "pause", "shipping": "resume", "verified": "verify"}


def argv(state: str, workload: str, timeout_seconds: int) -> list[str]:
    """The command line for a wanted state."""
    words = ["bmigrate", ACTIONS[state], "--workload", workload]
    return [*words, "--wait", "--timeout", str(timeout_seconds)] if state == "in_step" else words


def status(module: AnsibleModule) -> dict[str, Any]:
    """What the daemon says of the workload now, {} when it says nothing."""
    data = call(module, argv("status", module.params["workload"], 0))["data"] or {}
    for entry in data.get("workloads") or []:
        if entry.get("workload") == module.params["workload"]:
            return entry.get("ship") or {}
    return {}


def in_words(entry: dict[str, Any]) -> str:
    """State of shipping as text, for the diff."""
    return "%s\n" % entry.get("state", "unknown")


def would_change(entry: dict[str, Any], wanted: str) -> bool:
    """Whether reaching the wanted state changes anything."""
    if wanted == "paused":
        return entry.get("state") != "paused"
    return wanted == "shipping" and entry.get("state") == "paused"


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {
                "type": "str",
                "default": "status",
                "choices": ["status", "in_step", "paused", "shipping", "verified"],
            },
            "workload": {"type": "str", "required": True},
            "timeout_seconds": {"type": "int", "default": 3600},
        },
        supports_check_mode=True,
    )
    wanted = module.params["state"]
    cmd = argv(wanted, module.params["workload"], module.params["timeout_seconds"])
    if module.check_mode or wanted == "status":
        before = status(module)
        module.exit_json(changed=would_change(before, wanted), data=before, cmd=cmd, rc=0)
    if wanted in ("in_step", "verified"):
        answer = call(module, cmd)
        module.exit_json(changed=bool(answer["changed"]), data=answer["data"], cmd=answer["cmd"], rc=answer["rc"])
    before = status(module)
    answer = call(module, cmd)
    after = status(module)
    module.exit_json(
        changed=bool(answer["changed"]),
        data=after,
        cmd=answer["cmd"],
        rc=answer["rc"],
        diff={"before": in_words(before), "after": in_words(after)},
    )


if __name__ == "__main__":
    main()
