# SPDX-License-Identifier: GPL-3.0-or-later
"""The demo's checker finds every lost commit and calls nothing lost that was never promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from demo import ledger


def acks(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": number, "began": number - 0.5, "acked": float(number)} for number in numbers]


@given(st.sets(st.integers(1, 200)), st.sets(st.integers(1, 200)), st.sets(st.integers(201, 300)))
def test_lost_is_what_was_acknowledged_and_is_not_there(
    promised: set[int], lost: set[int], unpromised: set[int]
) -> None:
    present = (promised - lost) | unpromised
    assert set(ledger.missing(acks(*sorted(promised)), present)) == promised & lost


def test_an_outage_runs_from_the_last_acknowledgement_to_the_next() -> None:
    events: list[dict[str, Any]] = [
        *acks(1, 2),
        {"refused": "E", "at": 2.25, "id": 3},
        {"refused": "E", "at": 4.0, "id": 4},
        *acks(9),
    ]
    (outage,) = ledger.outages(events)
    assert outage.to_refusal_seconds == 0.25
    assert outage.downtime_seconds == 7.0
    assert ledger.acknowledged_between(events, 1.5, 9.0) == 1


def test_an_outage_that_never_ended_has_no_downtime_yet() -> None:
    (outage,) = ledger.outages([*acks(1), {"refused": "E", "at": 2.0, "id": 2}])
    assert outage.downtime_seconds is None


def test_a_client_that_was_killed_in_its_last_line_is_still_readable(tmp_path: Path) -> None:
    log = tmp_path / "events"
    log.write_text("".join(json.dumps(event) + "\n" for event in acks(1, 2)) + '{"id": 3, "ack')
    assert ledger.acknowledged(ledger.read_events(log)) == [1, 2]
