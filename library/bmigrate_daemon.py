#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Keeps the daemons of a host running with the installed files, and says what breqd tracks.

It promises to restart a daemon only when a file is newer than its start. It must never detach a
volume: a restart does not (attachments live in the kernel), and nothing else here could.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_daemon
short_description: Keep the daemons running with the installed files, and read what is tracked
version_added: "0.1.0"
description:
  - V(running) enables units, lets systemd read changed unit files, starts what does not run, and restarts a daemon
    that was started before one of O(files) was written. So a run that was interrupted between writing and restarting
    is made good by the next one.
  - V(attached) fails unless breqd tracks every volume of a workload.
options:
  state:
    description: What to do.
    type: str
    choices: [status, running, attached]
    default: status
  daemons:
    description: Units to enable and keep running with the newest files.
    type: list
    elements: str
    default: []
  units:
    description: Units to enable and start, never to restart.
    type: list
    elements: str
    default: []
  files:
    description: Files, or directories of files, that the daemons read at their start.
    type: list
    elements: path
    default: []
  workload:
    description: Workload to ask about; needed for V(status) and V(attached).
    type: str
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Says which units would be enabled, started or restarted.
    support: full
  diff_mode:
    description: Shows the state of each unit before and after.
    support: full
"""

EXAMPLES = r"""
- name: Run the daemons with the installed files
  bmigrate_daemon:
    state: running
    daemons: [breqd.service, bmigrate-hold.service, bmigrate-ship.service]
    files: [/usr/lib/bmigrate/bmigrate.pyz, /etc/bmigrate]

- name: Prove that the volumes of the primary are tracked
  bmigrate_daemon:
    state: attached
    workload: pgdemo
"""

RETURN = r"""
actions:
  description: What was, or in check mode would be, done to units.
  returned: when state is running
  type: list
  elements: str
  sample: [restart breqd.service]
volumes:
  description: What breqd says of each volume of the workload, with C(attached), C(suspect) and C(dirty_bytes).
  returned: when state is status or attached
  type: list
  elements: dict
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_cli import call

PROPERTIES = "ActiveState,SubState,UnitFileState,LoadState,NeedDaemonReload,ActiveEnterTimestampMonotonic"


def systemctl(module: AnsibleModule, *words: str) -> str:
    """Run systemctl; its output. A failure ends the module with the end of the unit's journal."""
    rc, out, err = module.run_command(["systemctl", *list(words)])
    if rc != 0:
        unit = words[-1]
        _rc, journal, _err = module.run_command(["journalctl", "--no-pager", "-n", "20", "-u", unit])
        module.fail_json(
            msg="systemctl %s failed on host %s: %s" % (" ".join(words), os.uname().nodename, err.strip()),
            rc=rc,
            journal=journal.splitlines(),
        )
    return out


def unit_state(module: AnsibleModule, unit: str) -> dict[str, str]:
    """Properties of a unit as a dictionary."""
    out = systemctl(module, "show", "--property=" + PROPERTIES, unit)
    return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)


def newest(paths: list[str]) -> float:
    """Time of the last change of any of the files, seconds since the epoch; 0 when there is none."""
    times = [0.0]
    for path in paths:
        if os.path.isdir(path):
            times += [
                os.lstat(os.path.join(root, name)).st_mtime for root, dummy, names in os.walk(path) for name in names
            ]
        elif os.path.exists(path):
            times.append(os.stat(path).st_mtime)
    return max(times)


def started_at(state: dict[str, str]) -> float:
    """When a unit became active, seconds since the epoch. The monotonic stamp is what systemd is sure of."""
    entered = int(state.get("ActiveEnterTimestampMonotonic") or 0) / 1e6
    return time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + entered


def needed(state: dict[str, str], unit: str, restart_after: float | None) -> list[tuple[str, ...]]:
    """What has to be done to a unit: words of systemctl commands, in order."""
    actions: list[tuple[str, ...]] = []
    if state.get("UnitFileState") in ("disabled", ""):
        actions.append(("enable", unit))
    if state.get("ActiveState") not in ("active", "activating", "reloading"):
        actions.append(("start", unit))
    elif restart_after is not None and started_at(state) < restart_after:
        actions.append(("restart", unit))
    return actions


def in_words(states: dict[str, dict[str, str]]) -> str:
    """States of units as text, for the diff."""
    return "".join(
        "%s: %s, %s\n" % (unit, state.get("UnitFileState"), state.get("ActiveState")) for unit, state in states.items()
    )


def ensure_running(module: AnsibleModule) -> None:
    """Enable, start, restart; ends the module."""
    params = module.params
    everything = params["daemons"] + params["units"]
    before = {unit: unit_state(module, unit) for unit in everything}
    absent = [unit for unit in everything if before[unit].get("LoadState") == "not-found"]
    if absent and not module.check_mode:
        systemctl(module, "daemon-reload")
        before = {unit: unit_state(module, unit) for unit in everything}
        absent = [unit for unit in everything if before[unit].get("LoadState") == "not-found"]
        if absent:
            module.fail_json(msg="host %s has no unit %s -- run install.yml" % (os.uname().nodename, ", ".join(absent)))
    actions: list[tuple[str, ...]] = []
    if any(state.get("NeedDaemonReload") == "yes" for state in before.values()):
        actions.append(("daemon-reload",))
    stamp = newest(params["files"])
    for unit in everything:
        actions += needed(before[unit], unit, stamp if unit in params["daemons"] else None)
    if not module.check_mode:
        for words in actions:
            systemctl(module, *words)
    after = before if module.check_mode else {unit: unit_state(module, unit) for unit in everything}
    dead = [unit for unit, state in after.items() if state.get("ActiveState") == "failed"]
    if dead:
        module.fail_json(
            msg="%s failed on host %s -- see 'journalctl -u %s'" % (", ".join(dead), os.uname().nodename, dead[0])
        )
    module.exit_json(
        changed=bool(actions),
        actions=[" ".join(words) for words in actions],
        diff={"before": in_words(before), "after": in_words(after)},
    )


def tracked(module: AnsibleModule) -> tuple[list[dict[str, Any]], list[str]]:
    """What breqd tracks of the workload."""
    answer = call(module, ["bmigrate", "handover", "discover", "--workload", module.params["workload"]])
    return (answer["data"].get("breqd") or {}).get("volumes") or [], list(answer["data"].get("volumes") or {})


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["status", "running", "attached"], "default": "status"},
            "daemons": {"type": "list", "elements": "str", "default": []},
            "units": {"type": "list", "elements": "str", "default": []},
            "files": {"type": "list", "elements": "path", "default": []},
            "workload": {"type": "str"},
        },
        required_if=[("state", "status", ("workload",)), ("state", "attached", ("workload",))],
        supports_check_mode=True,
    )
    if module.params["state"] == "running":
        ensure_running(module)
    volumes, names = tracked(module)
    untracked = sorted(set(names) - {item["volume"] for item in volumes if item.get("attached")})
    if module.params["state"] == "attached" and (untracked or not names):
        module.fail_json(
            msg="breqd does not track %s of workload %s on host %s -- see 'journalctl -u breqd'"
            % (
                ", ".join("volume " + name for name in untracked) or "any volume",
                module.params["workload"],
                os.uname().nodename,
            ),
            volumes=volumes,
        )
    module.exit_json(changed=False, volumes=volumes)


if __name__ == "__main__":
    main()
