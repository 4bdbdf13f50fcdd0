# SPDX-License-Identifier: GPL-3.0-or-later
"""The hash of a comparison: 128 bits of the hash that is named, and SHA-256 only where it is faster."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmigrate.wire import hashing


@given(st.binary(max_size=300), st.integers(1, 64))
def test_digests_are_those_of_each_chunk(data: bytes, chunk: int) -> None:
    pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
    assert hashing.digests("blake2b", data, chunk) == b"".join(
        hashlib.blake2b(piece, digest_size=16).digest() for piece in pieces
    )
    assert hashing.digests("sha256", memoryview(data), chunk) == b"".join(
        hashlib.sha256(piece).digest()[:16] for piece in pieces
    )


@given(st.floats(1e-6, 1), st.floats(1e-6, 1), st.integers(0, 5), st.floats(1, 50), st.floats(1, 50))
def test_the_faster_one_is_chosen_also_on_a_busy_host(
    blake2b: float, sha256: float, undisturbed: int, slow_blake2b: float, slow_sha256: float
) -> None:
    """All measurements but one of each are too long, by other factors; which one is right, is open."""

    def times(seconds: float, at: int, slower: float) -> Iterator[float]:
        return iter([seconds if number == at else slower * seconds for number in range(6)])

    series = {
        "blake2b": times(blake2b, undisturbed, slow_blake2b),
        "sha256": times(sha256, 5 - undisturbed, slow_sha256),
    }
    chosen = hashing.choose(lambda name: next(series[name]))
    assert chosen == ("sha256" if sha256 < 0.9 * blake2b else "blake2b")


@pytest.mark.parametrize("mine", hashing.NAMES)
@pytest.mark.parametrize("wanted", [*hashing.NAMES, "blake3", "crc32"])
@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_only_both_ends_together_leave_blake2b(
    monkeypatch: pytest.MonkeyPatch, version: int, wanted: str, mine: str
) -> None:
    monkeypatch.setattr(hashing, "preferred", lambda: mine)
    both = version >= 3 and wanted == mine == "sha256"
    assert hashing.agree(version, wanted) == ("sha256" if both else "blake2b")


def test_this_host_prefers_one_of_them() -> None:
    assert hashing.preferred() in hashing.NAMES
