#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Tells in one call what a playbook must know of a host: platform, what is installed, roles of workloads.

It promises to work on a host where nothing of bmigrate is installed, and must never change anything.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_facts
short_description: Gather what the playbooks of bmigrate need to know of a host
version_added: "0.1.0"
description:
  - Reads platform, installed kernels, Secure Boot, missing packages, installed programs and, per workload, what
    C(bmigrate handover discover) says. Changes nothing.
  - Works on hosts where bmigrate is not installed; says so in the facts.
  - A workload whose state cannot be read does not end the module; its error is in the facts.
options:
  workloads:
    description: Names of the workloads to ask about.
    type: list
    elements: str
    default: []
  packages:
    description: Names of distribution packages; the missing ones are reported.
    type: list
    elements: str
    default: []
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Reads only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Discover the roles
  bmigrate_facts:
    workloads: [pgdemo]

- name: Say which packages are missing
  bmigrate_facts:
    packages: [python3-numpy]
"""

RETURN = r"""
ansible_facts:
  description: Facts, under the key C(bmigrate).
  returned: always
  type: dict
  contains:
    bmigrate:
      description: What was found.
      returned: always
      type: dict
      contains:
        host:
          description: Name that the host gives itself.
          type: str
          returned: always
        os:
          description: C(id), C(version_id) and family of the distribution.
          type: dict
          returned: always
        kernel:
          description:
            - C(release) of the running kernel and whether its C(headers) are installed.
            - C(installed) has an entry per installed kernel with C(ready) and C(problem), C(boots_next) names the one
              that the next boot takes, C(requirements) what modules for each must be like.
            - C(trust) and C(secure_boot) say whether the kernel takes unsigned modules, as data and in words.
            - C(warnings) says what a reboot would do to the tracking, and what to do about it.
          type: dict
          returned: always
        missing_packages:
          description: Packages of O(packages) that are not installed.
          type: list
          elements: str
          returned: always
        installed:
          description: Whether the programs are installed.
          type: bool
          returned: always
        workloads:
          description: Per workload C(configured), C(discover) (answer of the host, or null) and C(error).
          type: dict
          returned: always
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_cli import envelope, explain, program
from ansible.module_utils.bmigrate_kmod import kernels


def os_release(path: str = "/etc/os-release") -> dict[str, str]:
    """Identity of the distribution: id, version_id, family."""
    fields = {}
    try:
        with open(path) as lines:
            for line in lines:
                key, sign, value = line.strip().partition("=")
                if sign:
                    fields[key] = value.strip("\"'")
    except OSError:
        return {"id": "unknown", "version_id": "", "family": "unknown"}
    likes = [fields.get("ID", ""), *fields.get("ID_LIKE", "").split()]
    family = next((name for name in ("debian", "rhel", "suse", "arch") if name in likes), fields.get("ID", "unknown"))
    return {"id": fields.get("ID", "unknown"), "version_id": fields.get("VERSION_ID", ""), "family": family}


def missing_packages(module: AnsibleModule, packages: list[str]) -> list[str]:
    """Those of the packages that dpkg does not have installed."""
    query = module.get_bin_path("dpkg-query")
    if not packages or query is None:
        return list(packages)
    _rc, out, _err = module.run_command([query, "-W", "-f", "${Package} ${db:Status-Status}\n", *list(packages)])
    present = {line.split()[0] for line in out.splitlines() if line.endswith(" installed")}
    return [name for name in packages if name not in present]


def kernel_facts(release: str) -> dict[str, Any]:
    """The running kernel, the installed ones, and what they think of our modules."""
    seen = kernels.report("/", release)
    return {
        "release": release,
        "headers": os.path.exists("/lib/modules/%s/build/Makefile" % release),
        "boots_next": seen["boots_next"],
        "installed": seen["kernels"],
        "requirements": kernels.requirements("/", [entry["release"] for entry in seen["kernels"]]),
        "trust": seen["trust"],
        "secure_boot": seen["secure_boot"],
        "warnings": ["%s -- %s" % (entry["message"], entry["hint"]) for entry in seen["warnings"]],
    }


def ask(module: AnsibleModule, words: list[str]) -> tuple[Any, str | None]:
    """One read-only question to bmigrate: (data or None, error text or None)."""
    rc, out, err = module.run_command([program(module, "bmigrate"), *words, "--json"])
    answer = envelope(out)
    if answer is None:
        return None, "bmigrate %s gave no answer (exit code %d): %s" % (words[0], rc, err.strip()[-500:])
    if rc != 0 or not answer.get("ok"):
        return answer.get("data"), explain(answer.get("error") or {})
    return answer.get("data"), None


def workload_facts(module: AnsibleModule, name: str) -> dict[str, Any]:
    """What the host says of one workload."""
    entry: dict[str, Any] = {
        "configured": os.path.exists("/etc/bmigrate/%s.yml" % name),
        "discover": None,
        "error": None,
    }
    if program(module, "bmigrate") is None or not entry["configured"]:
        return entry
    entry["discover"], entry["error"] = ask(module, ["handover", "discover", "--workload", name])
    return entry


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "workloads": {"type": "list", "elements": "str", "default": []},
            "packages": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    release = os.uname().release
    facts = {
        "host": os.uname().nodename,
        "os": os_release(),
        "kernel": kernel_facts(release),
        "missing_packages": missing_packages(module, module.params["packages"]),
        "installed": program(module, "bmigrate") is not None,
        "workloads": {name: workload_facts(module, name) for name in module.params["workloads"]},
    }
    module.exit_json(changed=False, ansible_facts={"bmigrate": facts})


if __name__ == "__main__":
    main()
