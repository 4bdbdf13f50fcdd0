#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""One step of a handover on one host: one call of bmigrate, its answer, its exit code.

It promises that a step repeated with the same run id changes nothing and says so. State machine,
locks and fsyncs live in the program on the host; this module must never decide or retry anything.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_handover
short_description: Run one step of a handover on one host
version_added: "0.1.0"
description:
  - Calls C(bmigrate handover STEP) with the run id and the phase that the caller expects, and returns its answer.
  - The same step with the same run id again returns the recorded result and reports no change.
  - O(step=discover) and O(step=preflight) change nothing.
  - O(step=init) and O(step=adopt) give a host its first role; they ask the host first and change nothing when it
    has that role already.
options:
  step:
    description: The step.
    type: str
    required: true
    choices:
      - discover
      - preflight
      - begin
      - converge
      - quiesce
      - drain
      - prepare
      - commit
      - promote
      - start
      - finish
      - resume
      - cancel
      - init
      - adopt
  workload:
    description: Name of the workload.
    type: str
    required: true
  run_id:
    description: Run id of the handover; needed by every step that changes something, but for V(init) and V(adopt).
    type: str
  expect:
    description: Phase that the handover must be in on this host; the host refuses otherwise.
    type: str
  then:
    description:
      - Steps to take right after O(step) on the same host, in order, as long as each succeeds.
      - Each is a call of its own, with the same run id; what is saved is the time that Ansible needs between two tasks,
        which is downtime.
    type: list
    elements: dict
    default: []
    suboptions:
      step:
        description: A step that needs no more than the run id.
        type: str
        required: true
        choices: [converge, drain, start]
      expect:
        description: Phase that the handover must be in then.
        type: str
        required: true
  candidate:
    description: Candidate generation C({number, id}), for V(prepare) and V(commit).
    type: dict
  digest:
    description: Digest that the drain answered with, for V(prepare).
    type: str
  certificate:
    description: What V(commit) noted on the source, for V(promote).
    type: dict
  abandoned:
    description: Candidates that the source abandoned, for V(cancel).
    type: list
    elements: dict
  peer_facts:
    description: What V(discover) answered on the other host, for V(preflight).
    type: dict
  generation:
    description: Generation of the primary with its C(history) and C(volumes), for V(adopt).
    type: dict
  accept_unheld:
    description: For V(promote), go on although this host lost hold of its device after V(prepare).
    type: bool
    default: false
  overwrite:
    description: Name of the workload, when V(adopt) may overwrite a device that is not empty.
    type: str
    default: ""
  reason:
    description: Why the source takes the workload back, for V(resume).
    type: str
    default: playbook
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Asks the host and says whether the step would change anything.
    support: full
  diff_mode:
    description: Shows the phase before and after.
    support: full
"""

EXAMPLES = r"""
- name: Ask a host for its role
  bmigrate_handover:
    step: discover
    workload: pgdemo

- name: Stop the workload on the source
  bmigrate_handover:
    step: quiesce
    workload: pgdemo
    run_id: 20260101T120000Z-1b2c3d4e
    expect: begun

- name: Stop the workload on the source and ship what is left
  bmigrate_handover:
    step: quiesce
    workload: pgdemo
    run_id: 20260101T120000Z-1b2c3d4e
    expect: begun
    then:
      - {step: drain, expect: quiesced}

- name: Make the first primary
  bmigrate_handover:
    step: init
    workload: pgdemo
"""

RETURN = r"""
data:
  description:
    - What the step, or the last one of O(then), answered. The same when it is repeated.
    - For V(preflight), C(blocker_texts) and C(warning_texts) are the findings as sentences.
  returned: success
  type: dict
rolled_back:
  description: Whether the workload was put back on the source.
  returned: success
  type: bool
step_seconds:
  description: How long the call took on the host.
  returned: success and not in check mode
  type: float
cmd:
  description: Command that was run.
  returned: always
  type: list
  elements: str
rc:
  description: Exit code of the program.
  returned: always
  type: int
code:
  description: Class of the error, for example C(refused) or C(phase).
  returned: failure
  type: str
reason:
  description: Finer word for the error, for example C(device_busy).
  returned: failure
  type: str
"""

import json
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_cli import call, explain

READ_ONLY = ("discover", "preflight")
#: The steps that belong to one handover and name its run id.
STEPS_OF_A_RUN = (
    *("begin", "converge", "quiesce", "drain", "prepare", "commit"),
    *("promote", "start", "finish", "resume", "cancel"),
)
FIRST_ROLE = {"init": "primary", "adopt": "standby"}
# Exit codes that are an answer and not a failure of the call: resume ends with "rolled back" when it
# has done its work, and preflight with "refused" when it has found a blocker.
ANSWERS = {"resume": (7,), "preflight": (3,)}
ROLLED_BACK = 7
SHARED = ("workload", "run_id")
# option of the module -> option of the program, in the order of the command line
WORDS = (
    ("run_id", "--run-id"),
    ("expect", "--expect"),
    ("candidate", "--candidate"),
    ("digest", "--digest"),
    ("certificate", "--certificate"),
    ("abandoned", "--abandoned"),
    ("peer_facts", "--peer-facts"),
)


def as_word(value: Any) -> str:
    """A value as one word of a command line; dictionaries and lists as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def argv(params: dict[str, Any]) -> list[str]:
    """The command line of a step, from the module's parameters."""
    step = params["step"]
    if step in FIRST_ROLE:
        words = ["bmigrate", step, "--workload", params["workload"]]
        if step == "adopt":
            words += ["--generation", as_word(params["generation"])]
            if params["overwrite"]:
                words += ["--overwrite", params["overwrite"]]
        return words
    words = ["bmigrate", "handover", step, "--workload", params["workload"]]
    for key, option in WORDS:
        if params[key] is not None:
            words += [option, as_word(params[key])]
    if step == "resume":
        words += ["--reason", params["reason"]]
    if step == "promote" and params["accept_unheld"]:
        words += ["--accept-unheld"]
    return words


def state_of(answer: dict[str, Any]) -> dict[str, Any]:
    """The durable state in an answer of discover, {} when the host has none."""
    data = answer.get("data") or {}
    return data.get("state", data) or {}


def discover(module: AnsibleModule) -> dict[str, Any]:
    """State of the workload on this host."""
    return state_of(call(module, ["bmigrate", "handover", "discover", "--workload", module.params["workload"]]))


def done_already(state: dict[str, Any], params: dict[str, Any]) -> bool:
    """Whether the step would only repeat what this host has recorded."""
    step = params["step"]
    if step in FIRST_ROLE:
        return state.get("role") == FIRST_ROLE[step]
    records = [state.get("handover") or {}, state.get("last_handover") or {}]
    return any(record.get("run_id") == params["run_id"] and step in (record.get("results") or {}) for record in records)


def phase_of(state: dict[str, Any]) -> str:
    """Role and phase in words, for the diff."""
    return "%s, %s\n" % (state.get("role", "none"), (state.get("handover") or {}).get("phase", "idle"))


def first_role(module: AnsibleModule) -> None:
    """Give the host its first role unless it has it."""
    before = discover(module)
    params = module.params
    if done_already(before, params):
        module.exit_json(changed=False, cmd=[], rc=0, data={"state": before}, rolled_back=False)
    if module.check_mode:
        module.exit_json(changed=True, cmd=argv(params), rc=0, data={"state": before}, rolled_back=False)
    answer = call(module, argv(params))
    after = discover(module)
    module.exit_json(
        changed=answer["changed"],
        cmd=answer["cmd"],
        rc=answer["rc"],
        rolled_back=False,
        data=dict(answer["data"] or {}, state=after),
        diff={"before": phase_of(before), "after": phase_of(after)},
    )


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "step": {
                "type": "str",
                "required": True,
                "choices": ["discover", "preflight", *STEPS_OF_A_RUN, "init", "adopt"],
            },
            "workload": {"type": "str", "required": True},
            "run_id": {"type": "str"},
            "expect": {"type": "str"},
            "then": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "step": {"type": "str", "required": True, "choices": ["converge", "drain", "start"]},
                    "expect": {"type": "str", "required": True},
                },
            },
            "candidate": {"type": "dict"},
            "digest": {"type": "str"},
            "certificate": {"type": "dict"},
            "abandoned": {"type": "list", "elements": "dict"},
            "peer_facts": {"type": "dict"},
            "generation": {"type": "dict"},
            "accept_unheld": {"type": "bool", "default": False},
            "overwrite": {"type": "str", "default": ""},
            "reason": {"type": "str", "default": "playbook"},
        },
        required_if=[
            ("step", "prepare", ("candidate", "digest")),
            ("step", "commit", ("candidate",)),
            ("step", "promote", ("certificate",)),
            ("step", "cancel", ("abandoned",)),
            ("step", "adopt", ("generation",)),
        ]
        + [("step", step, ("run_id",)) for step in STEPS_OF_A_RUN],
        supports_check_mode=True,
    )
    params = module.params
    if params["step"] in FIRST_ROLE:
        first_role(module)
    if module.check_mode and params["step"] not in READ_ONLY:
        state = discover(module)
        module.exit_json(
            changed=not done_already(state, params),
            cmd=argv(params),
            rc=0,
            data={},
            rolled_back=False,
            diff={"before": phase_of(state), "after": "after %s\n" % params["step"]},
        )
    started = time.monotonic()
    answer = call(module, argv(params), accept=ANSWERS.get(params["step"], ()))
    changed = bool(answer["changed"])
    for later in params["then"]:
        answer = call(module, argv({**dict.fromkeys(params), **later, **{key: params[key] for key in SHARED}}))
        changed = changed or bool(answer["changed"])
    data = answer["data"] or {}
    if params["step"] == "preflight":
        for kind in ("blocker", "warning"):
            data[kind + "_texts"] = [explain(item) for item in data.get(kind + "s") or []]
    module.exit_json(
        changed=changed,
        data=data,
        cmd=answer["cmd"],
        rc=answer["rc"],
        rolled_back=answer["rc"] == ROLLED_BACK,
        step_seconds=round(time.monotonic() - started, 3),
    )


if __name__ == "__main__":
    main()
