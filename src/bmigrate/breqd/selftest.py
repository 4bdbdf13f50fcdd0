# SPDX-License-Identifier: GPL-3.0-or-later
"""Are writes really seen? The kernel's own counters of a device against those of its attachment.

Promises: a tracker that misses writes which the kernel counts is called blind, at once where a deficit
has no other cause and else after two windows of time with one, and one that misses none never is.
Passive: nothing is written, nothing waits.

The kernel counts the sectors that a device completed (Documentation/block/stat.rst); reqlog counts
the sectors that it recorded for the attachment, at the same completions, whether or not anybody has
read the records yet. So within a window the second must not grow less than the first. It may grow
more: failed and repeated writes are recorded again.

When the two are read decides whether they may be compared. A request is recorded a moment before it
is counted, so a window begins with the records of an earlier sample and ends with counters that were
read before the records. A disk that handles bios itself (dm, md) may count a write when it begins:
there a sample is only compared when nothing was in flight between its two readings. One deficit may
still be an accident there (dm counts twice what it queues again); it opens a new window, and the next
one that has writes decides. The same on a partition: a request that joins writes on both sides of its
border is counted for the first of them. A command past the block layer marks all and counts what it
likes, so the window in which one came is not judged.

The records between the two samples at a window's begin are a gift to the tracker. A window proves
something only when it needs no gift, or when much more was written in it; and it is long: of a
steady stream, a loss of more than the gift's share is found, and in a window that begins while the
device rests any loss is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: How long a window with writes goes on before the next one begins.
WINDOW_SECONDS = 60.0
#: What is written in a window proves something when it is that many times the gift.
PROOF_FACTOR = 8
#: A device that never rests is judged all the same after this time, if nothing at all was recorded.
RESTLESS_SECONDS = 60.0


@dataclass(frozen=True)
class Sample:
    """One reading, in this order: the device's counters, what is in flight, the attachment's counters.

    Attributes:
        written: sectors written and discarded since the device appeared. in_flight: writes that had
            begun and not ended. recorded: sectors recorded since the attach. now: monotonic seconds.
            passthrough: commands past the block layer since the attach.
    """

    written: int
    in_flight: int
    recorded: int
    now: float
    passthrough: int = 0


class Witness:
    """What the samples of one attachment prove.

    Args:
        at_completion: True when the device counts a write after it is recorded (request-based);
            False: possibly when it begins.
        certain: a deficit has no harmless cause (a whole request-based disk): the first one is enough.

    Attributes:
        proven_sectors: sectors counted in windows of which all was recorded.
        proven_at: monotonic seconds of the last such window with writes, or None.
        doubt: sectors that the last window with writes lacks; 0 when it lacks none.
        unreadable: why the counters cannot be read, in words; empty: they can.
        blind: why the tracker is blind, in words; empty: it is not known to be.
    """

    def __init__(self, at_completion: bool, certain: bool = False) -> None:
        self.at_completion, self.certain = at_completion, certain
        self.proven_sectors = 0
        self.proven_at: float | None = None
        self.doubt = 0
        self.blind = ""
        self.counted = True
        self.unreadable = ""
        self._last: Sample | None = None
        self._passthrough = 0
        #: Records of the sample before the window, counters of the one that opened it, and when.
        self._window: tuple[int, int, float] | None = None
        self._gift = 0

    @property
    def state(self) -> str:
        """``blind``, ``doubtful``, ``unreadable``, ``proven``, ``uncounted`` (they do not move) or ``unproven``."""
        if self.blind:
            return "blind"
        if self.doubt:
            return "doubtful"
        if self.unreadable:
            return "unreadable"
        if self.proven_at is not None:
            return "proven"
        return "unproven" if self.counted else "uncounted"

    def take(self, sample: Sample) -> None:
        """Judge one more sample; samples come in order of time."""
        self.unreadable = ""
        if sample.passthrough != self._passthrough:
            # Its sectors may be counted a moment later: not this sample begins the next window, but the one after.
            self._passthrough, self._last, self._window = sample.passthrough, None, None
            return
        last, self._last = self._last, sample
        if last is None:
            return
        if self._window is None or sample.written < self._window[1]:
            self._open(last, sample)
            return
        written = sample.written - self._window[1]
        lacking = written - (sample.recorded - self._window[0])
        # Not asked of queue/iostats: dm of Linux 6.1 says 0 there and counts, other drivers say 1 and do not.
        if written:
            self.counted = True
        elif sample.recorded > self._window[0] + self._gift:
            self.counted = False
        if lacking <= 0:
            if written and (lacking + self._gift <= 0 or written >= PROOF_FACTOR * self._gift):
                self.proven_sectors += max(0, sample.written - last.written)
                self.proven_at, self.doubt = sample.now, 0
            if not written or sample.now - self._window[2] >= WINDOW_SECONDS:
                self._open(last, sample)
        elif self._comparable(sample):
            if self.doubt or self.certain:
                self.blind = (
                    f"the device wrote {written} sectors in {sample.now - self._window[2]:.0f} s, "
                    f"and {lacking} of them were not recorded"
                )
            self.doubt = lacking
            self._open(last, sample)

    def _comparable(self, sample: Sample) -> bool:
        if self.at_completion or not sample.in_flight:
            return True
        assert self._window is not None
        return sample.recorded == self._window[0] and sample.now - self._window[2] >= RESTLESS_SECONDS

    def _open(self, last: Sample, sample: Sample) -> None:
        self._window = (last.recorded, sample.written, sample.now)
        self._gift = sample.recorded - last.recorded

    def describe(self, now: float) -> dict[str, Any]:
        """For status: {state, proven_sectors, proven_age_seconds, reason}."""
        reason = {
            "blind": self.blind,
            "doubtful": f"the last window of writes lacks {self.doubt} sectors; the next one decides",
            "unreadable": f"the counters cannot be read: {self.unreadable}",
            "uncounted": "the kernel does not count writes of this device (queue/iostats)",
            "unproven": "no write was counted yet that could be compared",
        }.get(self.state)
        age = None if self.proven_at is None else max(0.0, now - self.proven_at)
        return {
            "state": self.state,
            "proven_sectors": self.proven_sectors,
            "proven_age_seconds": age,
            "reason": reason,
        }
