# SPDX-License-Identifier: GPL-3.0-or-later
"""The judge of "mounted on one host at most" sees an overlap when there is one."""

from __future__ import annotations

from tests.ansible.mounts import Span, spans, together


def test_spans_are_the_mounted_stretches_on_the_common_clock() -> None:
    lines = ["1.0 0", "1.1 1", "1.2 1", "1.3 0", "1.4 1", "1."]
    assert spans("alpha", lines, 10.0) == [Span("alpha", 11.1, 11.2), Span("alpha", 11.4, 11.4)]


def test_an_overlap_of_two_hosts_is_found_and_a_handover_is_not_one() -> None:
    alpha, beta = Span("alpha", 0.0, 10.0), Span("beta", 11.0, 20.0)
    assert together([alpha, beta], 0.2) == []
    late = Span("beta", 9.5, 20.0)
    assert together([alpha, late], 0.2) == [(alpha, late)]
    assert together([alpha, Span("alpha", 5.0, 6.0)], 0.2) == []
