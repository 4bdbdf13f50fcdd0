# SPDX-License-Identifier: GPL-3.0-or-later
"""A client that writes without a pause and remembers what the server acknowledged.

One row per transaction, one transaction at a time, numbered from 1 without reuse. It is told both
hosts, as a real client's connection string would be, and nothing else: it learns of a handover the
way users do, by an error. Each line of its log is one event, written before the next transaction
begins, so that killing it loses no acknowledgement: {"id", "began", "acked"} in seconds of one
monotonic clock, or {"refused", "at", "id"}. It must never count a commit that was not acknowledged.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from typing import Any, TextIO

import psycopg

RETRY_SECONDS = 0.05


class Stop:
    """Set by a signal; the client ends after the transaction under way."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True


def write_until_stopped(conninfo: str, log: TextIO, stop: Stop, first_id: int) -> None:
    """Insert rows until stopped, reconnecting for as long as it takes.

    Args:
        conninfo: libpq connection string with both hosts.
        log: receives the events.
        stop: asks for the end.
        first_id: number of the first row.
    """

    def note(event: dict[str, Any]) -> None:
        log.write(json.dumps(event) + "\n")
        log.flush()

    number = first_id
    connection: psycopg.Connection[Any] | None = None
    while not stop.requested:
        began = time.monotonic()
        try:
            if connection is None:
                connection = psycopg.connect(conninfo, autocommit=True, prepare_threshold=None)
                began = time.monotonic()
            connection.execute("insert into ledger (id, note) values (%s, %s)", (number, os.urandom(64).hex()))
        except psycopg.Error as error:
            note({"refused": type(error).__name__, "at": time.monotonic(), "id": number})
            if connection is not None:
                connection.close()
                connection = None
                number += 1  # the outcome of that one is unknown: its number is not used again
            else:
                time.sleep(RETRY_SECONDS)
            continue
        note({"id": number, "began": began, "acked": time.monotonic()})
        number += 1
    if connection is not None:
        connection.close()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write rows until SIGTERM and log what was acknowledged.")
    parser.add_argument("--conninfo", required=True, help="libpq connection string naming both hosts")
    parser.add_argument("--log", required=True, help="file for the events, appended")
    parser.add_argument("--first-id", type=int, default=1)
    arguments = parser.parse_args()
    stop = Stop()
    with open(arguments.log, "a", encoding="utf-8") as log:
        write_until_stopped(arguments.conninfo, log, stop, arguments.first_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
