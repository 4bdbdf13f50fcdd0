# SPDX-License-Identifier: GPL-3.0-or-later
r"""The rules of a handover as pure functions: a state and a step go in, a new state comes out.

It promises that one generation is committed at most once and abandoned or committed but never both,
that a step belongs to one run id and one phase (compare-and-set), and that a step which is repeated
changes nothing. It does no I/O and must never: who calls it saves the returned state durably
*before* acting on it, and that is all the safety there is.

A side's phases, with the steps that lead from one to the next::

    source  idle -begin-> begun -quiesce-> quiesced -drain-> drained -commit-> committed -finish-> idle
                            \______________ resume ____________/   (through "resuming", which abandons X)
    target  idle -prepare-> prepared -promote-> promoting -> promoted -start-> started -finish-> idle
                            \_ cancel (only with proof that the source abandoned X) _/

X is the candidate: generation N+1 with a random id. Before the commit only the source may run the
workload; after it only the target may.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from bmigrate.common.errors import PhaseError, RefusedError
from bmigrate.common.state import WorkloadState

Fields = dict[str, Any]

IDLE = "idle"
BEGUN = "begun"
QUIESCED = "quiesced"
DRAINED = "drained"
COMMITTED = "committed"
RESUMING = "resuming"
PREPARED = "prepared"
PROMOTING = "promoting"
PROMOTED = "promoted"
STARTED = "started"

#: step -> (side, phases it may start from, phase it ends in)
STEPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "begin": ("source", (IDLE,), BEGUN),
    "converge": ("source", (BEGUN,), BEGUN),
    "quiesce": ("source", (BEGUN,), QUIESCED),
    "drain": ("source", (QUIESCED,), DRAINED),
    "commit": ("source", (DRAINED,), COMMITTED),
    "resume": ("source", (BEGUN, QUIESCED, DRAINED, RESUMING), IDLE),
    "prepare": ("target", (IDLE,), PREPARED),
    "promote": ("target", (PREPARED, PROMOTING), PROMOTED),
    "start": ("target", (PROMOTED,), STARTED),
    "cancel": ("target", (PREPARED,), IDLE),
}
FINISH = {"source": (COMMITTED, IDLE), "target": (STARTED, IDLE)}
OPENING = ("begin", "prepare")


def same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Whether two generations are the same: number and id."""
    if one is None or other is None:
        return False
    return one.get("number") == other.get("number") and one.get("id") == other.get("id")


def listed(generation: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a generation is one of several."""
    return any(same(generation, item) for item in among)


def bare(generation: Mapping[str, Any]) -> Fields:
    """A generation reduced to {number, id}.

    Raises:
        PhaseError: reason ``bad_generation`` when it has not that form.
    """
    number, identifier = generation.get("number"), generation.get("id")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1 or not isinstance(identifier, str):
        raise PhaseError(
            f"{dict(generation)!r} is not a generation",
            hint='give {"number": N, "id": "32 hexadecimal digits"} as discover prints it',
            reason="bad_generation",
        )
    return {"number": number, "id": identifier}


def phase_of(state: WorkloadState) -> str:
    """The phase of the open handover, ``idle`` when there is none."""
    return str(state.handover["phase"]) if state.handover else IDLE


def recorded(state: WorkloadState, step: str, run_id: str) -> Fields | None:
    """The result that a step of this run left, or None when it has not been done.

    ``converge`` changes nothing and may have become stale: it is always done anew.
    """
    if step == "converge":
        return None
    for record in (state.handover, state.last_handover):
        if record and record["run_id"] == run_id:
            result = record["results"].get(step)
            if result is not None and not (step in OPENING and record is state.last_handover):
                return dict(result)
    return None


def check(state: WorkloadState, step: str, run_id: str, expect: str | None = None) -> None:
    """Compare-and-set: may this step of this run start now?

    Args:
        state: this host's state, read under the lock.
        step: its name. run_id: of the caller. expect: the phase that the caller believes in, or None.

    Raises:
        RefusedError: ``handover_open`` when another run owns the handover, ``wrong_role``.
        PhaseError: ``run_over``, ``wrong_phase``, or ``committed`` (no way back).
    """
    phase, record = phase_of(state), state.handover
    if record and record["run_id"] != run_id:
        raise RefusedError(
            f"handover {record['run_id']} of workload {state.workload} is open here, in phase {phase}",
            host=state.host,
            hint=f"go on with --run-id {record['run_id']}: running failover.yml again does that",
            reason="handover_open",
        )
    if state.last_handover and state.last_handover["run_id"] == run_id and not record:
        raise PhaseError(
            f"handover {run_id} of workload {state.workload} is over: {state.last_handover.get('outcome')}",
            host=state.host,
            hint="begin a new one with a new run id",
            reason="run_over",
        )
    if expect is not None and expect != phase:
        raise _wrong_phase(state, step, f"phase {expect} was expected")
    if step == "finish":
        side = record["side"] if record else None
        if side is None or phase != FINISH[side][0]:
            raise _wrong_phase(state, step, "nothing is there to finish")
        return
    side, allowed, _ = STEPS[step]
    if step == "resume" and phase == COMMITTED:
        raise PhaseError(
            f"generation {_name(record['candidate'] if record else {})} of workload {state.workload} is committed: "
            "the source cannot run it any more",
            host=state.host,
            hint="finish the handover on the target: run failover.yml again",
            reason="committed",
        )
    if phase not in allowed or (record and record["side"] != side):
        raise _wrong_phase(state, step, f"it may start in: {', '.join(allowed)}")
    role = "primary" if side == "source" or phase == PROMOTING or step == "start" else "standby"
    if state.role != role:
        raise RefusedError(
            f"workload {state.workload} is {state.role} on this host; {step} is for a {role}",
            host=state.host,
            hint="see who is primary: bmigrate handover discover",
            reason="wrong_role",
        )


def begin(state: WorkloadState, run_id: str, peer: str, candidate_id: str, result: Fields) -> WorkloadState:
    """Open a handover on the source; the candidate is the next generation with a random id.

    Raises:
        RefusedError, PhaseError: see ``check``.
    """
    check(state, "begin", run_id)
    if state.generation is None:
        raise RefusedError(
            f"workload {state.workload} has no generation", hint="run bmigrate init first", reason="not_initialised"
        )
    candidate = {"number": int(state.generation["number"]) + 1, "id": candidate_id}
    record = {
        "run_id": run_id,
        "side": "source",
        "phase": BEGUN,
        "peer": peer,
        "candidate": candidate,
        "results": {"begin": dict(result, candidate=candidate)},
    }
    return _changed(state, handover=record)


def doing(state: WorkloadState, step: str, note: Fields) -> WorkloadState:
    """Note that a step has started, for those who find it unfinished. The phase stays."""
    after = _changed(state)
    if after.handover:
        after.handover["doing"] = dict(note, step=step)
    return after


def done(state: WorkloadState, step: str, run_id: str, result: Fields) -> WorkloadState:
    """Record the result of a step that moves no role: converge, quiesce, drain, start.

    Raises:
        RefusedError, PhaseError: see ``check``.
    """
    check(state, step, run_id)
    after = _changed(state)
    record = _open(after)
    record["results"][step] = dict(result)
    record["phase"] = STEPS[step][2]
    record.pop("doing", None)
    return after


def commit(
    state: WorkloadState, run_id: str, candidate: Mapping[str, Any], digest: str, at: float, result: Fields
) -> WorkloadState:
    """The commit: this host gives up the role for generation X, for good. Saving this state commits.

    Args:
        candidate: X as the target prepared it. digest: of the drain, hexadecimal. at: seconds since the epoch.

    Raises:
        PhaseError: X was abandoned, or it is not the candidate of this handover, or see ``check``.
    """
    if listed(candidate, state.abandoned):
        raise PhaseError(
            f"generation {_name(candidate)} of workload {state.workload} was abandoned and can never be committed",
            host=state.host,
            hint="begin a new handover",
            reason="abandoned",
        )
    check(state, "commit", run_id)
    record = _open(state)
    if not same(candidate, record["candidate"]):
        raise PhaseError(
            f"generation {_name(candidate)} is not the candidate {_name(record['candidate'])} of this handover",
            host=state.host,
            hint="pass the candidate that begin answered",
            reason="wrong_candidate",
        )
    if candidate.get("digest") not in (None, digest):
        raise PhaseError(
            f"the target prepared for digest {candidate['digest']}, the drain answered {digest}",
            host=state.host,
            hint="resume, and begin a new handover",
            reason="wrong_digest",
        )
    demoted = {
        "workload": state.workload,
        "host": state.host,
        "candidate": bare(candidate),
        "run_id": run_id,
        "digest": digest,
        "at": at,
    }
    after = _changed(state, role="standby", demoted=demoted, shipping=False)
    fresh = _open(after)
    fresh["phase"] = COMMITTED
    fresh["results"]["commit"] = dict(result, certificate=demoted)
    fresh.pop("doing", None)
    return after


def abandon(state: WorkloadState, run_id: str, reason: str) -> WorkloadState:
    """First half of resume: X is abandoned. To be durable before anything is put back.

    Raises:
        RefusedError, PhaseError: see ``check``; ``committed`` when it is too late.
    """
    check(state, "resume", run_id)
    after = _changed(state)
    record = _open(after)
    if not listed(record["candidate"], after.abandoned):
        after.abandoned.append(bare(record["candidate"]))
    record["phase"] = RESUMING
    record.setdefault("resume_reason", reason)
    return after


def resumed(state: WorkloadState, run_id: str, result: Fields) -> WorkloadState:
    """Second half of resume: the workload runs on the source again, the handover is over."""
    check(state, "resume", run_id, RESUMING)
    return _closed(state, "resume", result, "rolled_back")


def prepare(
    state: WorkloadState, run_id: str, peer: str, candidate: Mapping[str, Any], digest: str, result: Fields
) -> WorkloadState:
    """The target notes the candidate that it may be promoted to.

    Raises:
        PhaseError: X is not the next generation of the data here, or see ``check``.
    """
    check(state, "prepare", run_id)
    x = bare(candidate)
    if state.generation is None or x["number"] != int(state.generation["number"]) + 1:
        raise PhaseError(
            f"candidate {_name(x)} does not follow generation {_name(state.generation or {})} of the replica here",
            host=state.host,
            hint="compare the histories on both hosts: bmigrate handover discover",
            reason="wrong_generation",
        )
    if listed(x, state.abandoned):
        raise PhaseError(f"generation {_name(x)} was abandoned on this host", host=state.host, reason="abandoned")
    note = dict(x, digest=digest, run_id=run_id)
    record = {
        "run_id": run_id,
        "side": "target",
        "phase": PREPARED,
        "peer": peer,
        "candidate": x,
        "results": {"prepare": dict(result, candidate=x)},
    }
    return _changed(state, candidate=note, handover=record)


def promote(state: WorkloadState, run_id: str, certificate: Mapping[str, Any]) -> WorkloadState:
    """First half of promote: with the source's ``demoted X`` shown, this host is primary of X.

    Repeating it in phase ``promoting`` changes nothing.

    Raises:
        PhaseError: the certificate is not for the candidate noted here (workload, generation, digest, run).
    """
    check(state, "promote", run_id)
    record = _open(state)
    shown = certificate.get("candidate")
    noted = state.candidate or dict(record["candidate"], **record.get("certified", {}))
    if (
        not isinstance(shown, Mapping)
        or certificate.get("workload") != state.workload
        or certificate.get("run_id") != run_id
        or certificate.get("host") != record["peer"]
        or not same(shown, noted)
        or certificate.get("digest") != noted.get("digest")
    ):
        raise PhaseError(
            f"the certificate does not demote {record['peer']} for candidate {_name(record['candidate'])} of "
            f"workload {state.workload}",
            host=state.host,
            hint="pass what commit answered on the source, or 'demoted' of its discover, unchanged",
            reason="bad_certificate",
        )
    if phase_of(state) == PROMOTING:
        return _changed(state)
    x = bare(record["candidate"])
    after = _changed(
        state,
        role="primary",
        generation=x,
        history=[*copy.deepcopy(state.history), x],
        candidate=None,
        demoted=None,
        shipping=False,
    )
    fresh = _open(after)
    fresh["phase"] = PROMOTING
    fresh["certified"] = {"digest": certificate.get("digest")}
    return after


def promoted(state: WorkloadState, run_id: str, result: Fields) -> WorkloadState:
    """Second half of promote: tracked, released and marked; the workload may be started."""
    check(state, "promote", run_id, PROMOTING)
    after = _changed(state)
    record = _open(after)
    record["phase"] = PROMOTED
    record["results"]["promote"] = dict(result)
    record.pop("doing", None)
    return after


def finish(state: WorkloadState, run_id: str, result: Fields) -> WorkloadState:
    """Close a handover that was committed.

    The source adopts X: from now on it is the standby of that generation and the target may ship to
    it; ``demoted`` stays until it is promoted itself, so that the certificate can be shown again.
    The target may ship from now on: its health is proved, so the old copy is no longer needed.

    Raises:
        RefusedError, PhaseError: see ``check``.
    """
    check(state, "finish", run_id)
    record = _open(state)
    if record["side"] == "source":
        x = bare(record["candidate"])
        after = _changed(state, generation=x, history=[*copy.deepcopy(state.history), x])
    else:
        after = _changed(state, shipping=True)
    return _closed(after, "finish", result, "handed_over")


def cancel(state: WorkloadState, run_id: str, abandoned: Sequence[Mapping[str, Any]], result: Fields) -> WorkloadState:
    """The target forgets a candidate, on proof that the source can never commit it.

    Args:
        abandoned: the source's list, as its discover prints it.

    Raises:
        PhaseError: X is not in the list; it may be committed already, and then only this host can go on.
    """
    check(state, "cancel", run_id)
    record = _open(state)
    if not listed(record["candidate"], abandoned):
        raise PhaseError(
            f"the source has not abandoned candidate {_name(record['candidate'])}: it may be committed",
            host=state.host,
            hint="pass 'abandoned' of the source's discover; if it is demoted, promote this host instead",
            reason="not_abandoned",
        )
    return _closed(_changed(state, candidate=None), "cancel", result, "cancelled")


def boot_decision(state: WorkloadState) -> tuple[str, str]:
    """What a host may do with a workload when it boots: (``start`` | ``resume`` | ``stay``, why).

    ``resume``: a handover is open and not committed; X must be abandoned, durably, before the start.
    """
    phase = phase_of(state)
    if state.role != "primary":
        why = "demoted: the peer runs it or will" if state.demoted else f"role is {state.role}"
        return "stay", why
    if state.handover and state.handover["side"] == "source":
        return "resume", f"handover {state.handover['run_id']} is open in phase {phase} and not committed"
    return "start", "role is primary"


def _open(state: WorkloadState) -> Fields:
    if state.handover is None:
        raise PhaseError(f"no handover of workload {state.workload} is open", host=state.host, reason="wrong_phase")
    return state.handover


def _changed(state: WorkloadState, **fields: Any) -> WorkloadState:
    after: WorkloadState = replace(copy.deepcopy(state), **copy.deepcopy(fields))
    return after


def _closed(state: WorkloadState, step: str, result: Fields, outcome: str) -> WorkloadState:
    after = _changed(state)
    record = _open(after)
    record["results"][step] = dict(result)
    record["phase"] = IDLE
    record["outcome"] = outcome
    record.pop("doing", None)
    return _changed(after, handover=None, last_handover=record)


def _wrong_phase(state: WorkloadState, step: str, why: str) -> PhaseError:
    return PhaseError(
        f"{step} is not possible in phase {phase_of(state)} of workload {state.workload}: {why}",
        host=state.host,
        hint="see bmigrate handover discover; running failover.yml again goes on from the real phase",
        reason="wrong_phase",
    )


def _name(generation: Mapping[str, Any]) -> str:
    return f"{generation.get('number', '?')}/{str(generation.get('id', '?'))[:8]}"


def fork_of(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> str | None:
    """Where two histories (oldest first) part, in words; None when one is a prefix of the other.

    A standby's history begins where it was adopted, so only numbers that both know are compared.
    """
    known: list[Mapping[str, Any]] = list(other)
    by_number = {int(item["number"]): item for item in known}
    for item in one:
        match = by_number.get(int(item["number"]))
        if match is not None and not same(item, match):
            ids = f"{str(item['id'])[:8]} on one host and {str(match['id'])[:8]} on the other"
            return f"generation {item['number']} is {ids}"
    return None
