# SPDX-License-Identifier: GPL-3.0-or-later
"""The real daemon as a process: killed at every place where a write could be lost, and nothing is.

A writer changes a device and its completions are recorded; a shipper claims, reads, "sends" and
acknowledges; the daemon dies again and again. At the end the replica equals the device.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bmigrate.common.errors import BmigrateError, RefusedError, SuspectError, UnreachableError
from bmigrate.kernel import abi
from tests.unit.breqd_harness import GRANULE, Host
from tests.unit.standby_host import wait

SIZES = {"a": 20000 * GRANULE - 512, "b": 3000 * GRANULE}


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A primary with two volumes."""
    item = Host(tmp_path, SIZES)
    yield item
    item.close()


class Replication:
    """Device and replica as content numbers by block, a writer thread, and a shipper.

    The volumes are large and few records wait at a time: a block whose record was lost is hardly
    ever written again soon enough to hide the loss.
    """

    def __init__(self, host: Host, seed: int) -> None:
        self.host, self.random = host, random.Random(seed)
        self.lock = threading.Lock()
        self.device: dict[tuple[str, int], int] = {}
        self.replica: dict[tuple[str, int], int] = {}
        self.content = self.epoch = self.redirtied = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread()

    def start_writer(self) -> None:
        """Write until ``stop_writer``."""
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self._write, args=(random.Random(self.random.random()),), daemon=True)
        self.thread.start()

    def stop_writer(self) -> None:
        """No write after this."""
        self.stopping.set()
        self.thread.join()

    def _write(self, rng: random.Random) -> None:
        slots = {name: self.host.slot(name) for name in SIZES}
        while not self.stopping.is_set():
            name = rng.choice(sorted(SIZES))
            blocks = -(-SIZES[name] // GRANULE)
            # Near the start half of the time: such blocks are written while they are claimed.
            start = rng.randrange(blocks if rng.random() < 0.5 else 20)
            count = min(rng.choice([1, 1, 1, 2, 30]), blocks - start)
            with self.lock:
                self.content += 1
                for block in range(start, start + count):
                    self.device[name, block] = self.content
            # The record is made at completion: after the content is on the device.
            self.host.kernel.write(slots[name], 2048 + start * 8, count * 8)
            while len(self.host.kernel.log) > 60 and not self.stopping.is_set():
                time.sleep(0.001)

    def drain(self) -> None:
        """Ship until nothing is left; barriers before and after agree; then device and replica are equal."""
        before = self.host.call("barrier", workload="w", drain="run")["total_records"]
        while not self.ship(10000):
            pass
        assert self.host.call("barrier", workload="w", drain="run")["total_records"] == before
        for name in SIZES:
            status = self.host.volume(name)
            assert (status["dirty_bytes"], status["claimed_bytes"]) == (0, 0)
        differs = sorted(key for key, content in self.device.items() if self.replica.get(key) != content)
        assert differs == [], "these blocks differ, and no map says so"

    def ship(self, limit: int) -> bool:
        """One session: fence, claim and acknowledge up to ``limit`` claims; True when nothing was left."""
        with self.host.client() as client:
            self.epoch += 1
            client.call("fence", workload="w", epoch=self.epoch, fence_id=str(self.epoch))
            idle = 0
            for _ in range(limit):
                name = self.random.choice(sorted(SIZES))
                size = self.random.choice([1, 20, 2000]) * GRANULE
                taken = client.call(
                    "claim", workload="w", volume=name, epoch=self.epoch, max_bytes=size, from_offset_bytes=0
                )
                if taken["claim"] is None:
                    idle += 1
                    if idle > 20:
                        return True
                    continue
                idle = 0
                with self.lock:
                    for offset, length in taken["extents"]:
                        assert offset + length <= SIZES[name]
                        for block in range(offset // GRANULE, -(-(offset + length) // GRANULE)):
                            self.replica[name, block] = self.device.get((name, block), 0)
                answer = client.call("ack", workload="w", volume=name, claim=taken["claim"])
                self.redirtied += answer.get("redirtied_bytes", 0)
            return False


FAULTS = ["breqd.batch", "breqd.marked", "breqd.consumed", "breqd.claimed", "breqd.acknowledged", "breqd.fenced"]


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_anywhere_nothing_is_lost(host: Host, fault: str) -> None:
    host.start()
    for name in SIZES:
        assert host.call("attach", workload="w", volume=name, mode="seed")["suspect"] is None
    seeds = {name: host.volume(name)["seed_count"] for name in SIZES}
    world = Replication(host, FAULTS.index(fault))
    while not world.ship(10000):
        pass
    for _ in range(2):
        host.kill()
        host.start(f"{fault}=kill@{world.random.randint(2, 6)}")
        world.start_writer()
        deadline = time.monotonic() + 60
        with pytest.raises(UnreachableError):
            while True:
                world.ship(30)
                assert time.monotonic() < deadline, "the fault point was not reached"
        assert host.process is not None
        host.process.wait(10)
        world.stop_writer()
        host.start()
        for name in SIZES:
            status = host.volume(name)
            assert status["suspect"] is None, "a killed daemon is not a reason to compare everything"
            assert status["seed_count"] == seeds[name], "a full copy would hide what was lost"
        world.drain()
    if fault in ("breqd.batch", "breqd.marked"):
        assert host.kernel.handed_again > 0, "no batch was given out again, so nothing was tested"


def test_killed_while_a_volume_is_taken_over(host: Host) -> None:
    """The kernel has an attachment that the dead daemon did not note: it is not believed, and the next one takes it."""
    host.start("breqd.attached=kill@1")
    with pytest.raises(UnreachableError):
        host.call("attach", workload="w", volume="a", mode="seed")
    assert host.process is not None
    assert host.process.wait(10) == -9
    (left,) = [entry["attachment_id"] for entry in host.kernel.entries.values()]
    host.start()
    assert host.call("attach", workload="w", volume="a", mode="seed")["changed"]
    status = host.volume("a")
    assert status["attached"] and status["dirty_bytes"] == SIZES["a"], "a seed is a seed, also the second time"
    disk = str(host.devices["a"])
    live = [entry for entry in host.kernel.entries.values() if entry["disk"] == disk and not entry["draining"]]
    assert [f"{entry['attachment_id']:016x}" for entry in live] == [status["attachment_id"]]
    assert live[0]["attachment_id"] != left, "an attachment was believed that nobody had noted"


def test_claims_need_a_fence_also_after_a_restart(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")

    def claim(epoch: int) -> dict[str, object]:
        return host.call("claim", workload="w", volume="a", epoch=epoch, max_bytes=GRANULE, from_offset_bytes=0)

    with pytest.raises(RefusedError) as refused:
        claim(1)
    assert refused.value.reason == "not_fenced"
    host.call("fence", workload="w", epoch=5, fence_id="x")
    taken = claim(5)
    with pytest.raises(RefusedError) as refused:
        claim(4)
    assert refused.value.reason == "stale_epoch"
    host.kill()
    host.start()
    with pytest.raises(RefusedError) as refused:
        claim(5)
    assert refused.value.reason == "not_fenced"
    assert host.call("ack", workload="w", volume="a", claim=taken["claim"])["ignored"]
    assert host.volume("a")["dirty_bytes"] == SIZES["a"], "what was claimed is dirty again after a restart"
    with pytest.raises(RefusedError) as refused:
        host.call("fence", workload="w", epoch=5, fence_id="y")
    assert refused.value.reason == "stale_epoch"
    host.call("fence", workload="w", epoch=6, fence_id="y")
    assert claim(6)["claim"] is not None


def test_the_map_is_told_and_nonsense_refused(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    told = host.call("map", workload="w", volume="a", cells=16)
    assert sum(told["dirty"]) == -(-SIZES["a"] // GRANULE) and sum(told["claimed"]) == 0
    assert told["size_bytes"] == SIZES["a"] and 1 <= len(told["dirty"]) <= 16
    for cells in (0, -1, 5000):
        with pytest.raises(BmigrateError) as refused:
            host.call("map", workload="w", volume="a", cells=cells)
        assert refused.value.reason == "bad_request"


def test_an_acknowledgement_of_an_earlier_daemon_clears_nothing(host: Host) -> None:
    """Seeding lets epochs begin again, and each daemon counts claims from 1: only the incarnation tells them apart."""
    claims = []
    for _ in range(2):
        host.start()
        for name in SIZES:
            host.call("attach", workload="w", volume=name, mode="seed")
        host.call("fence", workload="w", epoch=1, fence_id="x")
        taken = host.call("claim", workload="w", volume="a", epoch=1, max_bytes=GRANULE, from_offset_bytes=0)
        claims.append(taken["claim"])
        if len(claims) == 1:
            host.kill()
    old, new = claims
    assert (old["epoch"], old["n"]) == (new["epoch"], new["n"]) and old != new
    assert host.call("ack", workload="w", volume="a", claim=old)["ignored"]
    assert host.volume("a")["claimed_bytes"] == GRANULE
    assert "ignored" not in host.call("ack", workload="w", volume="a", claim=new)
    assert host.volume("a")["claimed_bytes"] == 0


def test_an_ended_session_keeps_its_claims_until_the_next_fence(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.call("fence", workload="w", epoch=1, fence_id="x")
    taken = host.call("claim", workload="w", volume="a", epoch=1, max_bytes=8 * GRANULE, from_offset_bytes=0)
    host.call("end_session", workload="w", epoch=1)
    assert host.call("ack", workload="w", volume="a", claim=taken["claim"])["ignored"]
    assert host.volume("a")["claimed_bytes"] == 8 * GRANULE, "an old receiver may still write these blocks"
    host.call("fence", workload="w", epoch=2, fence_id="y")
    assert (host.volume("a")["claimed_bytes"], host.volume("a")["dirty_bytes"]) == (0, SIZES["a"])


def test_a_drain_offers_failed_writes_once_and_keeps_them(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.call("fence", workload="w", epoch=1, fence_id="x")

    def ship_all() -> None:
        taken = True
        while taken:
            answer = host.call("claim", workload="w", volume="a", epoch=1, max_bytes=1 << 30, from_offset_bytes=0)
            taken = answer.get("claim") is not None
            if taken:
                host.call("ack", workload="w", volume="a", claim=answer["claim"])

    def left() -> tuple[int, int]:
        status = host.volume("a")
        return status["dirty_bytes"], status["failed_bytes"]

    ship_all()
    host.kernel.write(host.slot("a"), 2048 + 8 * 5, 8, abi.FLAG_FAILED)
    for run in ("first", "second"):
        host.call("barrier", workload="w", drain=run)
        assert left() == (GRANULE, GRANULE), "an aborted command may have landed since: it is shipped again"
        ship_all()
        host.call("barrier", workload="w", drain=run)
        assert left() == (0, GRANULE), "one drain offers it once, or it would never end"
    # the second drain was given up, and the workload goes on
    host.call("barrier", workload="w")
    assert left() == (GRANULE, GRANULE)


def test_a_crash_of_the_host_makes_the_volume_suspect_and_a_resync_ends_that(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.power_cycle()
    host.start()
    status = host.volume("a")
    assert status["attached"] and "not closed in good order" in status["suspect"]
    host.kill()
    host.start()
    assert "not closed in good order" in host.volume("a")["suspect"], "a suspicion survives the daemon"
    resync = host.call("resync_begin", workload="w", volume="a")["resync_id"]
    host.call("mark", workload="w", volume="a", extents=[[GRANULE, 10]], reason="resync")
    host.call("suspect", workload="w", volume="a", reason="something new")
    with pytest.raises(RefusedError) as refused:
        host.call("resync_end", workload="w", volume="a", resync_id=resync)
    assert refused.value.reason == "new_suspicion"
    resync = host.call("resync_begin", workload="w", volume="a")["resync_id"]
    host.call("resync_end", workload="w", volume="a", resync_id=resync)
    status = host.volume("a")
    assert status["suspect"] is None and status["resync_count"] == 1
    host.kill()
    host.start()
    assert host.volume("a")["suspect"] is None


def test_a_resync_goes_on_only_while_nothing_came_up(host: Host) -> None:
    """By its id, in the same daemon, and not after another suspicion."""
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")

    def begin(resume: object = None) -> tuple[object, bool]:
        answer = host.call("resync_begin", workload="w", volume="a", resume=resume)
        return answer["resync_id"], answer["resumed"]

    host.call("suspect", workload="w", volume="a", reason="one")
    first, resumed = begin()
    assert not resumed and begin(first) == (first, True)
    assert not begin("0" * 16)[1], "an id that was never given"
    second, _ = begin()
    assert begin(second) == (second, True) and not begin(first)[1], "an older resync of the same daemon"
    third, _ = begin()
    host.call("suspect", workload="w", volume="a", reason="another")
    assert not begin(third)[1], "a suspicion came up since"
    fourth, _ = begin()
    host.call("resync_end", workload="w", volume="a", resync_id=fourth)
    assert not begin(fourth)[1], "it was finished; a shipper that was killed then still has the id on file"
    fifth, _ = begin()
    host.kill()
    host.start()
    assert not begin(fifth)[1], "another daemon"


def test_the_module_lost_its_attachment_within_a_boot(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.kill()
    with host.kernel.lock:
        host.kernel.entries.clear()
    host.start()
    assert "lost or replaced in this boot" in host.volume("a")["suspect"]


def test_an_attachment_that_vanishes_under_the_daemon_is_noticed(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    with host.kernel.lock:
        host.kernel.entries[host.slot("a")]["gone"] = True
    deadline = time.monotonic() + 20
    while not (host.volume("a")["suspect"] or ""):
        assert time.monotonic() < deadline, "a removed disk went unnoticed"
        time.sleep(0.1)
    assert "removed" in host.volume("a")["suspect"]


def test_what_nobody_owns_is_detached_before_a_record_is_read(host: Host) -> None:
    with host.kernel.lock:
        host.kernel.do_attach(None, "stranger", 800, 999, 65536)
    host.set_role("standby")
    host.start()
    assert all(entry["draining"] for entry in host.kernel.entries.values())


def test_a_standby_is_not_attached(host: Host) -> None:
    host.set_role("standby")
    host.start()
    assert not host.volume("a")["attached"] and host.volume("a")["suspect"] is None
    assert not host.kernel.entries


def test_a_target_being_promoted_is_left_to_the_handover(host: Host) -> None:
    host.set_role("primary", {"side": "target", "phase": "promoting"})
    host.start()
    assert not host.kernel.entries
    with pytest.raises(BmigrateError):
        host.call("attach", workload="w", volume="a", mode="promote")
    assert not host.kernel.entries, "nothing is attached unless hold owns the device"


def test_without_the_module_it_stays_up_and_says_so(host: Host) -> None:
    host.kernel.loaded = False
    host.start()
    status = host.call("status")
    assert status["kernel_problem"]["reason"] == "not_loaded"
    assert "not tracked" in host.volume("a")["suspect"]
    with pytest.raises(RefusedError) as refused:
        host.call("attach", workload="w", volume="a", mode="resume")
    assert refused.value.reason == "not_loaded"
    host.kernel.loaded = True
    deadline = time.monotonic() + 30
    while not host.volume("a")["attached"]:
        assert time.monotonic() < deadline, "the module came, and breqd did not take it"
        time.sleep(0.1)


def test_sigterm_detaches_nothing_and_writes_no_flag(host: Host) -> None:
    import signal

    host.start()
    identifier = host.call("attach", workload="w", volume="a", mode="seed")["attachment"]
    host.kill(signal.SIGTERM)
    assert host.process is not None and host.process.returncode == 0
    assert not host.kernel.entries[host.slot("a")]["draining"]
    assert not (host.root / "state" / "w" / "a.clean").exists()
    host.start()
    assert host.volume("a")["attachment_id"] == identifier and host.volume("a")["suspect"] is None


def test_a_detach_keeps_the_records_on_their_way(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="b", mode="seed")
    slot = host.slot("b")
    before = host.volume("b")["total_records"]
    for block in range(50):
        host.kernel.write(slot, 2048 + block * 8, 8)
    assert host.call("detach", workload="w", volume="b")["detached"]
    assert slot not in host.kernel.entries or host.kernel.entries[slot]["draining"]
    assert before == 0 and not host.volume("b")["attached"]
    assert host.call("detach", workload="w", volume="b")["detached"] is False


def test_a_seed_that_fails_leaves_the_tracking_as_it_was(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.kill()
    host.start("breqd.bitmap_rename=error:28")
    identifier = host.volume("a")["attachment_id"]
    with pytest.raises(BmigrateError):
        host.call("attach", workload="w", volume="a", mode="seed")
    status = host.volume("a")
    assert status["attached"] and status["attachment_id"] == identifier and status["suspect"] is None


def test_a_device_path_that_is_gone_for_a_while_does_not_end_the_tracking(host: Host) -> None:
    """udev takes links away and brings them back; the kernel holds the disk itself."""
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    identifier = host.volume("a")["attachment_id"]
    host.kill()
    away = host.devices["a"].rename(host.root / "away")
    host.start()
    status = host.volume("a")
    assert status["attachment_id"] == identifier and status["suspect"] is None
    away.rename(host.devices["a"])


def test_bad_requests_are_answered_and_do_no_harm(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.call("fence", workload="w", epoch=1, fence_id="x")
    good = {"workload": "w", "volume": "a"}
    bad: list[tuple[str, dict[str, Any]]] = [
        ("nonsense", good),
        ("attach", {}),
        ("attach", {**good, "mode": "maybe"}),
        ("attach", {"workload": "../w", "volume": "a"}),
        ("attach", {"workload": "w", "volume": "c"}),
        ("claim", {**good, "epoch": "one", "max_bytes": 1}),
        ("ack", {**good, "claim": 7}),
        ("ack", {**good, "claim": {}}),
        ("mark", {**good, "extents": [[1 << 80, 1]], "reason": "x"}),
        ("mark", {**good, "extents": [[-1, 1]], "reason": "x"}),
        ("mark", {**good, "extents": "abc", "reason": "x"}),
        ("barrier", {"workload": "nobody"}),
        ("resync_end", {**good, "resync_id": "x"}),
        ("suspect", {"workload": "w", "volume": "c", "reason": "x"}),
        ("fence", {"workload": "w", "epoch": 1, "fence_id": "again"}),
    ]
    pid = host.process and host.process.pid
    for op, fields in bad:
        with pytest.raises(BmigrateError) as refused:
            host.call(op, **fields)
        assert refused.value.code in ("usage", "refused"), (op, fields, refused.value)
    assert host.process is not None and host.process.poll() is None and host.process.pid == pid
    status = host.volume("a")
    assert status["dirty_bytes"] == SIZES["a"] and status["suspect"] is None


# --- the self test -------------------------------------------------------------------------------


def counted(host: Host, sectors: int) -> None:
    """What the kernel counts for the device of volume a from now on."""
    host.facts["counters"]["sectors_written"] = sectors
    host.save_facts()


def self_test(host: Host) -> Any:
    """One look at volume a."""
    return host.call("self_test", workload="w", volume="a")


def test_a_tracker_that_sees_is_proven(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    self_test(host)
    self_test(host)
    host.kernel.write(host.slot("a"), 2048, 8)
    counted(host, 8)
    assert self_test(host)["state"] == "proven"
    assert host.volume("a")["self_test"]["proven_sectors"] == 8 and host.volume("a")["suspect"] is None


def test_a_blind_tracker_says_so_and_is_never_in_step(host: Host) -> None:
    """Suspect at once and for good: a comparison cannot clear it, a drain is refused, a restart finds it again."""
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    begun = host.call("resync_begin", workload="w", volume="a")["resync_id"]
    host.kernel.sleeps = True
    states = []
    for number in range(6):
        counted(host, 8 * number)
        states.append(self_test(host)["state"])
    assert states[-1] == "blind" and "doubtful" in states
    assert "the tracker is blind" in host.volume("a")["suspect"]
    with pytest.raises(RefusedError) as refused:
        host.call("resync_end", workload="w", volume="a", resync_id=begun)
    assert refused.value.reason == "new_suspicion"
    for _ in range(2):
        for op, fields in (("resync_begin", {"volume": "a"}), ("barrier", {"drain": "d1"})):
            with pytest.raises(SuspectError) as blind:
                host.call(op, workload="w", **fields)
            assert blind.value.reason == "blind"
        assert host.volume("a")["self_test"]["state"] == "blind"
        assert "the tracker is blind" in host.volume("a")["suspect"]
        host.kill()
        host.start()
    host.kernel.sleeps = False
    host.call("attach", workload="w", volume="a", mode="seed")
    assert host.volume("a")["self_test"]["state"] == "blind", "it is the attachment that was blind still"
    host.call("detach", workload="w", volume="a")
    host.call("attach", workload="w", volume="a", mode="resume")
    assert host.volume("a")["self_test"]["state"] == "unproven"
    host.call("resync_begin", workload="w", volume="a")


def test_a_configuration_without_a_device_for_this_host_ends_nothing(host: Host) -> None:
    """Edited by hand and read again: it cannot be used, and what is tracked goes on."""
    host.start()
    before = host.volume("a")
    config = host.root / "etc" / "w.yml"
    config.write_text(config.read_text().replace("{a: " + str(host.devices["a"]) + ", ", "{"))
    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    wait(lambda: "cannot be used" in Path(str(host.log.name)).read_text(), "the complaint")
    after = host.volume("a")
    assert (after["attachment_id"], after["attached"]) == (before["attachment_id"], True)


def test_another_path_of_the_same_device_is_the_one_that_counts(host: Host) -> None:
    """The configuration names the device otherwise: nothing begins anew, and the old name is nobody's."""
    host.start()
    before = host.volume("a")
    old, new = host.devices["a"], host.devices["a"].with_name("renamed.img")
    config = host.root / "etc" / "w.yml"
    old.rename(new)
    config.write_text(config.read_text().replace(str(old), str(new)))
    assert host.process is not None
    host.process.send_signal(signal.SIGHUP)
    wait(lambda: host.volume("a")["device"] == str(new), "the other path")
    old.write_bytes(bytes(new.stat().st_size))
    self_test(host)
    after = host.volume("a")
    assert (after["attachment_id"], after["suspect"]) == (before["attachment_id"], before["suspect"])


def test_a_path_that_has_become_another_devices_is_noticed(host: Host) -> None:
    """A link under /dev/disk moved on: whoever opens it now writes where nobody records."""
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.call("fence", workload="w", epoch=1, fence_id="x")
    before = host.volume("a")
    device = host.devices["a"]
    others = [device.with_name(f"other{number}.img") for number in range(2)]
    for path in others:
        path.write_bytes(bytes(device.stat().st_size))
    # The harness makes a device's number of the last digits of the inode's.
    other = next(path for path in others if (path.stat().st_ino - device.stat().st_ino) % 1000)
    device.rename(device.with_name("old.img"))
    self_test(host)  # nowhere for a moment: udev makes links anew
    assert host.volume("a")["suspect"] is None and host.volume("a")["attached"]
    other.rename(device)
    with pytest.raises(SuspectError) as lost:
        host.call("barrier", workload="w", drain="d1")
    assert lost.value.reason == "lost"
    assert "leads to device" in host.volume("a")["suspect"]
    wait(lambda: host.volume("a")["attached"], "the other device to be tracked")
    after = host.volume("a")
    assert after["attachment_id"] != before["attachment_id"] and after["suspect"]
    with pytest.raises(RefusedError) as claim:
        host.call("claim", workload="w", volume="a", epoch=1, max_bytes=1 << 20, from_offset_bytes=0)
    assert claim.value.reason == "not_fenced"


def _blind_on_a_full_disk(host: Host, room_after: int) -> None:
    """The self test finds the tracker blind while that many attempts to write a record fail."""
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.kill()
    own = len(SIZES)  # each volume is taken over, and that is written
    host.start(",".join(f"breqd.track_replace=error:28@{own + number}" for number in range(1, room_after + 1)))
    host.kernel.sleeps = True
    for number in range(6):
        counted(host, 8 * number)
        self_test(host)
    assert "the tracker is blind" in host.volume("a")["suspect"]
    assert host.process is not None and host.process.poll() is None, "the daemon of all volumes ended"


def _suspect_on_disk(host: Host) -> bool:
    return json.loads((host.root / "state" / "w" / "a.track.json").read_text())["suspect"] is not None


def test_a_suspicion_that_the_disk_does_not_take_is_written_when_there_is_room(host: Host) -> None:
    _blind_on_a_full_disk(host, 4)
    note = host.root / "run" / "suspect" / "w" / "a"
    wait(lambda: _suspect_on_disk(host), "the suspicion to be on disk")
    wait(lambda: not note.exists(), "the end of its note")


def test_a_suspicion_that_the_disk_does_not_take_survives_the_daemon(host: Host) -> None:
    """The kernel's attachment does, and without the suspicion the next daemon would believe it."""
    _blind_on_a_full_disk(host, 300)
    assert not _suspect_on_disk(host)
    host.kill()
    host.start()
    assert "the tracker is blind" in host.volume("a")["suspect"] and _suspect_on_disk(host)
    assert host.volume("b")["suspect"] is None


def test_a_drain_is_refused_when_a_single_write_was_not_seen(host: Host) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    self_test(host)
    self_test(host)
    host.call("barrier", workload="w", drain="d1")
    host.kernel.sleeps = True
    host.kernel.write(host.slot("a"), 2048, 8)
    counted(host, 8)
    with pytest.raises(SuspectError):
        host.call("barrier", workload="w", drain="d2")
    assert "may be blind" in host.volume("a")["suspect"]


@pytest.mark.parametrize(
    ("facts", "words"),
    [({"sectors": 4096}, "was resized from"), ({"start": 4096}, "was moved from sector 2048 to 4096")],
)
def test_a_device_that_changes_its_place_or_size_is_suspect(host: Host, facts: dict[str, int], words: str) -> None:
    host.start()
    host.call("attach", workload="w", volume="a", mode="seed")
    host.facts.update(facts)
    host.save_facts()
    deadline = time.monotonic() + 60
    while words not in str(host.volume("a")["suspect"]):
        assert time.monotonic() < deadline, host.volume("a")
        time.sleep(0.05)


def test_what_a_dead_daemon_froze_is_thawed_also_without_the_module(host: Host) -> None:
    """No mount has this number, so all there is to do is to forget the note."""
    note = host.root / "run" / "frozen" / "999"
    note.parent.mkdir()
    note.touch()
    host.kernel.loaded = False
    host.start()
    assert host.call("status")["kernel_problem"] and not note.exists()
