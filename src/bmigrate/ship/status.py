# SPDX-License-Identifier: GPL-3.0-or-later
"""The numbers that the shipper shows: totals, and one status entry per workload.

It only reads. Units are part of the key names; a number that was not measured yet is null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError
from bmigrate.ship import gentle, verdict
from bmigrate.ship.jobs import Job
from bmigrate.ship.window import Claim

if TYPE_CHECKING:
    from bmigrate.ship.engine import Engine


NO_BREQD = UnreachableError("breqd does not answer", hint="see: systemctl status breqd", reason="breqd_unreachable")


@dataclass
class Totals:
    """Since the daemon started. Bytes; shipped bytes are those that became durable on the standby."""

    shipped_bytes: int = 0
    zero_bytes: int = 0
    same_bytes: int = 0
    hashed_bytes: int = 0

    def durable(self, claim: Claim) -> None:
        """A claim was acknowledged and cleared."""
        self.shipped_bytes += claim.data_bytes
        self.zero_bytes += claim.zero_bytes
        self.same_bytes += claim.same_bytes


def state(engine: Engine) -> tuple[str, str | None]:
    """The state of a workload and its reason, from the facts of this moment."""
    now, snapshot, session, problem = engine.wanted(), engine.snapshot, engine.session, engine.last_error
    suspects: dict[str, str] = {}
    if session is not None:
        # As good as over: it has failed and nobody has noticed yet, or breqd does not say what is dirty.
        problem = session.failure or (NO_BREQD if snapshot is None else problem)
        suspects.update(session.standby_suspects)
    if snapshot is not None:
        suspects.update(snapshot.suspects)
    facts = verdict.Facts(
        wanted="ship" if now.what == "sealed" else now.what,
        wanted_reason=now.reason,
        connected=session is not None and session.failure is None and snapshot is not None,
        problem=str(problem) if problem is not None else None,
        activity=engine.activity,
        sealed=now.what == "sealed",
        suspect="; ".join(f"{name}: {reason}" for name, reason in sorted(suspects.items())) or None,
        seeding=engine.seeding(),
        left_bytes=snapshot.left_bytes if snapshot is not None else 0,
        predicted_seconds=engine.predicted(snapshot),
        limit_seconds=engine.config.limits.max_drain_seconds,
        dirty_rate=engine.dirty_rate.bytes_per_second,
        ship_rate=engine.ship_rate.bytes_per_second,
        limiter=engine.limiter,
    )
    return verdict.judge(facts, engine.trend)


def late(engine: Engine, job: Job) -> BmigrateError:
    """The error for a job whose time is up before it was reached."""
    name, reason = state(engine)
    now = f"state {name}" + (f" ({reason})" if reason else "")
    workload = engine.config.workload
    if job.kind != "converge":
        return RefusedError(f"workload {workload}: no time left for {job.kind}: {now}", reason=f"{job.kind}_timeout")
    predicted = engine.predicted(engine.snapshot)
    expected = "unknown" if predicted is None else f"{predicted:.1f} s"
    allowed = float(job.fields["max_drain_seconds"])
    return RefusedError(
        f"workload {workload} does not converge: {now}, predicted drain {expected}, allowed {allowed:g} s",
        hint="lower the load, raise the bandwidth limit, or raise limits.max_drain_seconds",
        reason="not_converging",
    )


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


def entry(engine: Engine) -> dict[str, Any]:
    """One workload's entry in the answer of the status operation."""
    name, reason = engine.state()
    snapshot, session, totals = engine.snapshot, engine.session, engine.totals
    volumes: list[dict[str, Any]] = []
    for volume in engine.config.volumes:
        tracked = snapshot.volumes.get(volume.name) if snapshot is not None else None
        scheduler, honoured = gentle.scheduler(engine.config.device(volume.name))
        volumes.append(
            {
                "volume": volume.name,
                "size_bytes": tracked.size_bytes if tracked else None,
                "dirty_bytes": tracked.dirty_bytes if tracked else None,
                "claimed_bytes": tracked.claimed_bytes if tracked else None,
                "suspect": tracked.suspect if tracked else None,
                "standby_suspect": session.standby_suspects.get(volume.name) if session is not None else None,
                "seeded": tracked is not None and engine.record.seeded.get(volume.name) == tracked.seed_count,
                "scheduler": scheduler,
                "idle_class_honoured": honoured,
            }
        )
    shown = snapshot if name != "idle" else None
    return {
        "workload": engine.config.workload,
        "state": name,
        "reason": reason,
        "limiter": engine.limiter,
        "bandwidth_bytes_per_second": engine.bandwidth,
        "bandwidth_source": "config" if engine.record.bandwidth is None else "operator",
        "peer": engine.config.peer.name,
        "epoch": session.epoch if session is not None else None,
        "streams": len(session.lanes) if session is not None else 0,
        "passes": engine.trend.passes,
        "bytes_left": shown.left_bytes if shown is not None else None,
        "total_bytes": sum(item.size_bytes for item in shown.volumes.values()) if shown is not None else None,
        "dirty_rate_bytes_per_second": _rounded(engine.dirty_rate.bytes_per_second, 0),
        "ship_rate_bytes_per_second": _rounded(engine.ship_rate.bytes_per_second, 0),
        "predicted_drain_seconds": _rounded(engine.predicted(shown)),
        "lag_seconds": _rounded(shown.lag_seconds) if shown is not None else None,
        "trimmed_bytes": engine.trend.trimmed_bytes,
        "shipped_bytes_total": totals.shipped_bytes,
        "zero_bytes_total": totals.zero_bytes,
        "same_bytes_total": totals.same_bytes,
        "hashed_bytes_total": totals.hashed_bytes,
        "last_error": engine.last_error.to_dict() if engine.last_error is not None else None,
        "progress": dict(engine.progress) if engine.progress is not None else None,
        "volumes": volumes,
    }
