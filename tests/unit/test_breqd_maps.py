# SPDX-License-Identifier: GPL-3.0-or-later
"""The maps keep the invariant: a block that differs from the replica is dirty, claimed, failed or in the log.

A state machine plays device, replica, log, shipper and restarts against the maps, and a model of
plain sets says what each map must hold after every step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bmigrate.breqd.maps import REGION_BYTES, Maps

GRANULE = 4096
SIZES = {("w", "a"): 2600 * 8 * GRANULE - 512, ("w", "b"): 13 * GRANULE + 512, ("x", "c"): 700 * GRANULE}
KEYS = sorted(SIZES)
Key = tuple[str, str]


def blocks_of(key: Key) -> int:
    """Granules of a volume."""
    return -(-SIZES[key] // GRANULE)


def unpacked(packed: Any, count: int) -> set[int]:
    """Positions set among the first ``count``; nothing may be set behind them."""
    found = {int(number) for number in np.flatnonzero(np.unpackbits(packed, bitorder="little"))}
    assert all(number < count for number in found), "a bit behind the end of the volume is set"
    return found


class World(RuleBasedStateMachine):
    """Device and replica are a content number per block; the log is what the kernel has recorded."""

    @initialize()
    def start(self) -> None:
        self.clock = 0.0
        self.files = {key: np.zeros(-(-blocks_of(key) // 8), dtype=np.uint8) for key in KEYS}
        self.failed_files = {key: np.zeros(-(-blocks_of(key) // 8), dtype=np.uint8) for key in KEYS}
        self.device: dict[Key, dict[int, int]] = {key: {} for key in KEYS}
        self.replica: dict[Key, dict[int, int]] = {key: {} for key in KEYS}
        self.log: list[tuple[Key, int, int, bool]] = []
        self.dirty: dict[Key, set[int]] = {key: set() for key in KEYS}
        self.claimed: dict[Key, set[int]] = {key: set() for key in KEYS}
        self.failed: dict[Key, set[int]] = {key: set() for key in KEYS}
        self.claims: dict[int, tuple[Key, dict[int, int]]] = {}
        # A block that is claimed and dirty again has two marks; the older one goes with the acknowledgement.
        self.dirty_at: dict[tuple[Key, int], float] = {}
        self.claimed_at: dict[tuple[Key, int], float] = {}
        self.content = 0
        self.boot()

    def boot(self) -> None:
        """A new daemon over the same files."""
        self.maps = Maps()
        for key in KEYS:
            self.add(key)

    def add(self, key: Key) -> None:
        """Take a volume in, as after a restart."""
        self.maps.add(key, SIZES[key], GRANULE, self.files[key], self.failed_files[key], self.clock)
        self.dirty[key] |= self.claimed[key] | self.failed[key]
        self.claimed[key] = set()
        self.claims = {number: item for number, item in self.claims.items() if item[0] != key}
        self.dirty_at.update({(key, block): self.clock for block in self.dirty[key]})

    @rule(key=st.sampled_from(KEYS), data=st.data(), fails=st.booleans())
    def write(self, key: Key, data: Any, fails: bool) -> None:
        """A write completes; its record goes to the log. One in a while fails, landing or not."""
        self.clock += 1
        count = blocks_of(key)
        start = data.draw(st.integers(0, count - 1))
        end = data.draw(st.integers(start + 1, min(count, start + 40)) | st.integers(start + 1, count))
        fails = fails and data.draw(st.integers(0, 3)) == 0
        self.content += 1
        for block in range(start, end):
            self.device[key][block] = self.content
        self.log.append((key, start, end, fails))

    def dirtied(self, key: Key, blocks: set[int]) -> None:
        """Marks are made, now; a block that is dirty already keeps its older one."""
        self.dirty_at.update({(key, block): self.clock for block in blocks - self.dirty[key]})
        self.dirty[key] |= blocks

    @rule(data=st.data())
    @precondition(lambda self: self.log)
    def consume(self, data: Any) -> None:
        """A batch out of the log, in any order, goes into the maps."""
        self.clock += 1
        order = data.draw(st.permutations(self.log))
        batch, self.log = order[: len(order) // 2 + 1], order[len(order) // 2 + 1 :]
        starts = np.array([self.maps.global_start(key) + start for key, start, _, _ in batch])
        ends = np.array([self.maps.global_start(key) + end for key, _, end, _ in batch])
        self.maps.mark(starts, ends, self.clock, np.array([fails for _, _, _, fails in batch]))
        for key, start, end, fails in batch:
            self.dirtied(key, set(range(start, end)))
            if fails:
                self.failed[key].update(range(start, end))

    @rule(key=st.sampled_from(KEYS), granules=st.integers(0, 5000), data=st.data())
    def claim(self, key: Key, granules: int, data: Any) -> None:
        """The shipper claims, then reads the device: later writes are not in what it sends."""
        first = data.draw(st.integers(0, blocks_of(key)))
        taken = self.maps.claim(key, granules * GRANULE, first * GRANULE)
        candidates = sorted(block for block in self.dirty[key] - self.claimed[key] if block >= first)
        expected = candidates[: max(1, granules)]
        got: list[int] = []
        for offset, length in taken.extents:
            assert offset % GRANULE == 0 and (length % GRANULE == 0 or offset + length == SIZES[key])
            got += range(offset // GRANULE, -(-(offset + length) // GRANULE))
        assert got == expected
        assert len(taken.extents) == len([b for b in expected if b - 1 not in expected]), (
            "adjacent blocks are one extent"
        )
        if not expected:
            assert taken.number is None and taken.next_offset_bytes == SIZES[key]
            return
        if len(candidates) > len(expected):
            assert taken.next_offset_bytes == min(SIZES[key], (expected[-1] + 1) * GRANULE)
        assert taken.number is not None
        self.dirty[key] -= set(expected)
        self.claimed[key] |= set(expected)
        self.claimed_at.update({(key, block): self.dirty_at[key, block] for block in expected})
        self.claims[taken.number] = (key, {block: self.device[key].get(block, 0) for block in expected})

    @rule(data=st.data())
    @precondition(lambda self: self.claims)
    def acknowledge(self, data: Any) -> None:
        """Claims are acknowledged in any order: the replica has what was read."""
        number = data.draw(st.sampled_from(sorted(self.claims)))
        key, contents = self.claims.pop(number)
        self.replica[key].update(contents)
        again = len(self.dirty[key] & set(contents))
        assert self.maps.acknowledge(key, number) == again * GRANULE
        self.claimed[key] -= set(contents)
        with pytest.raises(KeyError):
            self.maps.acknowledge(key, number)

    @rule(key=st.sampled_from(KEYS))
    def fence(self, key: Key) -> None:
        """The old session is gone: what it had claimed may or may not have arrived."""
        self.maps.give_back(key)
        for block in self.claimed[key]:
            again = self.dirty_at[key, block] if block in self.dirty[key] else self.clock
            self.dirty_at[key, block] = min(again, self.claimed_at[key, block])
        self.dirty[key] |= self.claimed[key]
        self.claimed[key] = set()
        self.claims = {number: item for number, item in self.claims.items() if item[0] != key}

    @rule(key=st.sampled_from(KEYS))
    def barrier(self, key: Key) -> None:
        """Blocks of failed writes are offered again, and stay marked; what was acknowledged has a new mark."""
        self.maps.offer_failed(key, self.clock)
        self.dirtied(key, self.failed[key])

    @rule()
    def restart(self) -> None:
        """The daemon dies and comes back with nothing but the files."""
        self.boot()

    @rule(key=st.sampled_from(KEYS))
    def reattach(self, key: Key) -> None:
        """One volume goes and comes back; the others move in the bit space."""
        self.maps.remove(key)
        self.add(key)

    @invariant()
    def nothing_is_lost(self) -> None:
        """The sentence that everything serves."""
        if not hasattr(self, "maps"):
            return
        logged: dict[Key, set[int]] = {key: set() for key in KEYS}
        for key, start, end, _ in self.log:
            logged[key].update(range(start, end))
        for key in KEYS:
            volume = self.maps.volumes[key]
            dirty = unpacked(self.maps.dirty[volume.here], volume.blocks)
            claimed = unpacked(self.maps.claimed[volume.here], volume.blocks)
            failed = unpacked(self.maps.failed[volume.here], volume.blocks)
            differs = {b for b, c in self.device[key].items() if self.replica[key].get(b, 0) != c}
            assert differs <= dirty | claimed | failed | logged[key]
            assert (dirty, claimed, failed) == (self.dirty[key], self.claimed[key], self.failed[key])
            assert unpacked(self.files[key], volume.blocks) == dirty | claimed | failed
            assert unpacked(self.failed_files[key], volume.blocks) == failed
            assert volume.dirty_blocks == len(dirty) and volume.claimed_blocks == len(claimed)
            short = GRANULE * volume.blocks - SIZES[key]
            assert self.maps.dirty_bytes(key) == len(dirty) * GRANULE - short * (volume.blocks - 1 in dirty)

    @invariant()
    def age_is_never_understated(self) -> None:
        """The oldest mark not acknowledged is never younger than it is said to be."""
        if not hasattr(self, "maps"):
            return
        for key in KEYS:
            marks = [self.dirty_at[key, block] for block in self.dirty[key]]
            marks += [self.claimed_at[key, block] for block in self.claimed[key]]
            oldest = self.maps.oldest(key)
            if not marks:
                assert oldest is None
            else:
                assert oldest is not None and oldest <= min(marks)


World.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestWorld = World.TestCase


def fresh(blocks: int) -> tuple[Maps, Key, Any]:
    """One volume of whole granules, nothing dirty."""
    maps, key = Maps(), ("w", "a")
    size = -(-blocks // 8)
    mirror = np.zeros(size, dtype=np.uint8)
    maps.add(key, blocks * GRANULE, GRANULE, mirror, np.zeros(size, dtype=np.uint8), 0.0)
    return maps, key, mirror


def test_a_write_to_a_claimed_block_survives_the_acknowledgement() -> None:
    maps, key, mirror = fresh(64)
    maps.mark_extents(key, [[8 * GRANULE, 4 * GRANULE]], 1.0)
    taken = maps.claim(key, 1 << 20, 0)
    maps.mark_extents(key, [[9 * GRANULE, 512]], 2.0)
    assert maps.volumes[key].redirtied_claimed_blocks == 1
    assert taken.number is not None
    assert maps.acknowledge(key, taken.number) == GRANULE
    assert maps.claim(key, 1 << 20, 0).extents == [[9 * GRANULE, GRANULE]]
    assert unpacked(mirror, 64) == {9}


def test_a_redirtied_block_is_not_claimed_twice_at_once() -> None:
    maps, key, _ = fresh(64)
    maps.mark_extents(key, [[0, GRANULE]], 1.0)
    first = maps.claim(key, 1 << 20, 0)
    maps.mark_extents(key, [[0, GRANULE]], 2.0)
    assert maps.claim(key, 1 << 20, 0).number is None
    assert first.number is not None and maps.acknowledge(key, first.number) == GRANULE
    assert maps.claim(key, 1 << 20, 0).extents == [[0, GRANULE]]


def test_the_short_tail_is_claimed_at_its_true_length() -> None:
    maps, key = Maps(), ("w", "t")
    size = 64 * 1024 * 1024 + 3584
    blocks = size // GRANULE + 1
    mirror = np.zeros(-(-blocks // 8), dtype=np.uint8)
    maps.add(key, size, GRANULE, mirror, mirror.copy(), 0.0)
    maps.mark_all(key, 0.0)
    assert maps.dirty_bytes(key) == size
    taken = maps.claim(key, 1 << 40, 64 * 1024 * 1024)
    assert taken.extents == [[64 * 1024 * 1024, 3584]] and taken.next_offset_bytes == size


def test_a_failed_write_stays_marked_whatever_is_acknowledged() -> None:
    maps, key, mirror = fresh(64)
    maps.mark(np.array([3]), np.array([4]), 1.0, np.array([True]))
    for _ in range(2):
        taken = maps.claim(key, 1 << 20, 0)
        assert taken.extents == [[3 * GRANULE, GRANULE]] and taken.number is not None
        maps.acknowledge(key, taken.number)
        assert unpacked(mirror, 64) == {3}, "an aborted command may still land"
        assert maps.claim(key, 1 << 20, 0).number is None, "it must not keep the shipper busy either"
        maps.offer_failed(key, 2.0)


def test_an_empty_mirror_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="not 8"):
        Maps().add(("w", "a"), 64 * GRANULE, GRANULE, np.zeros(7, np.uint8), np.zeros(7, np.uint8), 0.0)


def test_large_maps_stay_fast() -> None:
    """A terabyte: a batch of random single blocks, a discard of everything, and claims, each well under a second."""
    import time

    maps, key, _ = fresh((1 << 40) // GRANULE)
    positions = np.random.default_rng(1).integers(0, maps.volumes[key].blocks, 1 << 16)
    begin = time.process_time()
    for _ in range(5):
        maps.mark(positions, positions + 1, 1.0)
        taken = maps.claim(key, 64 << 20, 0)
        assert taken.number is not None
        maps.acknowledge(key, taken.number)
    assert time.process_time() - begin < 2.5
    begin = time.process_time()
    maps.mark_all(key, 2.0)
    maps.claim(key, 64 << 20, 0)
    assert time.process_time() - begin < 2.5
    assert len(maps.dirty) % REGION_BYTES == 0


@given(st.integers(0, 1 << 32), st.integers(64, 3000), st.integers(1, 20000), st.booleans(), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_the_short_way_for_single_blocks_marks_what_the_long_way_marks(
    seed: int, count: int, spread: int, claims: bool, volumes: int
) -> None:
    """Also where bytes and blocks repeat, volumes alternate, and something is claimed or has failed."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        maps = Maps()
        for key in KEYS[:volumes]:
            size = -(-blocks_of(key) // 8)
            maps.add(key, SIZES[key], GRANULE, np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8), 0.0)
        made.append(maps)
    owner = random.integers(0, volumes, count)
    starts = np.array([made[0].global_start(KEYS[which]) for which in owner])
    starts += random.integers(0, spread, count) % np.array([blocks_of(KEYS[which]) for which in owner])
    early = random.integers(0, count, count // 4)
    for maps in made:
        maps.mark(starts[early], starts[early] + 1, 1.0, np.arange(len(early)) % 50 == 49 if claims else None)
        if claims:
            for key in KEYS[:volumes]:
                maps.claim(key, 1 << 30, 0)
    quick, slow = made
    quick.mark(starts, starts + 1, 2.0)
    for start in starts.tolist():
        slow.mark(np.array([start]), np.array([start + 1]), 2.0)
    for name in ("dirty", "claimed", "failed"):
        assert np.array_equal(getattr(quick, name), getattr(slow, name)), name
    for key in KEYS[:volumes]:
        one, other = quick.volumes[key], slow.volumes[key]
        assert np.array_equal(one.mirror, other.mirror) and np.array_equal(one.failed_mirror, other.failed_mirror)
        assert (one.dirty_blocks, one.redirtied_claimed_blocks) == (other.dirty_blocks, other.redirtied_claimed_blocks)
        assert quick.oldest(key) == slow.oldest(key)


def test_a_few_bytes_hit_again_and_again_are_marked_too() -> None:
    """The worst case of the short way, which gives up on it: it must not take a round for each record."""
    maps = Maps()
    size = -(-blocks_of(KEYS[0]) // 8)
    mirror = np.zeros(size, dtype=np.uint8)
    maps.add(KEYS[0], SIZES[KEYS[0]], GRANULE, mirror, np.zeros(size, dtype=np.uint8), 0.0)
    starts = np.arange(50000) % 11
    maps.mark(starts, starts + 1, 1.0)
    assert (
        maps.volumes[KEYS[0]].dirty_blocks == 11
        and np.flatnonzero(np.unpackbits(mirror, bitorder="little")).max() == 10
    )


@given(
    st.integers(1, 700 * 8 * GRANULE),
    st.lists(st.tuples(st.integers(0, 5600), st.integers(1, 300)), max_size=8),
    st.integers(1, 2000),
)
@settings(max_examples=200, deadline=None)
def test_the_picture_counts_every_block_once(size: int, marks: list[tuple[int, int]], cells: int) -> None:
    """Whatever the size and the number of cells: each granule is in exactly one cell, dirty or claimed."""
    maps, other = Maps(), ("w", "other")
    for name, length in ((other, 5000 * GRANULE), (("w", "v"), size)):
        blocks = -(-length // GRANULE)
        map_bytes = -(-blocks // 8)
        empty, failed = np.zeros(map_bytes, dtype=np.uint8), np.zeros(map_bytes, dtype=np.uint8)
        maps.add(name, length, GRANULE, empty, failed, 0.0)
    maps.mark_extents(other, [[0, 5000 * GRANULE]], 1.0)
    maps.mark_extents(("w", "v"), [[start * GRANULE, count * GRANULE] for start, count in marks], 1.0)
    taken = maps.claim(("w", "v"), 40 * GRANULE, 0)
    volume = maps.volumes["w", "v"]
    picture = maps.picture(("w", "v"), cells)
    per_cell = picture.cell_bytes // GRANULE
    assert len(picture.dirty) == len(picture.claimed) <= cells
    assert per_cell * (len(picture.dirty) - 1) < volume.blocks <= per_cell * len(picture.dirty)
    claimed = {
        block
        for offset, length in taken.extents
        for block in range(offset // GRANULE, -(-(offset + length) // GRANULE))
    }
    dirty = {block for start, count in marks for block in range(start, min(start + count, volume.blocks))} - claimed
    for cell in range(len(picture.dirty)):
        here = range(cell * per_cell, (cell + 1) * per_cell)
        assert picture.dirty[cell] == len(dirty.intersection(here))
        assert picture.claimed[cell] == len(claimed.intersection(here))


@pytest.mark.parametrize("extent", [[GRANULE, (1 << 63) - 1], [(1 << 63) - 1, (1 << 63) - 1], [0, 1 << 62]])
def test_an_extent_behind_the_end_of_everything_is_clipped(extent: list[int]) -> None:
    """Its end is more than 64 bits hold; taken for a negative number, it would mark nothing and say that it had."""
    key = ("w", "b")
    count = -(-blocks_of(key) // 8)
    maps = Maps()
    maps.add(key, SIZES[key], GRANULE, np.zeros(count, dtype=np.uint8), np.zeros(count, dtype=np.uint8), 0.0)
    maps.mark_extents(key, [extent], 1.0)
    assert maps.dirty_bytes(key) == max(0, SIZES[key] - extent[0])
