# SPDX-License-Identifier: GPL-3.0-or-later
"""One session: one lease on the standby, from HELLO to the end of everything that belongs to it.

Promises: nothing is claimed before hold on the standby has fenced the epoch and breqd was told;
every claim is acknowledged to breqd only after an ACK for a SYNC that followed its last frame; the
first failure of any part (stream, receiver, breqd, device) ends all of it, and what was under way stays
claimed until the next fence. It never resumes: a session that failed once is over.

A session may have several streams (lane.py). A claim travels whole on one of them. Only the first stream's receiver
flushes and acknowledges; what travelled on the others is known to be written before a SYNC leaves (marks.py).

Threads: the caller's thread sends, with several streams one more for each; others may claim and read ahead of them
(readahead.py); a reader for each stream takes frames in; an acknowledger writes the record and tells breqd; with
several streams a syncer sends MARKs and SYNCs. They meet in the window and the marks, under one lock, and in the
connection to breqd, under another.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Callable, TypeVar

from bmigrate.common import errors, faults
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, DefectError, RefusedError, UnreachableError
from bmigrate.ship import handshake
from bmigrate.ship.lane import Lane
from bmigrate.ship.link import Link, StreamEnded
from bmigrate.ship.marks import Marks
from bmigrate.ship.rates import ShipRate
from bmigrate.ship.record import Record
from bmigrate.ship.source import SourceVolume
from bmigrate.ship.tracker import Snapshot, Tracker
from bmigrate.ship.transport import Stream, Transport, closed_by_peer
from bmigrate.ship.window import Claim, ProtocolError, Window
from bmigrate.wire import frames, hashing, hello
from bmigrate.wire.frames import FrameType
from bmigrate.wire.packing import Packer

MAX_CLAIMS_IN_FLIGHT = 512
MAX_BYTES_IN_FLIGHT = 128 << 20
MIN_SYNC_BYTES = 4 << 20
MAX_SYNC_BYTES = 32 << 20
SYNC_RATE_SECONDS = 0.25
"""A SYNC follows about so many seconds' worth of data: a flush for each few MiB would cost a fast disk its speed."""
SYNCS_IN_FLIGHT = 4
SYNC_SECONDS = 0.5
ANSWER_SECONDS = 300.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""A standby's disk that is slower, also in making zeroes, is taken for hung: then ANSWER_SECONDS count."""
LAST_WORDS_SECONDS = 1.0
SESSION_GONE = ("session_over", "sender_gone")
"""Why a stream may not join any more, where the session has ended meanwhile."""
_DIGEST_BYTES = {
    FrameType.HASHES: frames.HASH_DIGEST_BYTES,
    FrameType.DIGESTS: frames.EXTENT_DIGEST_BYTES,
    FrameType.RESYNC_DONE: 1,
}
_log = logging.getLogger("ship")
T = TypeVar("T")


class Session:
    """An open session. Create with ``Session.open``; ``close`` is due whatever happens.

    Attributes:
        epoch, session_id: of the lease. version: of the protocol. volumes: in the configured order.
        lanes: its streams; the first carries requests and acknowledgements. hash: name of the hash of HASHES.
        standby_suspects: volume -> why the standby distrusts its copy, as of WELCOME.
        rate: the ship rate, fed by the acknowledgements.
    """

    def __init__(self, config: Config, record: Record, rate: ShipRate, breqd_socket: Path) -> None:
        self.config = config
        self._breqd_socket = breqd_socket
        self.record = record
        self.rate = rate
        self.epoch = 0
        self.session_id = ""
        self.version = frames.VERSION
        self.hash = hashing.BLAKE2B
        self.lanes: list[Lane] = []
        self.incarnation = ""
        self.volumes: list[SourceVolume] = []
        self.standby_suspects: dict[str, str] = {}
        self.on_durable: Callable[[Claim], None] = lambda claim: None
        self.standby_wait_seconds = 0.0
        self._silence_seconds = config.limits.silence_seconds
        self._window = Window()
        self._marks = Marks()
        self._marked = False
        self._due: list[tuple[int, set[int]]] = []
        self._cond = threading.Condition()
        self._failure: BmigrateError | None = None
        self._closing = False
        self._sync_due = 0.0
        self._acks: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._expected: deque[tuple[FrameType, int]] = deque()
        self._answers: deque[bytes] = deque()
        self._threads: list[threading.Thread] = []
        self._fenced = False
        self._asking = threading.Lock()
        self._tracker: Tracker | None = None
        self._ack_tracker: Tracker | None = None
        self._streams: list[Stream] = []

    # -- opening ---------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        config: Config,
        generation: dict[str, Any],
        record: Record,
        rate: ShipRate,
        transport: Transport,
        breqd_socket: Path,
    ) -> Session:
        """Connect to breqd and to the standby, and begin a session.

        Args:
            config, generation: the workload, and its generation {number, id} on this host.
            record: what this side remembers; updated.
            rate: fed while the session lasts.
            transport: carries the stream.
            breqd_socket: path of breqd's socket.

        Raises:
            BmigrateError: nothing was opened; the reason names side, volume and host.
        """
        session = cls(config, record, rate, breqd_socket)
        try:
            session._greet(generation, transport)
            session._begin()
        except BaseException:
            session.close()
            raise
        return session

    def _greet(self, generation: dict[str, Any], transport: Transport) -> None:
        self._tracker = Tracker(self._breqd_socket, self.config.workload)
        snapshot = self._tracker.status()
        self.incarnation = snapshot.incarnation
        for volume in self.config.volumes:
            self.volumes.append(handshake.open_source(self.config, volume.name, snapshot))
        if self.record.damaged:
            for volume in self.config.volumes:
                self._tracker.suspect(volume.name, "the record of the last acknowledgement is damaged")
        greeting = handshake.greeting(self.config, generation, self.record, snapshot, self.volumes)
        first = self._connect(transport)
        welcome = handshake.shake_hands(first, greeting, self.volumes)
        self.epoch, self.session_id, self.version = welcome.epoch, welcome.session_id, welcome.v
        self.hash = welcome.hash
        self._silence_seconds = welcome.silence_seconds
        self._add_lane(first, welcome)
        # All at once: a connection takes a few round trips, and who has joined must hear from us soon.
        others = [self._connect(transport) for _ in range(1, min(welcome.streams, self.config.streams))]
        joining = [self._start("join", functools.partial(self._join, link, greeting, welcome)) for link in others]
        for thread in joining:
            thread.join()
        self.check()
        self.standby_suspects = {item.name: item.suspect for item in welcome.volumes if item.suspect}

    def _join(self, link: Link, greeting: hello.Hello, first: hello.Welcome) -> None:
        try:
            self._add_lane(link, handshake.join(link, greeting, first))
        except BmigrateError as error:
            if error.reason in SESSION_GONE:
                # The first stream knows better why. To try again helps, which a refusal would deny.
                self._heed_last_words()
                error = UnreachableError(error.message, host=error.host, hint=error.hint, reason=error.reason)
            self.fail(error)
        except Exception as exc:
            _log.exception("a stream of workload %s could not join", self.config.workload)
            self.fail(DefectError(f"join: {exc!r}", reason="unexpected"))

    def _connect(self, transport: Transport) -> Link:
        stream = transport.open(self.config)
        self._streams.append(stream)
        return Link(stream, self.config.peer.name)

    def _add_lane(self, link: Link, welcome: hello.Welcome) -> None:
        with self._cond:
            lane = Lane(len(self.lanes), link, welcome.v, self._lost)
            if welcome.compression:
                lane.packer = Packer()
            self.lanes.append(lane)
        # Now, not when all are there: it keeps this one alive while others take long to join.
        self._start(f"reader-{lane.number}", functools.partial(self._read_frames, lane))

    def _begin(self) -> None:
        tracker = self.tracker
        self._ack_tracker = Tracker(self._breqd_socket, self.config.workload)
        if self._ack_tracker.status().incarnation != self.incarnation:
            raise tracker.restarted()
        known = tracker.status().suspects
        for name, reason in self.standby_suspects.items():
            if name not in known:
                tracker.suspect(name, f"standby: {reason}")
        # WELCOME says that every receiver of an older epoch is gone, durably. Only now may what they
        # had under way be claimed again: were breqd told earlier, an old frame could land after a new one.
        tracker.fence(self.epoch, self.session_id)
        self._fenced = True
        self.record.opened(self.epoch, self.session_id)
        self._start("acknowledger", self._acknowledge)
        if len(self.lanes) > 1:
            self._start("syncer", self._send_syncs)

    def _start(self, name: str, body: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=body, name=f"{self.config.workload}-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    # -- failure ---------------------------------------------------------------------------------

    @property
    def tracker(self) -> Tracker:
        """The connection to breqd of the sending thread."""
        assert self._tracker is not None
        return self._tracker

    @property
    def failure(self) -> BmigrateError | None:
        """Why the session ended, or None."""
        return self._failure

    def fail(self, error: BmigrateError) -> None:
        """End the session, from any thread; the first reason stays."""
        with self._cond:
            if self._failure is None:
                self._failure = error
            self._cond.notify_all()
        for stream in self._streams:
            stream.kill()

    def check(self) -> None:
        """Raise the failure of the session, if there is one."""
        if self._failure is not None:
            raise self._failure

    def _heed_last_words(self) -> None:
        """Wait a moment for another thread to say why the session is over."""
        with self._cond:
            self._cond.wait_for(lambda: self._failure is not None, LAST_WORDS_SECONDS)

    def _lost(self) -> BmigrateError:
        """The write side saw the end of the stream: wait for the reader, which learns why."""
        deadline = time.monotonic() + 5.0
        with self._cond:
            while self._failure is None and time.monotonic() < deadline:
                self._cond.wait(0.2)
        self.fail(closed_by_peer(self.config.peer.name, ""))
        assert self._failure is not None
        return self._failure

    def _wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait, with the lock held, until ``ready``; the failure of the session wins.

        Raises:
            UnreachableError: ``seconds`` have passed since anything was acknowledged or answered, and the time that a
                slow standby needs for what is under way.
        """
        began, seen = time.monotonic(), self._progress()
        while not ready():
            self.check()
            now, progress = time.monotonic(), self._progress()
            if progress != seen:
                began, seen = now, progress
            limit = seconds + self._window.in_flight_total_bytes / SLOWEST_BYTES_PER_SECOND
            if now - began > limit:
                raise UnreachableError(f"no {what} within {limit:.0f} s", host=self.config.peer.name, reason="silent")
            self._cond.wait(min(limit - (now - began), 1.0))
        self.check()

    def _progress(self) -> tuple[int, int, int]:
        return self._window.last_ack, self._window.in_flight_claims, len(self._expected)

    # -- sending: the caller's thread, and one more for each further stream ------------------------

    def send(self, type_: FrameType, *, volume: int = 0, offset: int = 0, aux: int = 0, payload: bytes = b"") -> None:
        """Write one frame to the first stream.

        Raises:
            BmigrateError: why the session is over.
        """
        self.check()
        self.lanes[0].send(type_, volume=volume, offset=offset, aux=aux, payload=payload)

    def claim(self, volume: SourceVolume, from_offset: int, max_bytes: int) -> Claim | None:
        """Claim the next dirty blocks at or above an offset; for any thread."""
        self.check()
        with self._asking:
            claim = self.tracker.claim(volume.name, self.epoch, max_bytes, from_offset, self.incarnation)
        faults.point("ship.claimed")
        return claim

    def _has_room(self) -> bool:
        return (
            self._window.in_flight_claims < MAX_CLAIMS_IN_FLIGHT and self._window.in_flight_bytes < MAX_BYTES_IN_FLIGHT
        )

    def _sync_bytes(self) -> float:
        rate = self.rate.bytes_per_second or 0.0
        return min(max(MIN_SYNC_BYTES, rate * SYNC_RATE_SECONDS), MAX_SYNC_BYTES)

    def sent(self, claim: Claim) -> None:
        """All frames of the claim were sent on its lane; a SYNC follows soon. Waits while too much is under way.

        Raises:
            BmigrateError: why the session is over.
        """
        now = time.monotonic()
        with self._cond:
            if not self._window.unsynced:
                self._sync_due = now + SYNC_SECONDS
            self._window.sent(claim)
            self.rate.sent(now)
            due = self._window.unsynced_bytes >= self._sync_bytes() or now >= self._sync_due
            due = due and self._window.syncs_under_way < SYNCS_IN_FLIGHT
            room = self._has_room()
        if due or not room:
            self.flush()
        if not room:
            with self._cond:
                self._wait(self._has_room, ANSWER_SECONDS, "acknowledgement")
                self.standby_wait_seconds += time.monotonic() - now

    def sync(self) -> int:
        """Ask for everything sent so far to be made durable; returns the number of the SYNC.

        With one stream it leaves at once; with several the syncer sends MARKs first.
        """
        with self._cond:
            number = self._window.sync()
            several = len(self.lanes) > 1
            if several:
                claims = [claim for claim in self._window.last_batch if claim.lane]
                written = {claim.volume for claim in claims}
                volumes = sum(1 << volume.index for volume in self.volumes if volume.name in written)
                # A claim is in the window only when the last of its frames was written: a MARK comes after it.
                lanes = {claim.lane for claim in claims}
                self._marks.wait(number, lanes, volumes)
                self._due.append((number, lanes))
                self._cond.notify_all()
        if not several:
            self.send(FrameType.SYNC, aux=number)
            faults.point("ship.synced")
        return number

    def _send_syncs(self) -> None:
        """The syncer: MARKs in the order of their numbers, and each SYNC that waits for no stream any more.

        A thread of its own, because a stream that is full keeps it waiting, and must not keep the others.
        """
        try:
            while True:
                with self._cond:
                    self._cond.wait_for(lambda: self._due or self._marked or self._failure is not None)
                    if self._failure is not None:
                        return
                    due, self._due, self._marked = self._due, [], False
                for number, lanes in due:
                    for lane in sorted(lanes):
                        self.check()
                        self.lanes[lane].send(FrameType.MARK, aux=number)
                with self._cond:
                    ready = self._marks.ready()
                if ready is not None:
                    self.send(FrameType.SYNC, aux=ready.number, offset=ready.volumes)
                    faults.point("ship.synced")
        except BmigrateError as error:
            self.fail(error)
        except Exception as exc:
            _log.exception("the syncer of workload %s failed", self.config.workload)
            self.fail(DefectError(f"syncer: {exc!r}", reason="unexpected"))

    def flush(self) -> None:
        """A SYNC if anything was sent since the last one; does not wait."""
        if self._window.unsynced:
            self.sync()

    def settle(self) -> None:
        """Wait until everything sent so far is durable and breqd has cleared it."""
        self.flush()
        number = self._window.last_sync
        with self._cond:
            self._wait(
                lambda: self._window.last_ack >= number and not self._window.in_flight_claims,
                ANSWER_SECONDS,
                "acknowledgement",
            )

    def measure_latency(self) -> None:
        """An empty SYNC and its answer, for the rate; call when nothing is under way."""
        began = time.monotonic()
        number = self.sync()
        with self._cond:
            self._wait(lambda: self._window.last_ack >= number, ANSWER_SECONDS, "acknowledgement")
            self.rate.round_trip(time.monotonic() - began)

    @property
    def in_flight_claims(self) -> int:
        """Claims between sent and cleared."""
        return self._window.in_flight_claims

    def request(self, type_: FrameType, answer: FrameType, digests: int, **fields: object) -> None:
        """Send HASH, REREAD or RESYNC_DONE; its answer comes in order through ``answer``."""
        with self._cond:
            self._expected.append((answer, digests))
        self.send(type_, **fields)  # type: ignore[arg-type]

    @property
    def unanswered(self) -> bool:
        """Whether an answer is under way, or has come and was not taken: answers are told apart by their order alone,
        so whoever asked next would take it for one of its own."""
        with self._cond:
            return bool(self._expected or self._answers)

    @property
    def answered(self) -> bool:
        """Whether an answer has come and was not taken."""
        with self._cond:
            return bool(self._answers)

    def answer(self) -> bytes:
        """The payload of the answer to the oldest request; one that has come is given also when the session is over."""
        with self._cond:
            if not self._answers:
                self._wait(lambda: bool(self._answers), ANSWER_SECONDS, "answer")
            return self._answers.popleft()

    def distrust(self, volume: str, reason: str) -> None:
        """Have breqd suspect a volume, whatever has become of this session.

        When breqd cannot be told, the record says that nothing is known, and the next session suspects every volume.

        Args:
            reason: what was seen.
        """
        try:
            try:
                with self._asking:
                    self.tracker.suspect(volume, reason)
            except BmigrateError:
                with contextlib.closing(Tracker(self._breqd_socket, self.config.workload)) as tracker:
                    tracker.suspect(volume, reason)
        except BmigrateError as error:
            _log.error("volume %s: %s; breqd could not be told: %s", volume, reason, error)
            self.record.distrust()

    def breqd(self, call: Callable[[Tracker], T]) -> T:
        """Ask breqd something; its loss ends the session."""
        self.check()
        try:
            with self._asking:
                return call(self.tracker)
        except UnreachableError as error:
            self.fail(error)
            raise

    def snapshot(self) -> Snapshot:
        """breqd's view of the workload.

        Raises:
            RefusedError: breqd is another one than when the session began, or a volume was attached anew meanwhile
                (resized, or replaced): this session knows the old one and its size, and can prove nothing of the new.
        """
        snapshot = self.breqd(lambda tracker: tracker.status())
        if snapshot.incarnation != self.incarnation:
            raise self.tracker.restarted()
        for volume in self.volumes:
            tracked = snapshot.volumes.get(volume.name)
            if tracked is None or not tracked.attached:
                continue  # who works with it refuses that, and knows why
            if (tracked.attachment_id, tracked.size_bytes) == (volume.attachment_id, volume.size_bytes):
                continue
            raise RefusedError(
                f"{volume.path} was attached anew during the session, with {tracked.size_bytes} bytes",
                volume=volume.name,
                hint="a new session begins by itself; the volume is compared as a whole",
                reason="attached_anew",
            )
        return snapshot

    def barrier(self, drain: str | None = None) -> dict[str, int]:
        """breqd's barrier: records so far, by volume."""
        return self.breqd(lambda tracker: tracker.barrier(drain))

    def mark(self, volume: str, extents: Sequence[tuple[int, int]], reason: str) -> None:
        """Make ranges dirty."""
        self.breqd(lambda tracker: tracker.mark(volume, extents, reason))

    # -- taking in: the reader and the acknowledger ------------------------------------------------

    def _read_frames(self, lane: Lane) -> None:
        take = self._take if lane.number == 0 else functools.partial(self._take_marked, lane)
        try:
            lane.read(self._silence_seconds, take, lambda: self._failure is not None)
        except StreamEnded:
            error = lane.link.stream.failure() if not self._closing else closed_by_peer(self.config.peer.name, "")
            if len(self.lanes) > 1:
                # The end of one stream is the end of all: the one that began it may have said why.
                self._heed_last_words()
            self.fail(error)
        except BmigrateError as error:
            self.fail(error)
        except ProtocolError as exc:
            self.fail(RefusedError(str(exc), host=self.config.peer.name, reason="bad_answer"))
        except frames.FrameError as exc:
            self.fail(RefusedError(f"{self.config.peer.name}: {exc}", host=self.config.peer.name, reason=exc.reason))
        except Exception as exc:
            _log.exception("a reader of workload %s failed", self.config.workload)
            self.fail(DefectError(f"reader: {exc!r}", reason="unexpected"))
        finally:
            if lane.number == 0:
                self._acks.put(None)

    def _take_marked(self, lane: Lane, frame: frames.Frame) -> None:
        """A frame on another stream than the first."""
        if frame.type is FrameType.MARKED:
            with self._cond:
                self._marks.marked(lane.number, frame.aux)
                self._marked = True
                self._cond.notify_all()
        elif frame.type in (FrameType.ERROR, FrameType.PING, FrameType.PONG, FrameType.BYE):
            self._take(frame, lane)
        else:
            raise RefusedError(
                f"{self.config.peer.name} sent {frame.type.name} on a further stream", reason="bad_answer"
            )

    def _take(self, frame: frames.Frame, lane: Lane | None = None) -> None:
        peer = self.config.peer.name
        if frame.type is FrameType.ACK:
            self._acks.put(frame.aux)
        elif frame.type in _DIGEST_BYTES:
            size = _DIGEST_BYTES[frame.type]
            with self._cond:
                wanted = self._expected.popleft() if self._expected else None
                if wanted != (frame.type, len(frame.payload) // size):
                    raise RefusedError(f"{peer} sent {frame.type.name} that were not asked for", reason="bad_answer")
                self._answers.append(bytes(frame.payload))
                self._cond.notify_all()
        elif frame.type is FrameType.ERROR:
            raise errors.from_dict(hello.decode_error(frame.payload))
        elif frame.type is FrameType.PING:
            (lane or self.lanes[0]).link.send_if_free(FrameType.PONG)
        elif frame.type is FrameType.BYE:
            raise closed_by_peer(peer, "the receiver said goodbye")

    def _acknowledge(self) -> None:
        assert self._ack_tracker is not None
        try:
            while True:
                number = self._acks.get()
                if number is None:
                    return
                with self._cond:
                    claims = self._window.acked(number)
                self.record.acked(number)
                faults.point("ship.acked")
                for claim in claims:
                    self._ack_tracker.ack(claim)
                    self.on_durable(claim)
                    with self._cond:
                        self._window.released(claim)
                        idle = not self._window.in_flight_claims
                        if claim.same_bytes:
                            self.rate.void()
                        else:
                            self.rate.durable(claim.data_bytes, time.monotonic(), idle)
                        self._cond.notify_all()
                with self._cond:
                    self._cond.notify_all()
        except BmigrateError as error:
            self.fail(error)
        except ProtocolError as exc:
            self.fail(RefusedError(str(exc), host=self.config.peer.name, reason="bad_answer"))
        except Exception as exc:
            _log.exception("the acknowledger of workload %s failed", self.config.workload)
            self.fail(DefectError(f"acknowledger: {exc!r}", reason="unexpected"))

    # -- the end -----------------------------------------------------------------------------------

    def close(self, farewell: bool = False) -> None:
        """End everything that belongs to the session; may be repeated.

        Args:
            farewell: say BYE first, so that the receiver ends without an error.
        """
        if farewell and self._failure is None and self.lanes:
            self._closing = True
            try:
                # To the first only: with its receiver hold ends the others, which have nothing under way by then.
                self.lanes[0].link.send(FrameType.BYE)
                with self._cond:
                    self._cond.wait_for(lambda: self._failure is not None, 2.0)
            except StreamEnded:
                _log.debug("the receiver was gone before the goodbye")
        self._closing = True
        if self._streams:
            self.fail(closed_by_peer(self.config.peer.name, "closed on this side"))
        for thread in self._threads:
            thread.join()
        if self._fenced and self._tracker is not None:
            try:
                self._tracker.end_session(self.epoch)
            except BmigrateError as error:
                # breqd is gone or restarted; it will take no claim or acknowledgement of this epoch then
                _log.debug("end_session: %s", error)
            self._fenced = False
        for stream in self._streams:
            stream.close()
        for tracker in (self._tracker, self._ack_tracker):
            if tracker is not None:
                tracker.close()
        self._tracker = self._ack_tracker = None
        for volume in self.volumes:
            volume.close()
        self.record.close()
