# SPDX-License-Identifier: GPL-3.0-or-later
"""Machine output: exactly one JSON object on stdout, everything else on stderr.

The object is {schema, ok, changed, workload, data, error}; units are part of the key names
(``_bytes``, ``_seconds``). Programs never print a second object and never write progress to stdout.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import Any, Callable

from bmigrate.common.errors import BmigrateError, DefectError

SCHEMA = 1


def envelope(
    data: Any = None,
    *,
    changed: bool = False,
    workload: str | None = None,
    error: BmigrateError | None = None,
) -> dict[str, Any]:
    """The one object that a command answers with."""
    return {
        "schema": SCHEMA,
        "ok": error is None,
        "changed": changed,
        "workload": workload,
        "data": data,
        "error": error.to_dict() if error is not None else None,
    }


def emit(
    data: Any = None,
    *,
    changed: bool = False,
    workload: str | None = None,
    error: BmigrateError | None = None,
    as_json: bool = True,
    text: str | None = None,
) -> None:
    """Write the answer: JSON to stdout, or the human form ``text`` (errors then go to stderr)."""
    if as_json:
        sys.stdout.write(
            json.dumps(envelope(data, changed=changed, workload=workload, error=error), sort_keys=True) + "\n"
        )
    elif error is not None:
        sys.stderr.write(f"error: {error}\n")
    elif text is not None:
        sys.stdout.write(text.rstrip("\n") + "\n")
    sys.stdout.flush()


def progress(text: str) -> None:
    """One line of progress to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def run_main(body: Callable[[], int], *, as_json: bool = False, workload: str | None = None) -> int:
    """Run a program body; turn errors into the envelope (or a line on stderr) and an exit code.

    Args:
        body: does the work and returns an exit code.
        as_json: answer errors as JSON on stdout.
        workload: named in the envelope.
    """
    try:
        return body()
    except BmigrateError as error:
        emit(error=error, workload=workload, as_json=as_json)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        return 1
    except Exception as exc:  # the last resort: a defect must still answer in the documented form
        traceback.print_exc()
        defect = DefectError(
            f"unexpected {type(exc).__name__}: {exc}", hint="this is a bug; the trace is on stderr", reason="unexpected"
        )
        emit(error=defect, workload=workload, as_json=as_json)
        return defect.exit_code
