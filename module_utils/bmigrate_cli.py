# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Calls one of the programs with --json and reads its one answer.

Every module goes through ``call``, so that exit codes and errors mean the same everywhere. Nothing
here decides anything or changes a role: the programs on the host do.
"""

from __future__ import annotations

import json
from typing import Any

EXIT_CODES = {
    0: "done",
    2: "usage or configuration",
    3: "refused",
    4: "unreachable",
    5: "suspect",
    6: "wrong phase",
    7: "rolled back",
    70: "defect",
}


def program(module: Any, name: str) -> str | None:
    """Path of a program, or None when it is not installed on this host."""
    return module.get_bin_path(name, required=False)


def envelope(out: str) -> dict[str, Any] | None:
    """The answer on stdout; None when stdout is not one object of schema 1."""
    try:
        answer = json.loads(out)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) and answer.get("schema") == 1 else None


def explain(error: dict[str, Any]) -> str:
    """An error as one sentence: what failed, which volume and host, what to do next."""
    where = ", ".join("%s %s" % (key, error[key]) for key in ("volume", "host") if error.get(key))
    text = str(error.get("message") or "error without a message")
    if where:
        text += " (%s)" % where
    if error.get("hint"):
        text += " -- %s" % error["hint"]
    return text


def call(module: Any, argv: list[str], accept: tuple[int, ...] = ()) -> dict[str, Any]:
    """Run a program; its answer as a dictionary with cmd and rc. Any other exit code ends the module.

    Args:
        argv: name of the program, then its words; --json is added.
        accept: exit codes other than 0 that the caller handles.
    """
    path = program(module, argv[0])
    if path is None:
        module.fail_json(msg="%s is not installed on this host -- run install.yml" % argv[0], code="not_installed")
    cmd = [path, *list(argv[1:]), "--json"]
    rc, out, err = module.run_command(cmd)
    answer = envelope(out)
    facts = {"cmd": cmd, "rc": rc, "meaning": EXIT_CODES.get(rc, "unknown")}
    if answer is None:
        module.fail_json(msg="%s did not answer in the documented form" % argv[0], stdout=out, stderr=err, **facts)
        raise SystemExit(1)  # fail_json does not return; said for type checkers
    if rc != 0 and rc not in accept:
        error = answer.get("error") or {}
        module.fail_json(
            msg=explain(error),
            error=error,
            code=error.get("code"),
            reason=error.get("reason"),
            data=answer.get("data"),
            stderr=err,
            **facts,
        )
    return dict(answer, **facts)
