# SPDX-License-Identifier: GPL-3.0-or-later
"""The maps of dirty and claimed blocks of all volumes, in one concatenated bit space.

Promises: a block that was marked stays in ``dirty``, ``claimed`` or ``failed`` until the content
that was read *after* the mark has been acknowledged; and a volume's mirror (the mapped bitmap
file) is the OR of the three at the end of every method, and never less than that in between. It
must never do I/O, read a clock, or loop over records. Where two statements stand in an order that
saves data, the comment says which loss it prevents.

``failed`` holds blocks of failed writes: an aborted command may reach the medium later, after the
block was shipped, so nothing frees them but the end of the map (a handover or a seed).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bmigrate.breqd import bits
from bmigrate.breqd.bits import Bits, Positions

Key = tuple[str, str]  #: (workload, volume)

#: Volumes start at a multiple of this many bytes; the age of marks is kept per such region.
REGION_BYTES = 512
_MAX_CLAIM_BLOCKS = 1 << 17
_NEVER = np.inf
#: Fewer marks of one granule are not worth the short way.
MIN_SINGLE = 64
_TABLE = 1 << 18
_ROUNDS = 6


class Claim(NamedTuple):
    """Blocks taken by a claim, as half-open ranges of granules relative to the volume."""

    starts: Positions
    ends: Positions


class Taken(NamedTuple):
    """Answer of ``claim``: its number (None: nothing to take), [offset, length] in bytes, where to go on."""

    number: int | None
    extents: list[list[int]]
    next_offset_bytes: int


class Picture(NamedTuple):
    """A volume's map seen from afar: bytes of the volume per cell (the last may be shorter), granules in each."""

    cell_bytes: int
    dirty: list[int]
    claimed: list[int]


@dataclass
class Volume:
    """One volume's place and counts. ``base`` is its first byte in the concatenated maps."""

    key: Key
    size_bytes: int
    granule_bytes: int
    mirror: Bits
    failed_mirror: Bits
    base: int = 0
    dirty_blocks: int = 0
    claimed_blocks: int = 0
    redirtied_claimed_blocks: int = 0
    claims: dict[int, Claim] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        """Number of granules; the last may be shorter than the others."""
        return -(-self.size_bytes // self.granule_bytes)

    @property
    def map_bytes(self) -> int:
        """Bytes that the volume's bits need."""
        return -(-self.blocks // 8)

    @property
    def span(self) -> int:
        """Bytes that the volume takes in the concatenated maps."""
        return -(-self.map_bytes // REGION_BYTES) * REGION_BYTES

    @property
    def here(self) -> slice:
        """Its bytes in the concatenated maps."""
        return slice(self.base, self.base + self.map_bytes)

    @property
    def regions(self) -> slice:
        """Its regions in the arrays of ages."""
        return slice(self.base // REGION_BYTES, (self.base + self.span) // REGION_BYTES)


class Maps:
    """All volumes' maps. Times are seconds of one monotonic clock of the caller's."""

    def __init__(self) -> None:
        self.volumes: dict[Key, Volume] = {}
        self._table: Positions = np.zeros(_TABLE, dtype=np.int32)
        self._order: list[Volume] = []
        self._last_claim = 0
        self._allocate(0)

    # --- volumes ---------------------------------------------------------------------------------

    def _allocate(self, size: int) -> None:
        self.dirty: Bits = np.zeros(size, dtype=np.uint8)
        self.claimed: Bits = np.zeros(size, dtype=np.uint8)
        self.failed: Bits = np.zeros(size, dtype=np.uint8)
        self._dirty_since: Any = np.full(size // REGION_BYTES, _NEVER)
        self._claimed_since: Any = np.full(size // REGION_BYTES, _NEVER)
        self._bounds: Positions = np.zeros(0, dtype=np.int64)
        self._has_failed = False

    def _rebuild(self, volumes: list[Volume]) -> None:
        """Lay the volumes out anew, one after the other, and move their bits there."""
        old = (self.dirty, self.claimed, self.failed)
        old_ages = (self._dirty_since, self._claimed_since)
        places = [(volume.here, volume.regions) for volume in volumes]
        self._allocate(sum(volume.span for volume in volumes))
        base = 0
        for volume, (old_slice, old_regions) in zip(volumes, places):
            known = self.volumes.get(volume.key) is volume
            volume.base = base
            base += volume.span
            if known:
                for new, before in zip((self.dirty, self.claimed, self.failed), old):
                    new[volume.here] = before[old_slice]
                for new, before in zip((self._dirty_since, self._claimed_since), old_ages):
                    new[volume.regions] = before[old_regions]
        self._has_failed = bool(self.failed.any())
        self._order = volumes
        self._bounds = np.array([volume.base for volume in volumes] + [base], dtype=np.int64)
        self.volumes = {volume.key: volume for volume in volumes}

    def add(
        self, key: Key, size_bytes: int, granule_bytes: int, mirror: Bits, failed_mirror: Bits, now: float
    ) -> Volume:
        """Take a volume in; what its mirror holds is dirty from now on.

        Args:
            size_bytes, granule_bytes: of the volume; the last granule may be short.
            mirror, failed_mirror: uint8 arrays of one bit per granule, kept up to date from now on.
            now: seconds; blocks found dirty are taken to be written now, for lack of a better time.
        """
        volume = Volume(key, size_bytes, granule_bytes, mirror, failed_mirror)
        if len(mirror) != volume.map_bytes or len(failed_mirror) != volume.map_bytes:
            raise ValueError(f"mirror of {key} has {len(mirror)} bytes, not {volume.map_bytes}")
        self._rebuild([item for item in self._order if item.key != key] + [volume])
        here = volume.here
        self.dirty[here] = mirror | failed_mirror
        self.failed[here] = failed_mirror
        self._has_failed = bool(self.failed.any())
        if volume.blocks % 8:
            self.dirty[here.stop - 1] &= 0xFF >> (8 - volume.blocks % 8)
            self.failed[here.stop - 1] &= 0xFF >> (8 - volume.blocks % 8)
        self._recount(volume)
        dirty_regions = self._dirty_in(np.arange(volume.regions.start, volume.regions.stop), self.dirty)
        self._dirty_since[volume.regions][dirty_regions] = now
        return volume

    def remove(self, key: Key) -> None:
        """Forget a volume; its mirror keeps what it holds."""
        self._rebuild([item for item in self._order if item.key != key])

    # --- marking ---------------------------------------------------------------------------------

    def mark(self, starts: Positions, ends: Positions, now: float, failed: Any | None = None) -> None:
        """Make ranges dirty, in whatever volumes they lie; a claimed block becomes dirty *again*.

        Args:
            starts, ends: half-open, in granules of the concatenated space (``global_start``).
            now: seconds.
            failed: boolean array, true where the write failed.
        """
        if len(starts) >= MIN_SINGLE and bool((ends - starts == 1).all()):
            self._mark_single(starts, now)
        else:
            exploded = bits.explode(starts, ends)
            for first, last in exploded.slices:
                self._mark_slice(first, last, now)
            if len(exploded.index):
                self._mark_bytes(exploded.index, exploded.mask, now)
        if failed is not None and bool(failed.any()):
            self._mark_failed(starts[failed], ends[failed])

    def global_start(self, key: Key) -> int:
        """The first granule of a volume in the concatenated space."""
        return self.volumes[key].base * 8

    def mark_extents(self, key: Key, extents: list[list[int]], now: float) -> None:
        """Make byte ranges of one volume dirty, widened to whole granules and clipped to the volume."""
        volume = self.volumes[key]
        # Clipped before anything is added to it: a sum may be more than an array of int64 holds.
        size = volume.blocks * volume.granule_bytes
        clipped = [(min(offset, size), min(offset + length, size)) for offset, length in extents]
        ranges = np.array(clipped, dtype=np.int64).reshape(-1, 2)
        starts = ranges[:, 0] // volume.granule_bytes
        ends = -(-ranges[:, 1] // volume.granule_bytes)
        base = volume.base * 8
        self.mark(starts + base, ends + base, now)

    def mark_all(self, key: Key, now: float) -> None:
        """Seed: every block is dirty."""
        self.mark_extents(key, [[0, self.volumes[key].size_bytes]], now)

    def clear_all(self, key: Key) -> None:
        """Promotion: nothing differs. Only right while nobody can write to the device."""
        volume = self.volumes[key]
        for array in (self.dirty, self.claimed, self.failed):
            array[volume.here] = 0
        volume.mirror[:] = 0
        volume.failed_mirror[:] = 0
        volume.claims.clear()
        self._dirty_since[volume.regions] = _NEVER
        self._claimed_since[volume.regions] = _NEVER
        self._recount(volume)

    def _mark_bytes(self, index: Positions, mask: Bits, now: float) -> None:
        before = self.dirty[index]
        after = before | mask
        # A claimed block that is written goes into `dirty` as well: the shipper may have read it
        # before the write. Leaving it to `claimed` alone would let the acknowledgement of the old
        # content clear it.
        self.dirty[index] = after
        gained = bits.population_of_each(after ^ before)
        again = None
        mirrored = after
        # Most of the time there is nothing in the other maps; what is not there need not be looked up.
        if self._claimed_anywhere():
            claimed = self.claimed[index]
            mirrored = mirrored | claimed
            again = bits.population_of_each(mask & claimed & ~before)
        if self._has_failed:
            mirrored = mirrored | self.failed[index]
        region = index // REGION_BYTES
        young = self._dirty_since[region] > now
        if bool(young.any()):
            self._dirty_since[region[young]] = now
        if len(self._order) == 1:
            volume = self._order[0]
            volume.mirror[index - volume.base] = mirrored
            volume.dirty_blocks += int(gained.sum(dtype=np.int64))
            if again is not None:
                volume.redirtied_claimed_blocks += int(again.sum(dtype=np.int64))
            return
        self._tell_each(index, mirrored, gained, again)

    def _tell_each(self, index: Positions, mirrored: Bits, gained: Bits, again: Bits | None) -> None:
        """Mirrors and counts of each volume touched, with one sort for all of them and little for each."""
        owner: Positions = np.searchsorted(self._bounds, index, side="right") - 1
        if not bool((owner[1:] >= owner[:-1]).all()):
            order = np.argsort(owner.astype(np.uint16), kind="stable")
            index, mirrored, gained, owner = index[order], mirrored[order], gained[order], owner[order]
            again = again[order] if again is not None else None
        local = index - self._bounds[owner]
        first = np.flatnonzero(np.concatenate((np.array([True]), owner[1:] != owner[:-1])))
        fresh = np.add.reduceat(gained, first, dtype=np.int64).tolist()
        twice = np.add.reduceat(again, first, dtype=np.int64).tolist() if again is not None else [0] * len(fresh)
        cuts = [*first.tolist(), len(index)]
        for at, number in enumerate(owner[first].tolist()):
            volume, here = self._order[number], slice(cuts[at], cuts[at + 1])
            volume.mirror[local[here]] = mirrored[here]
            volume.dirty_blocks += fresh[at]
            volume.redirtied_claimed_blocks += twice[at]

    def _claimed_anywhere(self) -> bool:
        return any(volume.claimed_blocks for volume in self._order)

    def _mark_single(self, positions: Positions, now: float) -> None:
        """Many ranges of one granule each, without a sort: rounds in which every byte occurs once at most.

        Reading, changing and writing back a byte that occurs twice would lose one of its bits; so each round takes of
        the bytes that share a place in a small table the one that came last, and leaves the others to
        the next. A batch that keeps hitting the same few bytes is sorted instead.
        """
        index, bit = positions >> 3, (positions & 7).astype(np.uint8)
        mask = np.left_shift(np.uint8(1), bit)
        for _ in range(_ROUNDS):
            if len(index) < MIN_SINGLE:
                break
            place = index & (_TABLE - 1)
            number = np.arange(len(index), dtype=np.int32)
            self._table[place] = number
            alone = self._table[place] == number
            self._mark_bytes(index[alone], mask[alone], now)
            np.logical_not(alone, out=alone)
            if not bool(alone.any()):
                return
            before = len(index)
            index, mask = index[alone], mask[alone]
            if len(index) > before // 2:
                break
        self._mark_bytes(*bits.join(index, mask), now)

    def _mark_slice(self, first: int, last: int, now: float) -> None:
        for volume in self._order:
            start, stop = max(first, volume.base), min(last, volume.base + volume.map_bytes)
            if start >= stop:
                continue
            before = bits.population(self.dirty[start:stop])
            fresh = bits.population(self.claimed[start:stop] & ~self.dirty[start:stop])
            self.dirty[start:stop] = 0xFF
            volume.mirror[start - volume.base : stop - volume.base] = 0xFF
            volume.dirty_blocks += (stop - start) * 8 - before
            volume.redirtied_claimed_blocks += fresh
            region = slice(start // REGION_BYTES, -(-stop // REGION_BYTES))
            self._dirty_since[region] = np.minimum(self._dirty_since[region], now)

    def _mark_failed(self, starts: Positions, ends: Positions) -> None:
        exploded = bits.explode(starts, ends)
        for first, last in exploded.slices:
            index = np.arange(first, last, dtype=np.int64)
            self._set_failed(index, np.full(last - first, 0xFF, dtype=np.uint8))
        self._set_failed(exploded.index, exploded.mask)

    def _set_failed(self, index: Positions, mask: Bits) -> None:
        self._has_failed = True
        self.failed[index] |= mask
        for volume, part in self._split(index):
            volume.failed_mirror[index[part] - volume.base] = self.failed[index[part]]

    # --- claims ----------------------------------------------------------------------------------

    def claim(self, key: Key, max_bytes: int, from_offset_bytes: int) -> Taken:
        """Take dirty blocks, ascending from an offset, for reading and shipping.

        Only blocks that are dirty and *not* claimed are taken: were a re-dirtied block claimed a
        second time, the acknowledgement of the first claim would clear it while the second is
        still on its way.

        Args:
            max_bytes: at most that much, but at least one granule.
            from_offset_bytes: where to begin; the walk ends at the end of the volume.
        """
        volume = self.volumes[key]
        limit = min(max(1, max_bytes // volume.granule_bytes), _MAX_CLAIM_BLOCKS)
        base = volume.base * 8
        start = min(max(0, from_offset_bytes) // volume.granule_bytes, volume.blocks)
        taken = bits.first_set(self.dirty, self.claimed, base + start, base + volume.blocks, limit)
        if not len(taken):
            return Taken(None, [], volume.size_bytes)
        starts, ends = bits.runs(taken)
        exploded = bits.explode(starts, ends)
        # First into `claimed`, then out of `dirty`; and all of it before the shipper reads. A
        # write that the read misses completes, and is recorded, after this point: it finds the
        # block clean and makes it dirty. Clearing after the read would wipe out that mark.
        for first, last in exploded.slices:
            self.claimed[first:last] = 0xFF
            self.dirty[first:last] = 0
        self.claimed[exploded.index] |= exploded.mask
        self.dirty[exploded.index] &= ~exploded.mask
        volume.dirty_blocks -= len(taken)
        volume.claimed_blocks += len(taken)
        self._age_claimed(exploded)
        self._last_claim += 1
        volume.claims[self._last_claim] = Claim(starts - base, ends - base)
        extents = self._extents(volume, starts - base, ends - base)
        more = len(taken) == limit
        return Taken(self._last_claim, extents, extents[-1][0] + extents[-1][1] if more else volume.size_bytes)

    def acknowledge(self, key: Key, number: int) -> int:
        """The standby has the content of a claim durably: its blocks are clean unless written since.

        Returns:
            bytes of the claim that were written again meanwhile; they are dirty and stay so.

        Raises:
            KeyError: no such claim.
        """
        volume = self.volumes[key]
        claim = volume.claims.pop(number)
        base = volume.base * 8
        exploded = bits.explode(claim.starts + base, claim.ends + base)
        index, mask = exploded.index, exploded.mask
        again = 0
        for first, last in exploded.slices:
            again += bits.population(self.dirty[first:last])
        if len(index):
            again += int(bits.population_each(self.dirty[index] & mask).sum())
        # Only `claimed` is cleared, never `dirty`: a write since the claim is in `dirty` alone.
        for first, last in exploded.slices:
            self.claimed[first:last] = 0
            volume.mirror[first - volume.base : last - volume.base] = self.dirty[first:last] | self.failed[first:last]
        self.claimed[index] &= ~mask
        volume.mirror[index - volume.base] = self.dirty[index] | self.claimed[index] | self.failed[index]
        volume.claimed_blocks -= int((claim.ends - claim.starts).sum())
        region = self._regions(exploded)
        self._claimed_since[region[~self._dirty_in(region, self.claimed)]] = _NEVER
        return again * volume.granule_bytes

    def give_back(self, key: Key) -> None:
        """All claims of a volume become dirty again: their session is over and confirmed gone."""
        volume = self.volumes[key]
        volume.claims.clear()
        if not volume.claimed_blocks:
            return
        here, regions = volume.here, volume.regions
        # Into `dirty` before out of `claimed`: the mirror, their OR, must not lose the bits.
        self.dirty[here] |= self.claimed[here]
        self.claimed[here] = 0
        self._dirty_since[regions] = np.minimum(self._dirty_since[regions], self._claimed_since[regions])
        self._claimed_since[regions] = _NEVER
        self._recount(volume)

    def offer_failed(self, key: Key, now: float) -> None:
        """Make blocks of failed writes dirty, so that they are shipped once more; marked they stay."""
        volume = self.volumes[key]
        index = np.flatnonzero(self.failed[volume.here]) + volume.base
        if not len(index):
            return
        self._mark_bytes(index, self.failed[index], now)

    # --- counts ----------------------------------------------------------------------------------

    def dirty_bytes(self, key: Key) -> int:
        """Bytes in dirty blocks, the short last block counted as it is."""
        return self._bytes(self.volumes[key], self.dirty, self.volumes[key].dirty_blocks)

    def claimed_bytes(self, key: Key) -> int:
        """Bytes in claimed blocks; a block that is dirty too is counted in both."""
        return self._bytes(self.volumes[key], self.claimed, self.volumes[key].claimed_blocks)

    def failed_bytes(self, key: Key) -> int:
        """Bytes in blocks of failed writes, which stay marked as long as the map lives."""
        volume = self.volumes[key]
        return self._bytes(volume, self.failed, bits.population(self.failed[volume.here]))

    def picture(self, key: Key, cells: int) -> Picture:
        """How many granules are dirty and claimed in each of about ``cells`` equal parts of a volume.

        Args:
            cells: at least 1. A part is a whole number of bytes of the map, so a small volume has fewer parts.

        Looks at the whole map of the volume, once: some tens of milliseconds for a map of 32 MiB.
        """
        volume = self.volumes[key]
        step = -(-volume.map_bytes // max(1, cells))
        edges = range(volume.base, volume.base + volume.map_bytes, step)
        end = volume.base + volume.map_bytes
        return Picture(
            step * 8 * volume.granule_bytes,
            [bits.population(self.dirty[at : min(at + step, end)]) for at in edges],
            [bits.population(self.claimed[at : min(at + step, end)]) for at in edges],
        )

    def oldest(self, key: Key) -> float | None:
        """When the oldest write was marked that is not acknowledged, in seconds of the caller's clock.

        Kept per region of the map (16 MiB of a volume with 4 KiB granules), so it may name an
        older time than the true one while a region is claimed piece by piece; never a younger one.
        """
        regions = self.volumes[key].regions
        value = min(float(self._dirty_since[regions].min()), float(self._claimed_since[regions].min()))
        return None if value == _NEVER else value

    # --- inside ----------------------------------------------------------------------------------

    def _split(self, index: Positions) -> Iterator[tuple[Volume, slice]]:
        """The part of ascending byte numbers that lies in each volume touched."""
        cuts: Positions = np.searchsorted(index, self._bounds)
        for number in np.flatnonzero(np.diff(cuts)):
            yield self._order[int(number)], slice(int(cuts[number]), int(cuts[number + 1]))

    def _regions(self, exploded: bits.Exploded) -> Positions:
        parts = [exploded.index // REGION_BYTES]
        parts += [np.arange(first // REGION_BYTES, (last - 1) // REGION_BYTES + 1) for first, last in exploded.slices]
        return np.unique(np.concatenate(parts))

    def _dirty_in(self, region: Positions, array: Bits) -> Any:
        """For each region whether any bit of it is set in ``array``."""
        return array.reshape(-1, REGION_BYTES)[region].any(axis=1)

    def _age_claimed(self, exploded: bits.Exploded) -> None:
        region = self._regions(exploded)
        self._claimed_since[region] = np.minimum(self._claimed_since[region], self._dirty_since[region])
        self._dirty_since[region[~self._dirty_in(region, self.dirty)]] = _NEVER

    def _recount(self, volume: Volume) -> None:
        volume.dirty_blocks = bits.population(self.dirty[volume.here])
        volume.claimed_blocks = bits.population(self.claimed[volume.here])

    def _bytes(self, volume: Volume, array: Bits, blocks: int) -> int:
        total = blocks * volume.granule_bytes
        short = volume.blocks * volume.granule_bytes - volume.size_bytes
        last = volume.blocks - 1
        if short and last >= 0 and array[volume.base + last // 8] >> (last % 8) & 1:
            total -= short
        return total

    def _extents(self, volume: Volume, starts: Positions, ends: Positions) -> list[list[int]]:
        offsets = starts * volume.granule_bytes
        stops = np.minimum(ends * volume.granule_bytes, volume.size_bytes)
        return [[int(offset), int(stop - offset)] for offset, stop in zip(offsets.tolist(), stops.tolist())]
