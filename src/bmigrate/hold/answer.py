# SPDX-License-Identifier: GPL-3.0-or-later
"""The answer that is owed to a request which has to wait for the death of receivers.

It promises that whoever asked hears of success or of the error, once, however much later; an error
in the delayed work never reaches hold's loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bmigrate.common.errors import BmigrateError, RefusedError
from bmigrate.common.rpc import Connection

Request = dict[str, Any]


class Answer:
    """The answer that is owed to a request, given when the receivers are gone."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        self._request = request

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._connection.closed

    def reply(self, fields: dict[str, Any]) -> None:
        """Success."""
        self._connection.reply(self._request, fields)

    def guard(self, action: Callable[[], None]) -> Callable[[], None]:
        """The action, with its errors going to who asked for it."""

        def guarded() -> None:
            try:
                action()
            except BmigrateError as error:
                self._connection.fail(self._request, error)
            except OSError as error:
                self._connection.fail(
                    self._request,
                    RefusedError(
                        f"hold could not {self._request.get('op')}: {error}",
                        reason="os_error",
                        hint="see: journalctl -u bmigrate-hold, and the space left in /var/lib/bmigrate",
                    ),
                )

        return guarded
