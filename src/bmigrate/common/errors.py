# SPDX-License-Identifier: GPL-3.0-or-later
"""The error hierarchy and the one table of exit codes.

Every error says what failed, on which volume and host, and what to do next. It travels unchanged
over sockets, the wire and the machine output (``to_dict`` / ``from_dict``). Nothing here prints.
"""

from __future__ import annotations

import socket
from typing import Any


class BmigrateError(Exception):
    """Base of all errors that an operator may see.

    Args:
        message: one sentence, what failed.
        volume: the volume it is about, if any.
        host: the host it happened on; default: this host.
        hint: what to do next.
        reason: short snake_case word that tests and playbooks may branch on.
    """

    code = "defect"
    exit_code = 70

    def __init__(
        self,
        message: str,
        *,
        volume: str | None = None,
        host: str | None = None,
        hint: str | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.volume = volume
        self.host = host if host is not None else socket.gethostname()
        self.hint = hint
        self.reason = reason

    def to_dict(self) -> dict[str, Any]:
        """The machine form: {code, reason, message, volume, host, hint}."""
        return {
            "code": self.code,
            "reason": self.reason,
            "message": self.message,
            "volume": self.volume,
            "host": self.host,
            "hint": self.hint,
        }

    def __str__(self) -> str:
        where = ", ".join(part for part in (self.volume and f"volume {self.volume}", f"host {self.host}") if part)
        hint = f" -- {self.hint}" if self.hint else ""
        return f"{self.message} ({where}){hint}"


class UsageError(BmigrateError):
    """The command line or the configuration is wrong. Exit code 2."""

    code = "usage"
    exit_code = 2


class RefusedError(BmigrateError):
    """Something stands in the way, named by ``reason``; nothing was changed. Exit code 3."""

    code = "refused"
    exit_code = 3


class UnreachableError(BmigrateError):
    """The peer, or a daemon of this host, does not answer. Exit code 4."""

    code = "unreachable"
    exit_code = 4


class SuspectError(BmigrateError):
    """Tracking may have missed writes; a resync is due. Exit code 5."""

    code = "suspect"
    exit_code = 5


class PhaseError(BmigrateError):
    """The handover is in another phase, or belongs to another run. Exit code 6."""

    code = "phase"
    exit_code = 6


class RolledBackError(BmigrateError):
    """The handover was undone before its commit; the source runs the workload. Exit code 7."""

    code = "rolled_back"
    exit_code = 7


class DefectError(BmigrateError):
    """A bug of ours, or a state that must not be. Exit code 70."""


_CLASSES: dict[str, type[BmigrateError]] = {
    cls.code: cls
    for cls in (UsageError, RefusedError, UnreachableError, SuspectError, PhaseError, RolledBackError, DefectError)
}

EXIT_CODES = (
    (0, "done"),
    (2, "usage or configuration error"),
    (3, "refused, the blocker is named"),
    (4, "peer or daemon unreachable"),
    (5, "volume suspect, a resync is due"),
    (6, "wrong phase, or another run's handover"),
    (7, "rolled back, the source runs the workload"),
    (70, "defect"),
)


def exit_code_table() -> str:
    """The exit codes as text for ``--help``."""
    return "exit codes:\n" + "\n".join(f"  {code:>2}  {text}" for code, text in EXIT_CODES)


def from_dict(fields: dict[str, Any]) -> BmigrateError:
    """The error that ``to_dict`` described; an unknown code becomes a DefectError.

    Args:
        fields: the dictionary, possibly from another version or another host.
    """
    cls = _CLASSES.get(str(fields.get("code")), DefectError)
    return cls(
        str(fields.get("message", "error without a message")),
        volume=fields.get("volume"),
        host=fields.get("host") or "unknown",
        hint=fields.get("hint"),
        reason=fields.get("reason"),
    )
