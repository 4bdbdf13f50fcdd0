# SPDX-License-Identifier: GPL-3.0-or-later
"""The model of the protocol, in its smallest scope: it holds, it reaches what matters, and a broken rule breaks it."""

from __future__ import annotations

import re

import pytest

from tests.model.__main__ import MODEL, MUTANTS, PROBES, STREAM_MUTANTS, STREAM_PROBES, STREAMS, check
from tests.mutants import catalogue

SMALL = {"WRITES": 2, "SESSIONS": 2, "FAULTS": 1}


def test_the_invariant_holds_in_every_state() -> None:
    outcome = check(None, SMALL)
    assert outcome.holds and outcome.states > 10_000


@pytest.mark.parametrize("name", [*PROBES, *MUTANTS])
def test_what_must_be_found_is_found(name: str) -> None:
    assert not check(name, SMALL).holds, f"{name}: {({**MUTANTS, **PROBES})[name]}"


def test_the_invariant_holds_with_several_streams() -> None:
    outcome = check(None, {**SMALL, "FAULTS": 2}, STREAMS)
    assert outcome.holds and outcome.states > 10_000


@pytest.mark.parametrize("name", [*STREAM_PROBES, *STREAM_MUTANTS])
def test_what_must_be_found_with_several_streams_is_found(name: str) -> None:
    assert not check(name, {**SMALL, "FAULTS": 2}, STREAMS).holds, (
        f"{name}: {({**STREAM_MUTANTS, **STREAM_PROBES})[name]}"
    )


def test_every_rule_that_is_sabotaged_in_the_programs_is_one_of_the_model() -> None:
    """By the same name: what a mutant of the code takes out must be needed in the model as well, and be in it."""
    sabotaged = {mutant.name.upper().replace("-", "_") for mutant in catalogue.MUTANTS}
    assert len(sabotaged) >= 7
    modelled = {*MUTANTS, *STREAM_MUTANTS}
    assert sabotaged <= modelled, f"not in tests/model: {sorted(sabotaged - modelled)}"
    for model, names in ((MODEL, [*MUTANTS, *PROBES]), (STREAMS, [*STREAM_MUTANTS, *STREAM_PROBES])):
        text = model.read_text()
        assert not [name for name in names if not re.search(rf"(?m)^#if.*\b{name}\b", text)]
