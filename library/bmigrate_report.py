#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Puts the report of a handover together from what both hosts recorded: numbers, text, JSON, a page.

It promises to show only what was recorded or measured: what is not known is null, never a guess. It
must never change anything but the two report files on the controller.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_report
short_description: Make the report of a handover
version_added: "0.1.0"
description:
  - Reads the step results that both hosts keep of a handover and makes one report of them. Runs on the controller.
  - The downtime is measured by the controller's clock, from before the workload was told to stop until the target
    was healthy. A handover continued from an earlier run has only the hosts' clocks for it.
options:
  plan:
    description: What M(bmigrate_plan) answered.
    type: dict
    required: true
  source:
    description: Durable state of the source after the handover.
    type: dict
    default: {}
  target:
    description: Durable state of the target after the handover.
    type: dict
    default: {}
  failure:
    description: Empty, or C(task), C(message) and C(verdict) of what failed.
    type: dict
    default: {}
  clock:
    description: C(stop) and C(run) in seconds since the epoch, by the controller's clock.
    type: dict
    default: {}
  directory:
    description: Directory on the controller for the report as JSON and as a page; none when empty.
    type: path
    default: ""
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Makes the report and writes no file.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Put the report together
  delegate_to: localhost
  bmigrate_report:
    plan: "{{ plan }}"
    source: "{{ source_facts.data.state }}"
    target: "{{ target_facts.data.state }}"
    directory: artifacts
"""

RETURN = r"""
report:
  description:
    - C(workload), C(verdict) (C(ok), C(rolled_back), C(unhealthy), C(committed) or C(unknown)), C(run_id), C(source),
      C(target), C(generation), C(downtime_seconds), C(phases), C(bytes_left_when_drain_began), C(drained_bytes),
      C(digest) and C(failure).
  returned: always
  type: dict
text:
  description: The report in lines.
  returned: always
  type: list
  elements: str
files:
  description: Files that were written.
  returned: always
  type: list
  elements: str
"""

import html
import json
import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

PHASES = (
    ("source", "converge"),
    ("source", "quiesce"),
    ("source", "drain"),
    ("target", "prepare"),
    ("source", "commit"),
    ("target", "promote"),
    ("target", "start"),
)
DOWN = ("quiesce", "drain", "prepare", "commit", "promote", "start")
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:50em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3em .8em}"
    "td,th{border-bottom:1px solid #ccc}"
    "td.n{text-align:right;font-variant-numeric:tabular-nums}.ok{color:#060}.bad{color:#a00}"
    ".bar{height:.8em;background:#36c;min-width:1px}"
    "@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}"
    ".ok{color:#7c7}.bad{color:#f88}.bar{background:#69f}}"
)


def results_of(state: dict[str, Any], run_id: str) -> dict[str, Any]:
    """Step results of a run that a host keeps, {} when it has none."""
    for record in (state.get("handover"), state.get("last_handover")):
        if record and record.get("run_id") == run_id:
            return record.get("results") or {}
    return {}


def phases(source: dict[str, Any], target: dict[str, Any]) -> list[dict[str, Any]]:
    """Seconds of each phase that the hosts recorded, in order, with its parts."""
    found = []
    for side, step in PHASES:
        result = (source if side == "source" else target).get(step)
        if result:
            found.append(
                {
                    "phase": step,
                    "side": side,
                    "seconds": result.get("seconds"),
                    "down": step in DOWN,
                    "parts": {part["name"]: part["seconds"] for part in result.get("parts") or []},
                }
            )
    return found


def downtime(clock: dict[str, float], source: dict[str, Any], target: dict[str, Any]) -> tuple[float | None, ...]:
    """(seconds by the controller's clock or None, seconds by the hosts' clocks or None)."""
    ours = clock["run"] - clock["stop"] if "run" in clock and "stop" in clock else None
    stopped = (source.get("quiesce") or {}).get("stopped_at")
    running = (target.get("start") or {}).get("running_at")
    theirs = running - stopped if stopped is not None and running is not None else None
    back = source.get("resume") or {}
    if theirs is None and back.get("downtime_seconds") is not None:
        theirs = back["downtime_seconds"]
    return tuple(None if value is None else round(value, 3) for value in (ours, theirs))


def make(
    plan: dict[str, Any],
    source: dict[str, Any],
    target: dict[str, Any],
    failure: dict[str, Any],
    clock: dict[str, float],
) -> dict[str, Any]:
    """The whole report as a dictionary; see RETURN."""
    ours, theirs = results_of(source, plan["run_id"]), results_of(target, plan["run_id"])
    drained = ours.get("drain") or {}
    measured, by_hosts = downtime(clock, ours, theirs)
    known = phases(ours, theirs)
    verdict = failure.get("verdict") or ("unknown" if failure else "ok")
    return {
        "workload": plan["workload"],
        "verdict": verdict,
        "run_id": plan["run_id"],
        "continued": plan["continued"],
        "source": plan["source"],
        "target": plan["target"],
        "generation": target.get("generation")
        if verdict in ("ok", "unhealthy", "committed")
        else source.get("generation"),
        "downtime_seconds": measured if measured is not None else by_hosts,
        "downtime_by_hosts_clocks_seconds": by_hosts,
        "phases": known,
        "between_the_phases_seconds": None
        if measured is None
        else round(measured - sum(item["seconds"] or 0 for item in known if item["down"]), 3),
        "bytes_left_when_drain_began": drained.get("bytes_left_at_start"),
        "drained_bytes": drained.get("bytes_shipped"),
        "digest": drained.get("digest"),
        "problems": [
            text for step in list(ours.values()) + list(theirs.values()) for text in step.get("problems") or []
        ],
        "failure": failure or None,
        "reported_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def known(value: Any, unit: str = "") -> str:
    """A value for people; 'not known' for None."""
    return "not known" if value is None else "%s%s" % (value, unit)


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report's facts as (label, text) for text and page."""
    generation = report["generation"] or {}
    return [
        ("Verdict", report["verdict"]),
        ("From, to", "%s -> %s" % (report["source"], report["target"])),
        ("Generation", "%s (%s)" % (generation.get("number", "not known"), str(generation.get("id", ""))[:8])),
        ("Run", report["run_id"] + (", continued" if report["continued"] else "")),
        ("Downtime", known(report["downtime_seconds"], " s")),
        ("Downtime by the hosts' clocks", known(report["downtime_by_hosts_clocks_seconds"], " s")),
        ("Of it, between the phases", known(report["between_the_phases_seconds"], " s")),
        ("Bytes left when the drain began", known(report["bytes_left_when_drain_began"])),
        ("Bytes drained", known(report["drained_bytes"])),
        ("Digest of the drain", known(report["digest"])),
    ]


def as_text(report: dict[str, Any]) -> list[str]:
    """The report in lines."""
    lines = ["Handover of workload %s" % report["workload"]]
    lines += ["  %-32s %s" % row for row in rows(report)]
    lines += [
        "  phase %-26s %s" % ("%s (%s)" % (item["phase"], item["side"]), known(item["seconds"], " s"))
        for item in report["phases"]
    ]
    if report["failure"]:
        lines.append("  failed: %s: %s" % (report["failure"].get("task"), report["failure"].get("message")))
    return lines + ["  note: %s" % text for text in report["problems"]]


def as_page(report: dict[str, Any]) -> str:
    """The report as one page that needs nothing else."""
    longest = max([item["seconds"] or 0 for item in report["phases"]] + [0.001])
    bars = "".join(
        '<tr><td>%s</td><td>%s</td><td class="n">%s</td><td><div class="bar" style="width:%.1f%%"></div></td></tr>'
        % (
            html.escape(item["phase"]),
            html.escape(item["side"]),
            html.escape(known(item["seconds"])),
            100.0 * (item["seconds"] or 0) / longest,
        )
        for item in report["phases"]
    )
    facts = "".join(
        "<tr><th>%s</th><td>%s</td></tr>" % (html.escape(label), html.escape(str(text))) for label, text in rows(report)
    )
    failure = (
        ""
        if not report["failure"]
        else '<p class="bad">%s: %s</p>'
        % (html.escape(str(report["failure"].get("task"))), html.escape(str(report["failure"].get("message"))))
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Handover of %s</title><style>%s</style>'
        '</head><body><h1>Handover of %s: <span class="%s">%s</span></h1>%s<table>%s</table><h2>Phases</h2>'
        "<table><tr><th>phase</th><th>side</th><th>seconds</th><th></th></tr>%s</table></body></html>\n"
        % (
            html.escape(report["workload"]),
            STYLE,
            html.escape(report["workload"]),
            "ok" if report["verdict"] == "ok" else "bad",
            html.escape(report["verdict"]),
            failure,
            facts,
            bars,
        )
    )


def write(directory: str, report: dict[str, Any]) -> list[str]:
    """Both files, each replaced whole; returns their paths."""
    os.makedirs(directory, exist_ok=True)
    base = os.path.join(os.path.realpath(directory), "handover-%s-%s" % (report["workload"], report["run_id"]))
    files = {base + ".json": json.dumps(report, indent=2, sort_keys=True) + "\n", base + ".html": as_page(report)}
    for path, text in files.items():
        with open(path + ".new", "w") as stream:
            stream.write(text)
        os.replace(path + ".new", path)
    return sorted(files)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "plan": {"type": "dict", "required": True},
            "source": {"type": "dict", "default": {}},
            "target": {"type": "dict", "default": {}},
            "failure": {"type": "dict", "default": {}},
            "clock": {"type": "dict", "default": {}},
            "directory": {"type": "path", "default": ""},
        },
        supports_check_mode=True,
    )
    params = module.params
    report = make(params["plan"], params["source"], params["target"], params["failure"], params["clock"])
    files = []
    if params["directory"] and not module.check_mode:
        try:
            files = write(params["directory"], report)
        except OSError as error:
            module.warn("the report was not written to %s: %s" % (params["directory"], error))
    module.exit_json(
        changed=False, report=report, text=as_text(report) + ["  report: %s" % path for path in files], files=files
    )


if __name__ == "__main__":
    main()
