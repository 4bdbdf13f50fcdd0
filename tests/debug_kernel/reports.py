# SPDX-License-Identifier: GPL-3.0-or-later
"""What a debug kernel complains about, found in its log and in kmemleak's list. Pure: text in, values out.

Every report counts, also one without a frame of ours, because a module can break what belongs to others; except those
in KNOWN, which the kernel makes without the modules, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: First line of a report of the kernel's checks (KASAN, lockdep, RCU, objects, lists, sleeping, hung tasks).
HEAD = re.compile(
    r"BUG: |WARNING: |KASAN: |Oops|general protection|unable to handle|ODEBUG: |refcount_t: |list_(add|del) corruption"
    r"|INFO: (task|possible|suspicious|trying|lockdep|rcu)|possible .* locking|suspicious RCU|bad unlock balance"
    r"|inconsistent lock state|held lock freed|lock held when returning|DEBUG_LOCKS_WARN_ON"
    r"|[Ss]cheduling while atomic|[Ss]leeping function called|kmemleak: (?!Kernel memory leak detector initialized)"
    r"|Kernel panic|Object already free|corruption\."
)
#: (regular expression of the first line, why it is not the modules' doing).
KNOWN: tuple[tuple[str, str], ...] = (
    # kmemleak says so after each scan that found something; what it found is judged by leaks().
    (r"kmemleak: \d+ new suspected memory leaks", "the list itself is looked at"),
)
_OURS = re.compile(r"\b(reqlog|bufflink)(_\w+)?\b|\[(reqlog|bufflink)\]")
_STAMP = re.compile(r"^\[\s*\d+\.\d+\](\[[^]]*\])? ?")
_BODY_LINES = 80


@dataclass(frozen=True)
class Report:
    """One complaint: its first line, and what follows."""

    head: str
    text: str

    @property
    def ours(self) -> bool:
        """Whether a frame of the modules is in it."""
        return bool(_OURS.search(self.text))


def reports(log: str) -> list[Report]:
    """Reports in a kernel log, the known ones left out."""
    lines = [_STAMP.sub("", line) for line in log.splitlines()]
    found = []
    for number, line in enumerate(lines):
        if HEAD.search(line) and not any(re.search(known, line) for known, _ in KNOWN):
            found.append(Report(line, "\n".join(lines[number : number + _BODY_LINES])))
    return found


def leaks(listing: str) -> list[Report]:
    """Unreferenced objects in /sys/kernel/debug/kmemleak that the modules allocated.

    A frame that has no name is of a module that was unloaded since: the modules' too.
    """
    found = []
    for part in re.split(r"(?m)^(?=unreferenced object )", listing):
        frames = re.findall(r"(?m)^\s+\[<[0-9a-fx]+>\] *(.*)$", part) or re.findall(
            r"(?m)^\s{4}\[?<?[0-9a-f]{16}>?\]? *(.*)$", part
        )
        if part.startswith("unreferenced") and any(_OURS.search(frame) or "+0x" not in frame for frame in frames):
            found.append(Report(part.splitlines()[0], part))
    return found
