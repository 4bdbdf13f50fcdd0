# SPDX-License-Identifier: GPL-3.0-or-later
"""The handshake's payloads: complete and typed, or refused by the field's name."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.wire import frames
from bmigrate.wire import hello as greeting
from bmigrate.wire.hello import Hello, HelloError, VersionError

HELLO = Hello(
    "wl",
    "alpha",
    greeting.Generation(3, "a" * 32),
    "b" * 32,
    "c" * 32,
    [greeting.HelloVolume("data", 1 << 30, 512, 4096)],
    greeting.LastSession(4, "d" * 32, 9),
    4,
)
WELCOME = greeting.Welcome(
    5, "e" * 32, "beta", "f" * 32, 20.0, [greeting.WelcomeVolume("data", 0, 1 << 30, 512, "why not")]
)


def test_both_survive_the_way() -> None:
    assert greeting.decode_hello(greeting.encode(HELLO)) == HELLO
    assert greeting.decode_hello(HELLO.to_dict()) == HELLO
    assert greeting.decode_welcome(greeting.encode(WELCOME)) == WELCOME
    error = {"code": "refused", "message": "no", "reason": "because"}
    assert greeting.decode_error(greeting.encode(error)) == error


def put(fields: dict[str, Any], path: tuple[Any, ...], value: Any) -> bytes:
    changed = copy.deepcopy(fields)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(changed).encode()


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("workload",), "../etc", "workload"),
        (("workload",), "", "workload"),
        (("workload",), 5, "workload"),
        (("host",), None, "host"),
        (("host",), "a b", "host"),
        (("generation",), 3, "generation"),
        (("generation", "number"), 0, "number"),
        (("generation", "number"), True, "number"),
        (("generation", "id"), "A" * 32, "id"),
        (("generation", "id"), "a" * 33, "id"),
        (("volumes",), [], "volumes"),
        (("volumes",), {}, "volumes"),
        (("volumes", 0), "data", r"volumes\[0\]"),
        (("volumes", 0, "size_bytes"), -1, "size_bytes"),
        (("volumes", 0, "size_bytes"), 1.5, "size_bytes"),
        (("volumes", 0, "size_bytes"), 1 << 64, "size_bytes"),
        (("volumes", 0, "logical_block_size"), 0, "logical_block_size"),
        (("last_session", "ack"), "9", "ack"),
        (("last_session", "session_id"), "x", "session_id"),
        (("highest_epoch",), -1, "highest_epoch"),
        (("surprise",), 1, "surprise"),
        (("volumes", 0, "surprise"), 1, "surprise"),
        (("boot_id",), "/dev/sda", "boot_id"),
        (("streams",), 0, "streams"),
        (("streams",), greeting.MAX_STREAMS + 1, "streams"),
        (("join",), {"epoch": 1}, "session_id"),
        (("join",), {"epoch": 0, "session_id": "d" * 32}, "epoch"),
        (("join",), {"epoch": 1, "session_id": "d" * 32, "surprise": 1}, "surprise"),
        (("hash",), "", "hash"),
        (("hash",), "SHA-256", "hash"),
        (("hash",), 256, "hash"),
    ],
)
def test_a_wrong_field_is_named(path: tuple[Any, ...], value: Any, named: str) -> None:
    with pytest.raises(HelloError, match=named):
        greeting.decode_hello(put(HELLO.to_dict(), path, value))


@pytest.mark.parametrize("version", [0, frames.VERSION + 1, "1", True, 1.5, 1001, [2]])
def test_another_version_is_told_apart_from_damage(version: Any) -> None:
    with pytest.raises(VersionError, match="version"):
        greeting.decode_hello(json.dumps({**HELLO.to_dict(), "v": version, "v_min": version}).encode())
    with pytest.raises(VersionError):
        greeting.decode_welcome(put(WELCOME.to_dict(), ("v",), version))


def test_a_volume_named_twice_and_holes_in_the_indexes_are_refused() -> None:
    volume = HELLO.to_dict()["volumes"][0]
    with pytest.raises(HelloError, match="twice"):
        greeting.decode_hello(put(HELLO.to_dict(), ("volumes",), [volume, volume]))
    with pytest.raises(HelloError, match="index"):
        greeting.decode_welcome(put(WELCOME.to_dict(), ("volumes", 0, "index"), 1))


@pytest.mark.parametrize("payload", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 60000, b"1e999"])
def test_what_is_no_object_is_refused(payload: bytes) -> None:
    for decode in (greeting.decode_hello, greeting.decode_welcome, greeting.decode_error):
        with pytest.raises(HelloError):
            decode(payload)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*HELLO.to_dict(), "other"]), JSON))
def test_any_object_is_decoded_or_refused(fields: dict[str, Any]) -> None:
    try:
        decoded = greeting.decode_hello(json.dumps({"v": 1, **fields}).encode())
    except HelloError:
        return
    assert isinstance(decoded.volumes[0].size_bytes, int)


@given(st.integers(1, 9), st.integers(0, 9))
def test_the_newest_common_version_is_agreed_on(low: int, more: int) -> None:
    high = low + more
    common = set(range(low, high + 1)) & set(range(frames.MIN_VERSION, frames.VERSION + 1))
    if common:
        assert greeting.agree(low, high) == max(common)
    else:
        with pytest.raises(VersionError, match=f"{low} to {high}"):
            greeting.agree(low, high)


def test_an_older_peer_without_a_range_speaks_one_version() -> None:
    old = {key: value for key, value in HELLO.to_dict().items() if key != "v_min"}
    assert greeting.decode_hello({**old, "v": 1}).version == 1


def test_only_a_newer_peer_may_say_more_than_is_known() -> None:
    """Also within its volumes; what it says must be right all the same, and the rest is dropped."""
    volume = {**HELLO.to_dict()["volumes"][0], "later": 1}
    more = {**HELLO.to_dict(), "later": {"a": 1}, "volumes": [volume]}
    with pytest.raises(HelloError, match="unknown field"):
        greeting.decode_hello(more)
    newer = greeting.decode_hello({**more, "v": frames.VERSION + 1})
    assert newer.version == frames.VERSION and newer.volumes == HELLO.volumes
    with pytest.raises(HelloError, match="host"):
        greeting.decode_hello({**more, "v": frames.VERSION + 1, "host": 5})


def test_streams_and_joining_are_for_those_who_know_them() -> None:
    """Version 2 has neither: nothing is said of them to such a peer, and it cannot join."""
    joining = Hello(**{**vars(HELLO), "streams": 4, "join": greeting.Join(7, "9" * 32)})
    assert greeting.decode_hello(greeting.encode(joining)) == joining
    with pytest.raises(HelloError, match="join"):
        greeting.decode_hello({**joining.to_dict(), "v": 2, "v_min": 1})
    granted = greeting.Welcome(**{**vars(WELCOME), "streams": 4})
    assert greeting.decode_welcome(greeting.encode(granted)).streams == 4
    assert "streams" not in greeting.Welcome(**{**vars(WELCOME), "v": 2}).to_dict()
    assert "compression" not in greeting.Welcome(**{**vars(WELCOME), "v": 1}).to_dict()


def test_a_peer_that_says_nothing_of_a_hash_compares_by_blake2b() -> None:
    """As every peer before version 3; and to such a sender the receiver says nothing of it either."""
    old = {key: value for key, value in HELLO.to_dict().items() if key != "hash"}
    assert greeting.decode_hello({**old, "v": 2, "v_min": 1}).hash == "blake2b"
    for version in range(frames.MIN_VERSION, frames.VERSION + 1):
        said = dataclasses.replace(WELCOME, v=version, hash="sha256" if version >= 3 else "blake2b")
        assert ("hash" in said.to_dict()) == (version >= 3)
        assert greeting.decode_welcome(greeting.encode(said)) == said
