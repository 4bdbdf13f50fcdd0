#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Writes the configuration of a workload after the installed program has validated it, and its units.

It promises that an invalid configuration never replaces a valid one. It must never start or stop anything.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_workload
short_description: Write the configuration and the units of a workload
version_added: "0.1.0"
description:
  - Has the installed C(bmigrate) validate the configuration from a scratch directory, then replaces
    C(/etc/bmigrate/WORKLOAD.yml), and has C(bmigrate units) bring mount units and service drop-ins in line with it.
options:
  name:
    description: Name of the workload.
    type: str
    required: true
  content:
    description: The configuration as YAML. Needed unless O(state=absent).
    type: str
  state:
    description: Whether the workload shall be configured on this host.
    type: str
    choices: [present, absent]
    default: present
  directory:
    description: Where configurations are.
    type: path
    default: /etc/bmigrate
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Validates when the program is installed, and says what would change.
    support: full
  diff_mode:
    description: Shows configuration and units before and after.
    support: full
"""

EXAMPLES = r"""
- name: Write the configuration
  bmigrate_workload:
    name: pgdemo
    content: "{{ definition | to_nice_yaml }}"
"""

RETURN = r"""
units:
  description: Unit files that were, or in check mode would be, written or removed.
  returned: always
  type: list
  elements: str
"""

import os
import shutil
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_cli import call, program


def write(path: str, text: str) -> None:
    """Replace a file atomically and durably; only root reads it."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".bmigrate-")
    with os.fdopen(handle, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def read(path: str) -> str:
    """Text of a file, "" when there is none."""
    try:
        with open(path) as stream:
            return stream.read()
    except FileNotFoundError:
        return ""


def units(module: AnsibleModule, directory: str, *words: str) -> dict[str, Any]:
    """Have the program make the units from the configuration in a directory; {changed, data}."""
    os.environ["BMIGRATE_ETC"] = directory
    return call(module, ["bmigrate", "units", "--workload", module.params["name"], "--diff", *list(words)])


def validated(module: AnsibleModule, text: str) -> dict[str, Any]:
    """What would change in the units with this configuration; a wrong one ends the module."""
    scratch = tempfile.mkdtemp(prefix="bmigrate-")
    try:
        with open(os.path.join(scratch, module.params["name"] + ".yml"), "w") as stream:
            stream.write(text)
        return units(module, scratch, "--check")
    finally:
        shutil.rmtree(scratch)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "content": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "directory": {"type": "path", "default": "/etc/bmigrate"},
        },
        required_if=[("state", "present", ("content",))],
        supports_check_mode=True,
    )
    params = module.params
    path = os.path.join(params["directory"], params["name"] + ".yml")
    before = read(path)
    text = params["content"] if params["state"] == "present" else ""
    diff = [{"before": before, "after": text, "before_header": path, "after_header": path}] if before != text else []
    if program(module, "bmigrate") is None:
        if params["state"] == "present" and not module.check_mode:
            module.fail_json(msg="bmigrate is not installed on host %s -- run install.yml" % os.uname().nodename)
        module.exit_json(changed=bool(diff), units=[], diff=diff)
    if params["state"] == "absent":
        answer: dict[str, Any] = (
            units(module, params["directory"], "--remove", *(["--check"] if module.check_mode else []))
            if before
            else {"changed": False, "data": {}}
        )
        if before and not module.check_mode:
            os.unlink(path)
    else:
        answer = validated(module, text)
        if not module.check_mode:
            if diff:
                write(path, text)
            answer = units(module, params["directory"])
    data = answer["data"] or {}
    module.exit_json(
        changed=bool(diff) or bool(answer["changed"]),
        diff=diff + (data.get("diff") or []),
        units=(data.get("written") or []) + (data.get("removed") or []),
    )


if __name__ == "__main__":
    main()
