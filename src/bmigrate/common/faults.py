# SPDX-License-Identifier: GPL-3.0-or-later
"""Named fault points, switched on by tests only.

``point("ship.send")`` does nothing unless the environment of the process names that point in
``BMIGRATE_FAULTS`` (root sets it by a systemd drop-in): ``name=action[:argument][@N]``, comma
separated; ``@N`` means only from the Nth visit on, and then once. Actions: ``kill`` (SIGKILL to
ourselves), ``stop`` (SIGSTOP), ``delay:SECONDS``, ``error:ERRNO`` (an OSError), ``corrupt``
(returned to the caller, which flips a byte). It must never cost anything when unset.
"""

from __future__ import annotations

import os
import signal
import threading
import time

_PLAN: dict[str, list[tuple[str, str, int]]] = {}
_VISITS: dict[str, int] = {}
_COUNTING = threading.Lock()


def configure(text: str) -> None:
    """Set the plan from the text form; an empty text switches everything off."""
    _PLAN.clear()
    _VISITS.clear()
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, action = item.partition("=")
        action, _, nth = action.partition("@")
        action, _, argument = action.partition(":")
        _PLAN.setdefault(name, []).append((action, argument, int(nth or 0)))


def point(name: str) -> str | None:
    """Visit a fault point; returns ``"corrupt"`` when the caller shall damage its data.

    Raises:
        OSError: the plan says ``error``.
    """
    if not _PLAN:
        return None
    actions = _PLAN.get(name)
    if not actions:
        return None
    with _COUNTING:
        _VISITS[name] = visit = _VISITS.get(name, 0) + 1
    result = None
    for action, argument, nth in actions:
        if nth and visit != nth:
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            # To this thread: sent to the process, another thread may take it, and this one go on past the point.
            signal.raise_signal(signal.SIGSTOP)
        elif action == "delay":
            time.sleep(float(argument))
        elif action == "error":
            raise OSError(int(argument), f"injected at {name}")
        elif action == "corrupt":
            result = "corrupt"
    return result


configure(os.environ.get("BMIGRATE_FAULTS", ""))
