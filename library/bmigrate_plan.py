#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Decides, from what both hosts say, who is source and target and which steps are left.

It is a pure function of its arguments (but for a fresh run id): it talks to no host and stores
nothing, so that a playbook killed anywhere finds its way again from the hosts alone. It must never
guess: whatever it does not know for sure is a blocker with a sentence that says what to do.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_plan
short_description: Decide what a handover or a sync has to do, from what both hosts say
version_added: "0.1.0"
description:
  - Takes the facts of both hosts of a workload, as M(bmigrate_facts) gathered them, and answers with roles,
    run id, the steps that are left, and every blocker. Runs on the controller and changes nothing.
  - A handover that is open on the hosts is continued with its own run id; steps that are done are left out.
  - Roles are never taken from the inventory.
options:
  workload:
    description: Name of the workload.
    type: str
    required: true
  hosts:
    description: The two hosts of the workload, by inventory name.
    type: list
    elements: str
    required: true
  reports:
    description:
      - Per host the registered result of M(bmigrate_facts), which may be that of an unreachable host.
      - A host that is missing here is not in the inventory, or was left out by a limit.
    type: dict
    required: true
  purpose:
    description: What the plan is for.
    type: str
    choices: [handover, sync]
    default: handover
  initial_primary:
    description: Host to make primary when no host has a role yet. Used by O(purpose=sync) only.
    type: str
    default: ""
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Decides only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Decide what is left to do
  delegate_to: localhost
  bmigrate_plan:
    workload: pgdemo
    hosts: [alpha, beta]
    reports:
      alpha: "{{ hostvars['alpha'].discovered }}"
      beta: "{{ hostvars['beta'].discovered }}"
"""

RETURN = r"""
blockers:
  description: Everything that stands in the way, one sentence each. Empty when the plan can be carried out.
  returned: always
  type: list
  elements: str
source:
  description: Host that runs the workload now, or ran it when the open handover began.
  returned: always, empty when unknown
  type: str
target:
  description: The other host.
  returned: always, empty when unknown
  type: str
run_id:
  description: Run id to use.
  returned: always
  type: str
continued:
  description: Whether a handover that is open on the hosts is continued.
  returned: always
  type: bool
undo:
  description: What to tidy before a new handover begins, C(resume) on the source and C(cancel) on the target.
  returned: always
  type: dict
steps:
  description: Steps that are left, in order.
  returned: always
  type: list
  elements: str
  sample: [begin, converge, quiesce, drain, prepare, commit, promote, start, finish_source, finish_target]
known:
  description: C(candidate), C(digest) and C(certificate) that the hosts have recorded in the continued handover.
  returned: always
  type: dict
init:
  description: Host that O(purpose=sync) has to make the first primary, or empty.
  returned: always
  type: str
adopt:
  description: Host that O(purpose=sync) has to make a standby, or empty.
  returned: always
  type: str
generation:
  description: Generation of the primary.
  returned: always, null when there is none
  type: dict
history:
  description: Generations that the primary knows, for O(purpose=sync).
  returned: always
  type: list
  elements: dict
volumes:
  description: Name, size and logical block size of the source's volumes.
  returned: always
  type: list
  elements: dict
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

STEPS = (
    "begin",
    "converge",
    "quiesce",
    "drain",
    "prepare",
    "commit",
    "promote",
    "start",
    "finish_source",
    "finish_target",
)
LEFT_AT_SOURCE = {
    "begun": STEPS[1:],
    "quiesced": STEPS[3:],
    "drained": STEPS[4:],
    "committed": STEPS[6:],
}
DONE_AT_TARGET = {
    "prepared": ("prepare",),
    "promoting": ("prepare",),
    "promoted": ("prepare", "promote"),
    "started": ("prepare", "promote", "start"),
}


def new_run_id() -> str:
    """A run id that sorts by time and does not repeat."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + os.urandom(4).hex()


def same(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two generations are the same: number and id."""
    return one is not None and other is not None and (one["number"], one["id"]) == (other["number"], other["id"])


def entry_of(result: dict[str, Any], workload: str) -> dict[str, Any]:
    """What a host said of a workload."""
    return result["ansible_facts"]["bmigrate"]["workloads"].get(workload) or {}


def state_of(result: dict[str, Any], workload: str) -> dict[str, Any]:
    """Durable state of a workload as the host told it; role none when the host has none."""
    data = entry_of(result, workload).get("discover") or {}
    state = data.get("state", data) or {}
    return dict(
        {"role": "none", "generation": None, "history": [], "abandoned": [], "demoted": None, "handover": None},
        **{key: value for key, value in state.items() if value is not None},
    )


def volumes_of(result: dict[str, Any], workload: str) -> list[dict[str, Any]]:
    """Sizes of the volumes that a host found, as the other host needs them to refuse an unfit device."""
    found = (entry_of(result, workload).get("discover") or {}).get("volumes") or {}
    return [
        {"name": name, "size_bytes": item["size_bytes"], "logical_block_size": item["logical_block_size"]}
        for name, item in sorted(found.items())
        if item.get("present")
    ]


def unready(workload: str, host: str, result: dict[str, Any] | None) -> str | None:
    """What hides the state of a host: not reached, not installed, not configured, no answer; or None."""
    if result is None:
        return "host %s is not in the inventory, or was left out by --limit" % host
    if result.get("unreachable"):
        return (
            "host %s is unreachable (%s): its role is not known, and a workload is moved only while both hosts "
            "answer -- bring %s back; promoting a replica without its primary is not supported by this version"
            % (host, str(result.get("msg", "no answer")).strip(), host)
        )
    facts = (result.get("ansible_facts") or {}).get("bmigrate")
    if not facts:
        return "host %s could not be asked: %s" % (host, result.get("msg", "no facts"))
    entry = facts["workloads"].get(workload) or {}
    if not facts["installed"]:
        return "bmigrate is not installed on %s -- run install.yml" % host
    if not entry.get("configured"):
        return "workload %s is not configured on %s -- run install.yml" % (workload, host)
    if entry.get("error"):
        return "%s does not tell its role: %s" % (host, entry["error"])
    return None


def forked(states: dict[str, dict[str, Any]], hosts: list[str]) -> str | None:
    """A sentence when the histories contradict each other, else None."""
    known = {item["number"]: item["id"] for item in states[hosts[0]]["history"]}
    for item in states[hosts[1]]["history"]:
        if known.get(item["number"], item["id"]) != item["id"]:
            return (
                "the histories of %s and %s fork at generation %d: both were primary of different data -- decide "
                "which copy is good; nothing is done automatically" % (hosts[0], hosts[1], item["number"])
            )
    return None


def side_of(states: dict[str, dict[str, Any]], hosts: list[str], side: str) -> str | None:
    """Host on which a handover is open on that side, or None."""
    found = [host for host in hosts if (states[host]["handover"] or {}).get("side") == side]
    return found[0] if len(found) == 1 else None


def recorded(source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Candidate, digest and certificate that the two states of an open handover hold."""
    ours, theirs = source["handover"] or {}, target["handover"] or {}
    results = ours.get("results") or {}
    return {
        "candidate": ours.get("candidate") or theirs.get("candidate"),
        "digest": (results.get("drain") or {}).get("digest"),
        "certificate": source["demoted"] or (results.get("commit") or {}).get("certificate"),
    }


def steps_left(source: dict[str, Any], target: dict[str, Any]) -> list[str]:
    """Steps that an open handover has not done yet, in order."""
    ours, theirs = source["handover"], target["handover"]
    left = list(LEFT_AT_SOURCE[ours["phase"]]) if ours else ["promote", "start", "finish_target"]
    if theirs:
        left = [step for step in left if step not in DONE_AT_TARGET[theirs["phase"]]]
    elif ours and target["role"] == "primary" and same(target["generation"], ours["candidate"]):
        left = ["finish_source"]
    return left


def plan_open(plan: dict[str, Any], states: dict[str, dict[str, Any]], hosts: list[str]) -> None:
    """Continue, or first undo, a handover that is open on the hosts."""
    source_host, target_host = side_of(states, hosts, "source"), side_of(states, hosts, "target")
    if source_host is None:
        source_host = next(host for host in hosts if host != target_host)
    target_host = next(host for host in hosts if host != source_host)
    source, target = states[source_host], states[target_host]
    ours, theirs = source["handover"], target["handover"]
    plan.update(source=source_host, target=target_host)
    given_up = theirs and any(same(theirs["candidate"], item) for item in source["abandoned"])
    if theirs and theirs["phase"] == "prepared" and (given_up or (ours and ours["phase"] == "resuming")):
        plan["undo"]["cancel"] = theirs["run_id"]
        theirs = None
    if ours and ours["phase"] == "resuming":
        plan["undo"]["resume"] = ours["run_id"]
        ours = None
    if ours and theirs and ours["run_id"] != theirs["run_id"]:
        plan["blockers"].append(
            "run %s is open on %s and run %s on %s -- look at both with 'bmigrate "
            "handover discover'" % (ours["run_id"], source_host, theirs["run_id"], target_host)
        )
        return
    if ours is None and theirs is None:
        plan_new(plan, states, hosts)
        return
    if ours is None and not same(source["generation"], theirs["candidate"]):
        plan["blockers"].append(
            "handover %s is open on %s in phase %s, but %s neither abandoned nor committed its "
            "candidate -- look at both with 'bmigrate handover discover'"
            % (theirs["run_id"], target_host, theirs["phase"], source_host)
        )
        return
    now = dict(source, handover=ours), dict(target, handover=theirs)
    plan.update(run_id=(ours or theirs)["run_id"], continued=True, steps=steps_left(*now), known=recorded(*now))


def plan_new(plan: dict[str, Any], states: dict[str, dict[str, Any]], hosts: list[str]) -> None:
    """A new handover from the one primary to the one standby of the same generation."""
    primaries = [host for host in hosts if states[host]["role"] == "primary"]
    standbys = [host for host in hosts if states[host]["role"] == "standby"]
    if len(primaries) != 1 or len(standbys) != 1:
        plan["blockers"].append(
            "a handover needs one primary and one standby; here %s -- %s"
            % (
                " and ".join("%s is %s" % (host, states[host]["role"]) for host in hosts),
                "stop one by hand, nothing is done automatically" if len(primaries) == 2 else "run sync.yml first",
            )
        )
        return
    plan.update(source=primaries[0], target=standbys[0])
    source, target = states[primaries[0]], states[standbys[0]]
    if not same(source["generation"], target["generation"]):
        plan["blockers"].append(
            "%s is primary of another generation than the replica on %s -- run sync.yml" % (primaries[0], standbys[0])
        )
        return
    plan["steps"] = list(STEPS)


def plan_sync(plan: dict[str, Any], states: dict[str, dict[str, Any]], hosts: list[str], initial_primary: str) -> None:
    """Who is to be made primary or standby so that shipping can go on."""
    roles = {host: states[host]["role"] for host in hosts}
    primaries = [host for host in hosts if roles[host] == "primary"]
    if all(role == "none" for role in roles.values()):
        if initial_primary not in hosts:
            plan["blockers"].append(
                "no host has a role for workload %s yet: say which has the data, with -e bmigrate_initial_primary=%s"
                % (plan["workload"], " or ".join(hosts))
            )
            return
        plan.update(source=initial_primary, init=initial_primary)
    elif len(primaries) == 1:
        plan.update(source=primaries[0])
    else:
        plan["blockers"].append(
            "sync needs one primary; %s" % ", ".join("%s is %s" % (host, roles[host]) for host in hosts)
        )
        return
    plan["target"] = next(host for host in hosts if host != plan["source"])
    source, target = states[plan["source"]], states[plan["target"]]
    plan.update(generation=source["generation"], history=source["history"])
    if target["role"] == "none":
        plan["adopt"] = plan["target"]
    elif not same(source["generation"], target["generation"]):
        plan["blockers"].append(
            "the replica on %s is of another generation than the primary %s -- bringing a host "
            "back after that is not supported by this version" % (plan["target"], plan["source"])
        )


def decide(
    workload: str, hosts: list[str], reports: dict[str, Any], purpose: str = "handover", initial_primary: str = ""
) -> dict[str, Any]:
    """The whole plan as a dictionary; see RETURN."""
    plan: dict[str, Any] = {
        "workload": workload,
        "source": "",
        "target": "",
        "run_id": new_run_id(),
        "continued": False,
        "undo": {},
        "steps": [],
        "known": {"candidate": None, "digest": None, "certificate": None},
        "init": "",
        "adopt": "",
        "generation": None,
        "history": [],
        "volumes": [],
        "roles": {},
        "blockers": [text for text in (unready(workload, host, reports.get(host)) for host in hosts) if text],
    }
    if len(hosts) != 2 or len(set(hosts)) != 2:
        plan["blockers"].append("workload %s names %d hosts; exactly two are needed" % (workload, len(set(hosts))))
    if plan["blockers"]:
        return plan
    states = {host: state_of(reports[host], workload) for host in hosts}
    plan["roles"] = {host: states[host]["role"] for host in hosts}
    fork = forked(states, hosts)
    opened = [host for host in hosts if states[host]["handover"]]
    if fork:
        plan["blockers"].append(fork)
    elif purpose == "sync":
        if opened:
            plan["blockers"].append(
                "handover %s is open on %s -- run failover.yml again to finish it"
                % (states[opened[0]]["handover"]["run_id"], opened[0])
            )
        else:
            plan_sync(plan, states, hosts, initial_primary)
    elif opened:
        plan_open(plan, states, hosts)
    else:
        plan_new(plan, states, hosts)
    if plan["source"]:
        plan["generation"] = states[plan["source"]]["generation"]
        plan["volumes"] = volumes_of(reports[plan["source"]], workload)
    return plan


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "workload": {"type": "str", "required": True},
            "hosts": {"type": "list", "elements": "str", "required": True},
            "reports": {"type": "dict", "required": True},
            "purpose": {"type": "str", "choices": ["handover", "sync"], "default": "handover"},
            "initial_primary": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    words = module.params
    module.exit_json(
        changed=False,
        **decide(words["workload"], words["hosts"], words["reports"], words["purpose"], words["initial_primary"]),
    )


if __name__ == "__main__":
    main()
