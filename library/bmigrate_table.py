#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Makes one table of all workloads from what their hosts said.

It promises a line for every workload and host, also for a host that did not answer. It changes nothing.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_table
short_description: Show workloads and their roles as a table
version_added: "0.1.0"
description:
  - Takes the facts of the hosts, as M(bmigrate_facts) gathered them, and makes one line per workload and host.
options:
  workloads:
    description: Definitions of the workloads; only C(workload) and C(hosts) are read.
    type: list
    elements: dict
    required: true
  reports:
    description: Per host the registered result of M(bmigrate_facts).
    type: dict
    required: true
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Reads its arguments only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Put the table together
  delegate_to: localhost
  bmigrate_table:
    workloads: "{{ bmigrate_workloads }}"
    reports:
      alpha: "{{ hostvars['alpha'].discovered }}"
"""

RETURN = r"""
lines:
  description: One dictionary per workload and host, with C(role), C(generation), C(state), C(bytes_left),
    C(lag_seconds), C(phase) and C(problem).
  returned: always
  type: list
  elements: dict
kernel_warnings:
  description: What a reboot of a host would do to the tracking, one sentence per host and kernel, and what to do.
  returned: always
  type: list
  elements: str
secure_boot:
  description: Per host that answered, Secure Boot, lockdown and C(module.sig_enforce) in words.
  returned: always
  type: dict
text:
  description: The lines as a table, the warnings below it.
  returned: always
  type: list
  elements: str
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

COLUMNS = (
    ("workload", "WORKLOAD"),
    ("host", "HOST"),
    ("role", "ROLE"),
    ("generation", "GENERATION"),
    ("state", "STATE"),
    ("bytes_left", "LEFT"),
    ("lag_seconds", "LAG"),
    ("problem", "PROBLEM"),
)


def problem_of(workload: str, result: dict[str, Any] | None) -> str | None:
    """Why a host says nothing of a workload, or None."""
    if result is None:
        return "not in the inventory, or left out by --limit"
    if result.get("unreachable"):
        return "unreachable: %s" % result.get("msg", "no answer")
    facts = (result.get("ansible_facts") or {}).get("bmigrate")
    if not facts:
        return "could not be asked: %s" % result.get("msg", "no facts")
    if not facts["installed"]:
        return "bmigrate is not installed"
    entry = facts["workloads"].get(workload) or {}
    return entry.get("error") or (None if entry.get("configured") else "not configured")


def suspicion(found: dict[str, Any]) -> str | None:
    """What is suspect on a host, in words, or None."""
    for daemon in ("breqd", "hold"):
        for volume in (found.get(daemon) or {}).get("volumes") or []:
            if volume.get("suspect"):
                return "volume %s is suspect: %s" % (volume.get("volume"), volume["suspect"])
        if found.get(daemon) and not found[daemon].get("running", True):
            return "%s does not answer" % daemon
    return None


def line(workload: str, host: str, result: dict[str, Any] | None) -> dict[str, Any]:
    """The line of one workload on one host."""
    entry = dict.fromkeys(("role", "generation", "state", "bytes_left", "lag_seconds", "phase"))
    entry.update(workload=workload, host=host, problem=problem_of(workload, result))
    if entry["problem"]:
        return entry
    answers: dict[str, Any] = (result or {})["ansible_facts"]["bmigrate"]["workloads"]
    found = answers[workload]["discover"] or {}
    state = found.get("state") or {}
    shipping: dict[str, Any] = next(
        (item for item in (found.get("ship") or {}).get("workloads") or [] if item.get("workload") == workload), {}
    )
    open_run = state.get("handover") or {}
    entry.update(
        role=state.get("role", "none"),
        generation=(state.get("generation") or {}).get("number"),
        phase=open_run.get("phase", "idle"),
        problem=suspicion(found),
    )
    if entry["role"] == "primary":
        entry.update(
            state=shipping.get("state"), bytes_left=shipping.get("bytes_left"), lag_seconds=shipping.get("lag_seconds")
        )
        failed = (shipping.get("last_error") or {}).get("message")
        entry["problem"] = entry["problem"] or shipping.get("reason") or failed
    if open_run:
        entry["state"] = "handover %s" % open_run.get("phase")
    return entry


def kernel_of(result: dict[str, Any] | None) -> dict[str, Any]:
    """What a host said of its kernels; empty when it said nothing or runs nothing of ours."""
    facts: dict[str, Any] = ((result or {}).get("ansible_facts") or {}).get("bmigrate") or {}
    return (facts.get("kernel") or {}) if facts.get("installed") else {}


def short(key: str, value: Any) -> str:
    """A value for a cell of the table."""
    if value is None:
        return "-"
    if key == "bytes_left":
        amount = float(value)
        for unit in ("B", "KiB", "MiB", "GiB"):
            if amount < 1024 or unit == "GiB":
                return "%.0f %s" % (amount, unit) if unit == "B" else "%.1f %s" % (amount, unit)
            amount /= 1024
    return "%.1f s" % value if key == "lag_seconds" else str(value)


def as_text(lines: list[dict[str, Any]]) -> list[str]:
    """The table, columns as wide as their widest cell."""
    cells = [[title for dummy, title in COLUMNS]]
    cells += [[short(key, entry[key]) for key, dummy in COLUMNS] for entry in lines]
    widths = [max(len(row[index]) for row in cells) for index in range(len(COLUMNS))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells]


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "workloads": {"type": "list", "elements": "dict", "required": True},
            "reports": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    lines = [
        line(entry["workload"], host, module.params["reports"].get(host))
        for entry in module.params["workloads"]
        for host in entry["hosts"]
    ]
    hosts = sorted({entry["host"] for entry in lines})
    said = {host: kernel_of(module.params["reports"].get(host)) for host in hosts}
    warnings = ["%s: %s" % (host, text) for host in hosts for text in said[host].get("warnings") or []]
    module.exit_json(
        changed=False,
        lines=lines,
        kernel_warnings=warnings,
        secure_boot={host: said[host]["secure_boot"] for host in hosts if said[host].get("secure_boot")},
        text=as_text(lines) + ["warning: " + text for text in warnings],
    )


if __name__ == "__main__":
    main()
