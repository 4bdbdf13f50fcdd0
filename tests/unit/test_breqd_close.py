# SPDX-License-Identifier: GPL-3.0-or-later
"""The end of a boot and the start of a primary: the clean flag and promotion, with a hold of the test's own."""

from __future__ import annotations

import json
import selectors
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common import rpc
from bmigrate.common.errors import BmigrateError, RefusedError
from tests.unit.breqd_harness import GRANULE, Host
from tests.unit.standby_host import wait

SIZES = {"a": 512 * GRANULE, "b": 70 * GRANULE}


class Hold:
    """Answers ``status`` as hold does."""

    def __init__(self, path: Path) -> None:
        self.selector = selectors.DefaultSelector()
        self.held, self.suspect = True, None
        self.server = rpc.Server(path, self.answer, self.selector)
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def answer(self, _connection: rpc.Connection, request: dict[str, Any]) -> dict[str, Any]:
        """status {workload}."""
        volumes = [
            {"workload": request["workload"], "volume": name, "held": self.held, "suspect": self.suspect}
            for name in SIZES
        ]
        return {"volumes": volumes}

    def run(self) -> None:
        """Serve."""
        while not self.stopping.is_set():
            for key, mask in self.selector.select(0.05):
                key.data(mask)

    def close(self) -> None:
        """Stop; once is enough."""
        if self.stopping.is_set():
            return
        self.stopping.set()
        self.thread.join()
        self.server.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A primary with two seeded volumes."""
    item = Host(tmp_path, SIZES)
    item.start()
    for name in SIZES:
        item.call("attach", workload="w", volume=name, mode="seed")
    yield item
    item.close()


@pytest.fixture
def hold(host: Host) -> Iterator[Hold]:
    """Holds both devices."""
    item = Hold(host.root / "run" / "hold.sock")
    yield item
    item.close()


def ship_all(host: Host, epoch: int) -> None:
    """Acknowledge everything."""
    host.call("fence", workload="w", epoch=epoch, fence_id="x")
    for name in SIZES:
        while True:
            taken = host.call("claim", workload="w", volume=name, epoch=epoch, max_bytes=1 << 30, from_offset_bytes=0)
            if taken["claim"] is None:
                break
            host.call("ack", workload="w", volume=name, claim=taken["claim"])


def flag_of(host: Host, name: str) -> Path:
    """Where the durable flag is."""
    return host.root / "state" / "w" / f"{name}.clean"


def boot_in_good_order(host: Host, **facts: Any) -> None:
    """Power cycle, then what the early unit does."""
    host.power_cycle(**facts)
    for name in SIZES:
        flag = flag_of(host, name)
        if flag.exists():
            token = host.root / "run" / "clean" / "w" / name
            token.parent.mkdir(parents=True, exist_ok=True)
            token.write_text(json.dumps({"boot_id": host.facts["boot_id"], "flag": json.loads(flag.read_text())}))
            flag.unlink()


def close_both(host: Host) -> None:
    """What the shutdown unit asks for."""
    for name in SIZES:
        assert host.call("clean_close", workload="w", volume=name)["clean"]


def test_a_reboot_in_good_order_keeps_the_marks_and_raises_no_suspicion(host: Host, hold: Hold) -> None:
    ship_all(host, 1)
    host.kernel.write(host.slot("a"), 2048 + 8 * 100, 8)
    close_both(host)
    assert all(entry["draining"] for entry in host.kernel.entries.values())
    hold.close()
    boot_in_good_order(host)
    host.start()
    for name, dirty in (("a", GRANULE), ("b", 0)):
        status = host.volume(name)
        assert status["suspect"] is None and status["attached"]
        assert status["dirty_bytes"] == dirty, "the block dirtied before the reboot is shipped after it, and no other"
    host.power_cycle()
    host.start()
    assert "not closed in good order" in host.volume("a")["suspect"], "a flag is believed once"


def test_a_closed_volume_is_not_attached_again_by_itself(host: Host, hold: Hold) -> None:
    close_both(host)
    assert host.call("status")["volumes"][0]["attached"] is False
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        assert not host.volume("a")["attached"], "attaching again would take the flag away"
        time.sleep(0.2)
    assert flag_of(host, "a").exists()


def test_nothing_is_closed_while_nobody_holds_the_device(host: Host, hold: Hold) -> None:
    hold.held = False
    with pytest.raises(RefusedError) as refused:
        host.call("clean_close", workload="w", volume="a")
    assert refused.value.reason == "not_held"
    assert host.volume("a")["attached"] and not flag_of(host, "a").exists()


@pytest.mark.parametrize("what", ["written", "uncounted", "serial", "content", "bitmap"])
def test_whatever_happened_between_the_boots_is_noticed(host: Host, hold: Hold, what: str) -> None:
    ship_all(host, 1)
    close_both(host)
    hold.close()
    facts: dict[str, Any] = {}
    counters: Any = host.facts["counters"]
    if what == "written":
        facts["counters"] = {**counters, "writes": 1, "sectors_written": 8}
    elif what == "uncounted":
        facts["counters"] = {**counters, "counted": False}
    elif what == "serial":
        facts["serial"] = "s2"
    elif what == "content":
        with open(host.devices["a"], "r+b") as stream:
            stream.write(b"x")
    else:
        with open(host.root / "state" / "w" / "a.bitmap", "r+b") as stream:
            stream.seek(4096)
            stream.write(b"\x01")
    boot_in_good_order(host, **facts)
    host.start()
    assert host.volume("a")["suspect"] is not None


def test_a_boot_without_breqd_loses_the_flag(host: Host, hold: Hold) -> None:
    close_both(host)
    hold.close()
    boot_in_good_order(host)
    host.power_cycle()
    host.start()
    assert host.volume("a")["suspect"] is not None


def test_a_flag_that_no_early_unit_moved_is_not_believed_and_removed(host: Host, hold: Hold) -> None:
    close_both(host)
    hold.close()
    host.power_cycle()
    host.start()
    assert host.volume("a")["suspect"] is not None
    assert not flag_of(host, "a").exists(), "the boot after this one must not believe it either"


def test_promotion_starts_with_nothing_marked_and_only_under_hold(host: Host, hold: Hold) -> None:
    host.call("suspect", workload="w", volume="a", reason="an old story")
    before = host.volume("a")["attachment_id"]
    hold.suspect = "written by others"  # type: ignore[assignment]
    with pytest.raises(BmigrateError, match="written by others"):
        host.call("attach", workload="w", volume="a", mode="promote")
    assert host.volume("a")["dirty_bytes"] == SIZES["a"], "a refused promotion changes nothing"
    hold.suspect = None
    answer = host.call("attach", workload="w", volume="a", mode="promote")
    status = host.volume("a")
    assert answer["suspect"] is None and status["suspect"] is None and status["dirty_bytes"] == 0
    assert status["attachment_id"] == before, "the kernel goes on recording without a gap"
    host.kernel.write(host.slot("a"), 2048, 8)
    host.call("barrier", workload="w")
    assert host.volume("a")["dirty_bytes"] == GRANULE
    host.kill()
    host.start()
    assert (host.volume("a")["suspect"], host.volume("a")["dirty_bytes"]) == (None, GRANULE)
    assert host.call("attach", workload="w", volume="a", mode="resume")["changed"] is False


def test_a_write_while_closing_withdraws_the_flag(host: Host, hold: Hold) -> None:
    """hold only promises that nobody opens the device exclusively; a raw writer gets through."""
    host.kill()
    host.start("breqd.clean_flag=delay:2")
    errors: list[BmigrateError] = []

    def close() -> None:
        try:
            host.call("clean_close", workload="w", volume="a")
        except BmigrateError as error:
            errors.append(error)

    thread = threading.Thread(target=close)
    thread.start()
    slot = host.slot("a")
    while thread.is_alive():
        host.kernel.write(slot, 2048, 8)
        thread.join(0.05)
    assert [error.reason for error in errors] == ["still_written"]
    assert not flag_of(host, "a").exists() and host.volume("a")["attached"]


@pytest.mark.parametrize("point", ["breqd.bitmap_sync", "breqd.clean_flag"])
def test_a_kill_in_a_close_leaves_no_flag(host: Host, hold: Hold, point: str) -> None:
    """And the next boot believes nothing."""
    host.kill()
    host.start(f"{point}=kill")
    with pytest.raises(BmigrateError):
        host.call("clean_close", workload="w", volume="a")
    assert not flag_of(host, "a").exists()
    host.power_cycle()
    host.start()
    assert host.volume("a")["suspect"] is not None and host.volume("b")["suspect"] is not None


def _full_from_now_on(host: Host, attempts: int) -> None:
    """The disk takes so many records no more, counted from the moment when each volume is taken over."""
    host.kill()
    numbers = range(len(SIZES) + 1, len(SIZES) + 1 + attempts)
    host.start(",".join(f"breqd.track_replace=error:28@{number}" for number in numbers))


def test_no_clean_flag_while_a_suspicion_is_not_on_disk(host: Host, hold: Hold) -> None:
    """The next boot would believe the flag and know nothing of the suspicion."""
    _full_from_now_on(host, 300)
    with pytest.raises(RefusedError) as refused:
        host.call("suspect", workload="w", volume="a", reason="the standby read back something else")
    assert refused.value.reason == "os_error", "it was answered as durable"
    assert "something else" in host.volume("a")["suspect"]
    with pytest.raises(RefusedError) as refused:
        host.call("clean_close", workload="w", volume="a")
    assert refused.value.reason == "not_durable"
    assert not flag_of(host, "a").exists() and host.volume("a")["attached"]
    hold.close()
    boot_in_good_order(host)
    host.start()
    assert host.volume("a")["suspect"] is not None


def test_a_close_whose_end_is_not_noted_leaves_no_flag(host: Host, hold: Hold) -> None:
    """The workload may be started again in this boot, and write what nobody records."""
    _full_from_now_on(host, 1)
    with pytest.raises(RefusedError):
        host.call("clean_close", workload="w", volume="a")
    assert not flag_of(host, "a").exists()
    wait(lambda: host.volume("a")["attached"], "the volume to be tracked again")
    assert host.volume("a")["suspect"] is not None
    assert any(
        entry["disk"] == str(host.devices["a"]) and not entry["draining"] for entry in host.kernel.entries.values()
    ), "it is called tracked, and nobody records it"
