# SPDX-License-Identifier: GPL-3.0-or-later
"""The common ground keeps its promises: durable replaces, honest errors, exact framing, strict configuration."""

from __future__ import annotations

import os
import selectors
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bmigrate.common import atomic, blockdev, config, errors, faults, ranges, rpc, state


def good_config() -> dict[str, Any]:
    return {
        "workload": "pg",
        "host": "alpha",
        "hosts": {"alpha": {"address": "10.77.0.1"}, "beta": {"address": "10.77.0.2"}},
        "volumes": [{"name": "data", "devices": {"alpha": "/dev/vda", "beta": "/dev/vdb"}}],
        "mounts": [{"volume": "data", "path": "/srv/pg", "fstype": "ext4"}],
        "services": ["postgresql@15-main.service"],
    }


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"volumes": "nope"}, "volumes"),
        ({"host": "gamma"}, "host"),
        ({"granule": 5000}, "granule"),
        ({"limits": {"max_drain_seconds": "soon"}}, "limits.max_drain_seconds"),
        ({"limits": {"max_downtime_seconds": 60, "restart_seconds": 60}}, "limits.restart_seconds"),
        ({"mounts": [{"volume": "other", "path": "/srv", "fstype": "ext4"}]}, "mounts.0.volume"),
        ({"surprise": 1}, "surprise"),
        ({"volumes": [{"name": "data", "devices": {"alpha": "/dev/vda"}}]}, "volumes.0.devices"),
    ],
)
def test_a_wrong_configuration_is_refused_by_the_name_of_its_key(change: dict[str, Any], key: str) -> None:
    data = {**good_config(), **change}
    with pytest.raises(errors.UsageError) as caught:
        config.validate(data, "pg.yml")
    assert key in caught.value.message
    assert "pg.yml" in caught.value.message


@pytest.mark.parametrize("change", [{"address": "10.0.0.9"}, {"on_silent_peer": "wait"}])
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(errors.RefusedError) as caught:
        config.validate({**good_config(), **change}, "pg.yml")
    assert caught.value.reason == "not_supported"
    assert next(iter(change)) in caught.value.message


def test_a_good_configuration_names_the_peer_and_the_devices() -> None:
    config.validate(good_config(), "pg.yml")
    parsed = config.parse(good_config())
    assert parsed.peer.name == "beta"
    assert parsed.device("data") == "/dev/vda"
    with pytest.raises(errors.UsageError):
        parsed.device("other")


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        ({}, 80.0),
        ({"max_downtime_seconds": 30}, 20.0),
        ({"max_downtime_seconds": 30, "restart_seconds": 5}, 25.0),
    ],
)
def test_the_dead_man_fires_so_early_that_the_restart_fits_in(limits: dict[str, int], seconds: float) -> None:
    config.validate({**good_config(), "limits": limits}, "pg.yml")
    assert config.parse({**good_config(), "limits": limits}).limits.dead_man_seconds == pytest.approx(seconds)


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers()), max_size=5), st.integers(1, 7))
def test_messages_survive_any_cut_of_the_stream(messages: list[dict[str, int]], step: int) -> None:
    data = b"".join(rpc.encode(message) for message in messages)
    decoder, got = rpc.Decoder(), []
    for start in range(0, len(data), step):
        got += decoder.feed(data[start : start + step])
    assert got == messages


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{]", b"\x02\x00\x00\x00[]"])
def test_garbage_on_a_socket_is_a_usage_error(data: bytes) -> None:
    with pytest.raises(errors.UsageError):
        rpc.Decoder().feed(data)


def test_a_message_of_brackets_is_refused_and_ends_no_daemon() -> None:
    body = b"[" * 200_000
    with pytest.raises(errors.UsageError) as refused:
        rpc.Decoder().feed(len(body).to_bytes(4, "little") + body)
    assert refused.value.reason == "bad_message"


def test_an_error_crosses_the_socket_unchanged(tmp_path: Path) -> None:
    selector = selectors.DefaultSelector()

    def handler(connection: rpc.Connection, request: dict[str, Any]) -> dict[str, Any]:
        assert connection.peer_pid == os.getpid()
        if request["op"] == "fail":
            raise errors.RefusedError("no", volume="v", host="h", hint="do", reason="because")
        return {"twice": request["n"] * 2}

    server = rpc.Server(tmp_path / "x.sock", handler, selector)
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            for key, mask in selector.select(0.05):
                key.data(mask)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        with rpc.Client(tmp_path / "x.sock", 5) as client:
            assert client.call("double", n=21)["twice"] == 42
            with pytest.raises(errors.RefusedError) as caught:
                client.call("fail")
            assert caught.value.to_dict() == {
                "code": "refused",
                "reason": "because",
                "message": "no",
                "volume": "v",
                "host": "h",
                "hint": "do",
            }
    finally:
        stop.set()
        thread.join()
        server.close()
    assert (tmp_path / "x.sock").exists() is False


def test_replace_leaves_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    atomic.replace_json(path, {"n": 1})

    def broken(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="No space"):
        atomic.replace_json(path, {"n": 2})
    assert atomic.read_json(path) == {"n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_damaged_state_file_is_a_defect_and_not_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(errors.DefectError):
        atomic.read_json(tmp_path / "state.json", default={})


def test_the_lock_names_its_owner(tmp_path: Path) -> None:
    with atomic.Lock(tmp_path / "lock"), pytest.raises(errors.RefusedError) as caught:
        atomic.Lock(tmp_path / "lock", wait_seconds=0.0).__enter__()
    assert str(os.getpid()) in caught.value.message
    assert caught.value.reason == "busy"


def test_state_is_saved_only_when_the_block_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BMIGRATE_STATE", str(tmp_path))
    with pytest.raises(errors.RefusedError), state.locked("pg"):
        pass
    with state.locked("pg", host="alpha") as item:
        item.role = "primary"
    with pytest.raises(KeyError), state.locked("pg") as item:
        item.role = "standby"
        raise KeyError("x")
    loaded = state.load("pg")
    assert loaded is not None
    assert loaded.role == "primary"


def test_fault_points_are_off_until_they_are_named() -> None:
    assert faults.point("a.b") is None
    faults.configure("a.b=error:5@2")
    try:
        assert faults.point("a.b") is None
        with pytest.raises(OSError, match="injected"):
            faults.point("a.b")
        assert faults.point("a.b") is None
    finally:
        faults.configure("")


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12))
def test_merged_ranges_cover_the_same_bytes_once(items: list[tuple[int, int]]) -> None:
    merged = ranges.merge(items)
    wanted = {byte for offset, length in items for byte in range(offset, offset + length)}
    got = [byte for offset, length in merged for byte in range(offset, offset + length)]
    assert len(got) == len(set(got))
    assert set(got) == wanted
    assert all(first[0] + first[1] < second[0] for first, second in zip(merged, merged[1:]))


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12)


def _bytes_of(items: list[tuple[int, int]]) -> list[int]:
    return [byte for offset, length in items for byte in range(offset, offset + length)]


@given(RANGES, RANGES, st.sampled_from([1, 4, 7]))
def test_ranges_are_cut_like_sets(left: list[tuple[int, int]], right: list[tuple[int, int]], unit: int) -> None:
    """Intersection, difference and widening, byte for byte; nothing comes out empty, or twice."""
    left, right = ranges.merge(left), ranges.merge(right)
    inside, outside = ranges.intersect(left, right), ranges.subtract(left, right)
    assert all(length > 0 for _, length in inside + outside)
    assert sorted(_bytes_of(inside) + _bytes_of(outside)) == _bytes_of(left)
    assert set(_bytes_of(inside)) == set(_bytes_of(left)) & set(_bytes_of(right))
    wide = ranges.widen(left, unit)
    assert {byte // unit for byte in _bytes_of(wide)} == {byte // unit for byte in _bytes_of(left)}
    assert all(offset % unit == 0 and length % unit == 0 for offset, length in wide)


def test_a_flush_is_no_write_and_a_sector_is() -> None:
    before = blockdev.WriteCounters(5, 80, 1, 8, True)
    assert blockdev.WriteCounters(6, 80, 1, 8, True).same_content(before)
    assert not blockdev.WriteCounters(6, 81, 1, 8, True).same_content(before)
    assert not blockdev.WriteCounters(5, 80, 2, 16, True).same_content(before)
    assert blockdev.WriteCounters(3, 0, 0, 0, True).untouched
    assert not blockdev.WriteCounters(0, 0, 0, 0, False).untouched
