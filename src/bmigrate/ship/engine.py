# SPDX-License-Identifier: GPL-3.0-or-later
"""One workload's shipper: a thread that keeps a session open while one is wanted, and passes going.

Promises: whatever ends a session, the next one begins with a new epoch, after a growing pause; a
request is always answered; the state shown is derived from facts (``verdict``), never set. It never
decides a role: that is in state.json, which others write.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from bmigrate.common import log, paths, state
from bmigrate.common.config import Config
from bmigrate.common.errors import (
    BmigrateError,
    DefectError,
    PhaseError,
    RefusedError,
    SuspectError,
    UnreachableError,
    UsageError,
)
from bmigrate.ship import drain as drains
from bmigrate.ship import status, verdict, verify, wanted
from bmigrate.ship.jobs import Job
from bmigrate.ship.pacer import Pacer
from bmigrate.ship.pacing import backoff
from bmigrate.ship.passes import PassResult, run_pass
from bmigrate.ship.rates import DirtyRate, ShipRate, predicted_drain_seconds
from bmigrate.ship.record import Record
from bmigrate.ship.resync import Resync
from bmigrate.ship.session import Session
from bmigrate.ship.source import SourceVolume
from bmigrate.ship.tracker import Snapshot
from bmigrate.ship.transport import Transport
from bmigrate.ship.waiting import Waiting
from bmigrate.ship.wanted import Wanted

IN_STEP_INTERVAL_SECONDS = 0.3
"""Rest between two passes that found little: small writes gather meanwhile and cost less."""
IDLE_INTERVAL_SECONDS = 1.0
#: A session that lasted so long was a good one: the next attempt comes soon.
STEADY_SECONDS = 60.0
"""Rest after a look that found nothing: the most that a first write waits to be seen."""
_log = logging.getLogger("ship")


class Engine(threading.Thread):
    """The shipper of one workload. ``start`` it; ``stop`` and ``join`` end it.

    Args:
        config: of the workload.
        transport: carries its sessions.
    """

    def __init__(self, config: Config, transport: Transport) -> None:
        super().__init__(name=f"ship-{config.workload}", daemon=True)
        self.config = config
        self.transport = transport
        self.record = Record(config.workload)
        self.pacer = Pacer(self.bandwidth, config.services)
        self.trend = verdict.Trend()
        self.dirty_rate = DirtyRate()
        self.ship_rate = ShipRate()
        self.totals = status.Totals()
        self.session: Session | None = None
        self.snapshot: Snapshot | None = None
        self.activity: str | None = None
        self.progress: dict[str, int] | None = None
        self._limiter: str | None = None
        self._counted: Snapshot | None = None
        self.last_error: BmigrateError | None = None
        self.defect: BaseException | None = None
        self._sealed_by: str | None = None
        self._drained: dict[str, dict[str, Any]] = {}
        self._unsealed: frozenset[str] = frozenset()
        self._told: str | None = None
        self._attempt = 0
        self._disconnected_since = time.monotonic()
        self._waiting = Waiting(self.pacer.urgent)
        self._wake = threading.Condition()
        self._woken = False
        self._stopping = False
        self._state = state.load(config.workload)

    # -- from the daemon's loop --------------------------------------------------------------------

    def post(self, job: Job) -> None:
        """Take in a job; it is answered by this engine whatever happens.

        Raises:
            RefusedError, PhaseError, SuspectError: it cannot be done now.
        """
        now = self.wanted()
        run_id = str(job.fields.get("run_id"))
        if job.kind == "drain" and now.what == "sealed" and run_id in self._drained:
            job.done(self._drained[run_id])
            return
        if now.what == "sealed":
            raise PhaseError(
                f"workload {self.config.workload} is drained and sealed for another run",
                hint="finish that handover, or give it up: bmigrate handover resume",
                reason="sealed",
            )
        if now.what != "ship":
            raise self._not_shipped()
        if job.kind == "drain" and self.activity == "resyncing":
            raise SuspectError(
                "the volumes are being compared by checksum; a drain needs a workload that is in step",
                hint="bmigrate sync --wait",
                reason="suspect",
            )
        self._waiting.add(job)
        self.wake()

    def wake(self) -> None:
        """Have the thread look at what changed."""
        with self._wake:
            self._woken = True
            self._wake.notify_all()

    def pause(self, paused: bool) -> bool:
        """Pause or go on, durably; returns whether that changed anything.

        Raises:
            OSError: it could not be made durable, and nothing has changed.
        """
        if self.record.paused == paused:
            return False
        self.record.change(paused=paused)
        self.wake()
        return True

    @property
    def bandwidth(self) -> int:
        """The bandwidth limit in bytes per second, 0 for none: the operator's, else the configuration's."""
        own = self.record.bandwidth
        return self.config.limits.bandwidth_bytes_per_second if own is None else own

    def limit(self, bandwidth: object) -> bool:
        """Set the bandwidth limit, durably and at once; None: the configuration's. Returns whether it changed.

        Raises:
            UsageError: it is no number of bytes per second.
            OSError: it could not be made durable, and nothing has changed.
        """
        if bandwidth is not None and (not isinstance(bandwidth, int) or isinstance(bandwidth, bool) or bandwidth < 0):
            raise UsageError(f"{bandwidth!r} is no number of bytes per second", reason="bad_limit")
        if self.record.bandwidth == bandwidth:
            return False
        self.record.change(bandwidth=bandwidth)
        self.pacer.set_bandwidth(self.bandwidth)
        return True

    def unseal(self) -> bool:
        """Lift the seal of a drain, and give up a drain that is under way; returns whether there was one."""
        with self._wake:
            found = self._waiting.cancel_drains() or self.wanted().what == "sealed"
            handover = (self._state.handover if self._state is not None else None) or {}
            lifted = {run_id for run_id in (self._sealed_by, handover.get("run_id")) if run_id}
            self._unsealed = self._unsealed | lifted
            self._sealed_by = None
            self._attempt = 0
        self.wake()
        return found

    def reload(self) -> None:
        """state.json may have changed."""
        self._state = state.load(self.config.workload)
        if self._sealed_by is not None and not wanted.keeps_seal(self._state, self._sealed_by):
            self._sealed_by = None
        self.wake()

    def refresh_state(self) -> None:
        """Notice a state.json that changed without a word; a seal stays."""
        fresh = state.load(self.config.workload)
        if fresh != self._state:
            self._state = fresh
            self.wake()

    def reconnect(self) -> bool:
        """End the session, if there is one, and open a new one at once."""
        session = self.session
        self._attempt = 0
        if session is not None:
            session.fail(UnreachableError("the operator asked for a new session", reason="reconnect"))
        self.wake()
        return session is not None

    def _tell_state(self) -> None:
        """One entry in the journal for each change of the state that was seen."""
        name, reason = self.state()
        if name == self._told:
            return
        text = f"workload {self.config.workload}: {self._told or 'started'} -> {name}" + (
            f": {reason}" if reason else ""
        )
        level = logging.WARNING if name in verdict.TROUBLE else logging.INFO
        log.event(_log, level, "state", text, self.config.workload, state=name, before=self._told)
        self._told = name

    def observe(self, snapshot: Snapshot | None) -> None:
        """Take in breqd's view, sampled by the daemon about once a second; None: breqd does not answer."""
        self.snapshot = snapshot
        if snapshot is not None:
            self.dirty_rate.sample(time.monotonic(), snapshot.written_bytes, snapshot.counting)
            self.pacer.foreground_writes = (self.dirty_rate.bytes_per_second or 0.0) > 1024.0
        self._tell_state()
        self._waiting.expire(lambda job: status.late(self, job))

    def stop(self) -> None:
        """Ask the thread to end; ``join`` it afterwards."""
        self._stopping = True
        self._waiting.close(self._not_shipped())
        self.wake()

    def wanted(self) -> Wanted:
        """What the thread should be doing."""
        return wanted.decide(self._state, self.record.paused, self._sealed_by, self._unsealed)

    # -- the thread --------------------------------------------------------------------------------

    def run(self) -> None:
        """Until stopped: a session while one is wanted."""
        try:
            while not self._stopping:
                if self.wanted().what != "ship":
                    self._waiting.refuse(self._not_shipped())
                    self._sleep(5.0)
                    continue
                self._one_session()
        except BaseException as exc:
            self.defect = exc
            _log.exception("workload %s: the shipper failed", self.config.workload)
        finally:
            self._waiting.close(self._not_shipped())

    def _one_session(self) -> None:
        try:
            generation = self._state.generation if self._state is not None else None
            assert generation is not None
            session = Session.open(
                self.config, generation, self.record, self.ship_rate, self.transport, paths.breqd_socket()
            )
        except (BmigrateError, OSError) as exc:
            self._note(exc)
            self._attempt += 1
            self._waiting.no_session(
                self.last_error or UnreachableError("no session with the standby", reason="disconnected"),
                final=isinstance(self.last_error, RefusedError),
                lost_seconds=time.monotonic() - self._disconnected_since,
            )
            self._sleep(backoff(self._attempt))
            return
        peer = self.config.peer.name
        text = f"workload {self.config.workload}: session of epoch {session.epoch} with {peer}"
        log.event(_log, logging.INFO, "session", text, self.config.workload, peer=peer, epoch=session.epoch)
        self.last_error = None
        self._nothing_known()
        session.on_durable = self.totals.durable
        self.session = session
        opened = time.monotonic()
        farewell = False
        try:
            self._serve(session)
            farewell = True
        except (BmigrateError, OSError) as exc:
            # what a thread of the session saw first explains more than what followed from it
            self._note(session.failure or exc)
            # One that opens, and fails at the same place again, is tried less and less often.
            self._attempt = 1 if time.monotonic() - opened > STEADY_SECONDS else self._attempt + 1
        finally:
            self.session = None
            self.activity = None
            self.progress = None
            self._disconnected_since = time.monotonic()
            session.close(farewell)
        if not farewell:
            self._sleep(backoff(self._attempt))

    def _note(self, exc: Exception) -> None:
        error = exc if isinstance(exc, BmigrateError) else RefusedError(str(exc), reason="os_error")
        if self.last_error is None or str(self.last_error) != str(error):
            _log.warning("workload %s: %s", self.config.workload, error)
        self.last_error = error

    def _serve(self, session: Session) -> None:
        """Work in an open session until it is no longer wanted; its failure is raised."""
        while not self._stopping and self.wanted().what == "ship":
            session.check()
            if self._run_job(session):
                continue
            before = session.snapshot()
            self.snapshot = before
            self._check_attached(before)
            if self._resync(session, before):
                continue
            self._between(before)
            if before.left_bytes or session.in_flight_claims:
                self._pass(session, before)
            else:
                self._passed(PassResult(), before, before)
                if (self.predicted(before) or 0.0) > self.config.limits.max_drain_seconds:
                    # Slow once is not slow for ever, and without writes nothing else would show it.
                    session.measure_latency()
            self._judge_converging()
            if self.trend.caught_up:
                quiet = IDLE_INTERVAL_SECONDS if not before.left_bytes else IN_STEP_INTERVAL_SECONDS
                self._sleep(0.05 if self.pacer.urgent.is_set() else quiet)

    def _check_attached(self, snapshot: Snapshot) -> None:
        """A volume whose writes are no longer recorded cannot be shipped, and a resync would prove nothing."""
        for volume in self.config.volumes:
            tracked = snapshot.volumes.get(volume.name)
            if tracked is None or not tracked.attached:
                raise RefusedError(
                    f"breqd no longer tracks volume {volume.name}"
                    + (f": {tracked.suspect}" if tracked is not None and tracked.suspect else ""),
                    volume=volume.name,
                    hint="see: bmigrate status, and systemctl status breqd",
                    reason="not_attached",
                )

    def _interrupted(self) -> bool:
        """Whether a walk should end early: something else is wanted, or a drain waits."""
        if self._stopping or self.wanted().what != "ship":
            return True
        return self._waiting.drain_waits()

    def _pass(self, session: Session, before: Snapshot) -> None:
        result = run_pass(session, self.pacer, self._interrupted, left_bytes=before.left_bytes)
        if not result.complete:
            return
        if result.claims or session.in_flight_claims:
            session.settle()
        after = session.snapshot()
        self.snapshot = after
        self._passed(result, before, after)

    def _passed(self, result: PassResult, before: Snapshot, after: Snapshot) -> None:
        """A pass is complete and durable: what does it say?"""
        self._attempt = 0
        self._limiter = result.limiter
        fresh = {name: item.seed_count for name, item in before.volumes.items()}
        if any(self.record.seeded.get(name) != count for name, count in fresh.items()):
            # the walk began after these seeds and visited everything, so each volume was shipped once
            self.record.change(seeded={**self.record.seeded, **fresh})
        discarded = self._discarded(after)
        limit = self.config.limits.max_drain_seconds
        if self.trend.finished(before.left_bytes, after.left_bytes, self.predicted(after), limit, discarded):
            self._tell_trim(discarded)
        self.pacer.losing = self.trend.slipping

    def _between(self, before: Snapshot) -> None:
        """A pass is about to begin: what was discarded since the last one?"""
        discarded = self._discarded(before)
        limit = self.config.limits.max_drain_seconds
        if self.trend.between(discarded, before.left_bytes, self.predicted(before), limit):
            self._tell_trim(discarded)

    def _discarded(self, now: Snapshot) -> int:
        """Bytes that the workload discarded since this was asked last, in this session."""
        last, self._counted = self._counted, now
        return now.discarded_bytes - last.discarded_bytes if last is not None and now.counting == last.counting else 0

    def _tell_trim(self, discarded: int) -> None:
        workload = self.config.workload
        text = f"workload {workload}: {verdict.trimmed(discarded)}; it does not count as losing ground"
        log.event(_log, logging.INFO, "trim", text, workload, discarded_bytes=discarded)

    def _nothing_known(self) -> None:
        """What earlier passes said of this workload is over: a new session, or a comparison of everything."""
        self._counted = None
        self.trend.disconnected()
        self.pacer.losing = self.trend.slipping

    def predicted(self, snapshot: Snapshot | None) -> float | None:
        """Predicted seconds of a drain, or None when unknown."""
        if snapshot is None:
            return None
        rate = self.ship_rate
        return predicted_drain_seconds(
            snapshot.left_bytes, rate.bytes_per_second, rate.latency_seconds, self.dirty_rate.bytes_per_second
        )

    @property
    def limiter(self) -> str | None:
        """What limits the pass under way once it has gone on for some seconds, else what limited the last one."""
        began = self.pacer.began
        seconds = time.monotonic() - began if began is not None else 0.0
        return self.pacer.limiter(seconds) if seconds > 3.0 else self._limiter

    def seeding(self) -> bool:
        """Whether a volume was not completely shipped once since its last seed."""
        if self.snapshot is None:
            return False
        seeded = self.record.seeded
        volumes = self.snapshot.volumes.items()
        return any(item.seed_count and seeded.get(name) != item.seed_count for name, item in volumes)

    # -- resync ------------------------------------------------------------------------------------

    def _resync(self, session: Session, snapshot: Snapshot) -> bool:
        """Compare the suspect volumes; returns whether there were any."""
        reasons = {**session.standby_suspects, **snapshot.suspects}
        # Of one whose tracker is blind a comparison would prove nothing: it stays suspect, and what is known to be
        # dirty is shipped all the same.
        tracked = snapshot.volumes
        volumes = [item for item in session.volumes if item.name in reasons and not tracked[item.name].blind]
        if not volumes:
            return False
        reasons = {volume.name: reasons[volume.name] for volume in volumes}
        for name, reason in sorted(reasons.items()):
            _log.warning("workload %s: volume %s is compared by checksum: %s", self.config.workload, name, reason)
        self.activity = "resyncing"
        self.progress = {"done_bytes": 0, "total_bytes": sum(volume.size_bytes for volume in volumes)}
        self._nothing_known()
        try:
            for volume in volumes:
                self._resync_one(session, volume)
        except RefusedError as error:
            if error.reason != "interrupted":
                raise
        finally:
            self.activity = None
            self.progress = None
        return True

    def _resync_one(self, session: Session, volume: SourceVolume) -> None:
        name, identifier = volume.name, ""

        def begun(given: str) -> None:
            nonlocal identifier
            identifier = given

        def already(count: int) -> None:
            if self.progress is not None:
                self.progress["done_bytes"] += count

        def compared(count: int) -> None:
            # Not when the resync begins: an id says that everything was made dirty since, and a session may end
            # between breqd's answer and that mark. The first comparison comes behind the mark.
            if self.record.resyncs.get(name) != identifier:
                self._keep_resync(name, identifier)
            self._hashed(count)

        resume = self.record.resyncs.get(name)
        Resync(session, self.pacer, volume, self._interrupted, compared, already, resume, begun).run()
        self._keep_resync(name, None)
        self._attempt = 0

    def _keep_resync(self, volume: str, identifier: str | None) -> None:
        """Remember a resync under way, also over a kill of this daemon; None: it is done.

        What can come in between, and why an id that is wrong does no harm: breqd goes on only with the very id that it
        gave last for this volume, in this run of its process, if no suspicion came up since. Killed before the id is
        kept: the next daemon has none, or an older one that breqd replaced. Killed after the end and before it is
        forgotten: breqd has dropped it. breqd or the host died meanwhile: its ids are in its memory only. The standby
        was written to or reverted meanwhile: it says so at the handshake, and then no id is shown to breqd at all.
        """
        resyncs = {name: kept for name, kept in self.record.resyncs.items() if name != volume}
        if identifier is not None:
            resyncs[volume] = identifier
        try:
            self.record.change(resyncs=resyncs)
        except OSError as exc:
            _log.warning("workload %s: a restart begins this resync anew: %s", self.config.workload, exc)
            self.record.resyncs = resyncs

    def _hashed(self, count: int) -> None:
        self.totals.hashed_bytes += count
        if self.progress is not None:
            self.progress["done_bytes"] += count

    # -- jobs --------------------------------------------------------------------------------------

    def _run_job(self, session: Session) -> bool:
        job = self._waiting.next()
        if job is None:
            return False
        try:
            if job.kind == "drain":
                self._drain(session, job)
            else:
                self._verify(session, job)
        except BmigrateError as error:
            if session.unanswered:
                # The next comparison would be given this one's answers, and call a block equal that was never compared.
                session.fail(error)
            # What was seen of the standby's disk is worth more than how the session ended.
            job.failed(error if error.reason == drains.MISMATCH else session.failure or error)
            session.check()
        except OSError as exc:
            job.failed(RefusedError(str(exc), reason="os_error"))
            raise
        finally:
            if not job.over:
                job.failed(DefectError(f"{job.kind} ended without an answer", reason="unexpected"))
            self._waiting.finished()
        return True

    def _drain(self, session: Session, job: Job) -> None:
        self.activity = "draining"
        try:
            run_id = str(job.fields.get("run_id"))
            result = drains.drain(
                session, self.pacer, run_id, job.deadline, lambda: job.cancelled, self._drain_progress
            )
            with self._wake:
                # A source that was told to resume meanwhile must not be sealed behind its back.
                if job.cancelled:
                    raise RefusedError("the drain was given up", hint="begin a new handover", reason="cancelled")
                # Sealed before anybody hears of it: from the answer on nothing may reach the standby any more.
                self._unsealed = self._unsealed - {run_id}
                self._sealed_by = run_id
                self._drained = {run_id: result}
            job.done(result)
        finally:
            self.activity = None
            self.progress = None

    def _drain_progress(self, done: int, total: int) -> None:
        self.progress = {"done_bytes": done, "total_bytes": max(done, total)}

    def _verify(self, session: Session, job: Job) -> None:
        self.progress = {"done_bytes": 0, "total_bytes": sum(volume.size_bytes for volume in session.volumes)}
        try:
            outcome = verify.verify(session, self.pacer, lambda: job.cancelled or self._interrupted(), self._hashed)
            if outcome.different and job.fields.get("mark"):
                for name, extents in outcome.different.items():
                    session.mark(name, extents, "verify found it different")
            job.done({**outcome.to_dict(), "marked": bool(outcome.different and job.fields.get("mark"))})
        finally:
            self.progress = None

    def _judge_converging(self) -> None:
        """Answer the converge jobs that are reached, or out of time."""
        self._waiting.expire(lambda job: status.late(self, job))
        snapshot = self.snapshot
        predicted = self.predicted(snapshot)
        if snapshot is None or predicted is None or snapshot.suspects or self.seeding() or not self.trend.caught_up:
            return
        for job in self._waiting.converging():
            if predicted <= float(job.fields["max_drain_seconds"]):
                job.done({"predicted_drain_seconds": predicted, "bytes_left": snapshot.left_bytes})
        self._waiting.judged()

    def _not_shipped(self) -> RefusedError:
        now = self.wanted()
        return RefusedError(
            f"workload {self.config.workload} is not shipped from this host: {now.reason or now.what}",
            hint="see: bmigrate status",
            reason=now.what if now.what != "ship" else "stopping",
        )

    def _sleep(self, seconds: float) -> None:
        with self._wake:
            if not self._woken:
                self._wake.wait(seconds)
            self._woken = False

    # -- what it shows -----------------------------------------------------------------------------

    def state(self) -> tuple[str, str | None]:
        """The state and its reason."""
        return status.state(self)

    def report(self) -> dict[str, Any]:
        """The status entry of this workload."""
        return status.entry(self)
