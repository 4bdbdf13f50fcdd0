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


class Claim(NamedTuple):
    """Blocks taken by a claim, as half-open ranges of granules relative to the volume."""

    starts: Positions
    ends: Positions


class Taken(NamedTuple):
    """Answer of ``claim``: its number (None: nothing to take), [offset, length] in bytes, where to go on."""

    number: int | None
    extents: list[list[int]]
    next_offset_bytes: int


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
        ranges = np.array(extents, dtype=np.int64).reshape(-1, 2)
        starts = np.clip(ranges[:, 0] // volume.granule_bytes, 0, volume.blocks)
        ends = np.clip(-(-(ranges[:, 0] + ranges[:, 1]) // volume.granule_bytes), 0, volume.blocks)
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
        before, claimed = self.dirty[index], self.claimed[index]
        after = before | mask
        # A claimed block that is written goes into `dirty` as well: the shipper may have read it
        # before the write. Leaving it to `claimed` alone would let the acknowledgement of the old
        # content clear it.
        self.dirty[index] = after
        mirrored = after | claimed | self.failed[index]
        gained = bits.population_each(after ^ before)
        again = bits.population_each(mask & claimed & ~before)
        region = index // REGION_BYTES
        self._dirty_since[region] = np.minimum(self._dirty_since[region], now)
        for volume, part in self._split(index):
            volume.mirror[index[part] - volume.base] = mirrored[part]
            volume.dirty_blocks += int(gained[part].sum())
            volume.redirtied_claimed_blocks += int(again[part].sum())

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
