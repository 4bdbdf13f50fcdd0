# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate handover STEP: everything that moves a role, under the workload's lock.

Promise: one step per call, its result recorded durably; the same step of the same run again answers
what was recorded. Nothing else in this project changes a role.
"""

from __future__ import annotations

import argparse
from typing import Any, Callable

from bmigrate.cli import arguments as shared
from bmigrate.common import config as configs
from bmigrate.common import output
from bmigrate.common.errors import PhaseError, RefusedError, RolledBackError, UsageError
from bmigrate.handover import machine
from bmigrate.handover.host import Host
from bmigrate.handover.store import Store, opened

Fields = dict[str, Any]

DESCRIPTION = """\
Moves a workload to the other host in small durable steps. failover.yml calls them in this order; so
may you, with any run id that has not been used yet, the same on both hosts:

  look    discover    this host's role, generation, open handover and live facts; changes nothing
          preflight   blockers, warnings and predicted downtime; changes nothing
          judge       who is source, who target, which step comes next, from both hosts' facts
  source  begin       open the handover, name the candidate generation X; the workload runs on
          converge    wait until what is left ships in max_drain_seconds
          quiesce     arm the dead-man timer, stop services, unmount, take the devices exclusively
          drain       ship the rest, verify it on the standby's device
  target  prepare     fence all senders, note candidate X and the drain's digest
  source  commit      note `demoted X`: from here on there is only forward
  target  promote     become primary of X, tracked, let the devices go
          start       mount, start the services, wait for the health check
  source  finish      become the standby of X
  target  finish      begin to ship back

  before the commit, at any point:
  source  resume      abandon X, then put the workload back (exit code 7)
  target  cancel      forget X, given the source's `abandoned` list

A step that was interrupted is simply repeated. `--expect PHASE` refuses when this host is in another
phase: idle, begun, quiesced, drained, committed, resuming; prepared, promoting, promoted, started.
"""

READING = ("discover", "preflight", "judge")
STEPS = ("begin", "converge", "quiesce", "drain", "commit", "resume", "prepare", "promote", "start", "finish", "cancel")
#: The reason that the timer gives.
DEAD_MAN = "dead-man"
#: Wait for another command on the same workload, seconds.
LOCK_SECONDS = 60.0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "handover", "one step of moving a workload to the other host", DESCRIPTION)
    parser.add_argument("step", choices=READING + STEPS, metavar="STEP", help="one of the steps above")
    shared.add_workload(parser)
    parser.add_argument("--run-id", type=shared.run_id, metavar="R", help="names this handover on both hosts")
    parser.add_argument("--expect", metavar="PHASE", help="refuse unless this host is in that phase")
    parser.add_argument("--candidate", metavar="JSON", help='commit, prepare: {"number": N, "id": "..."} from begin')
    parser.add_argument("--digest", metavar="HEX", help="prepare: the drain's digest")
    parser.add_argument("--certificate", metavar="JSON", help="promote: the source's `demoted` record from commit")
    parser.add_argument("--abandoned", metavar="JSON", help="cancel: the source's `abandoned` list from discover")
    parser.add_argument("--reason", default="operator", metavar="WORD", help="resume: why, for the record")
    parser.add_argument(
        "--accept-unheld",
        action="store_true",
        help="promote: go on although this host crashed after prepare; the way back compares everything",
    )
    parser.add_argument(
        "--peer-facts", metavar="JSON", help="preflight, judge: `data` of the peer's discover, or - for stdin"
    )
    shared.add_json(parser)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run one step.

    Raises:
        BmigrateError: see the step.
    """
    config = configs.load(arguments.workload, validated=arguments.step in READING)
    if arguments.step in READING:
        return _read(arguments, config)
    if arguments.run_id is None:
        raise UsageError(f"{arguments.step} needs --run-id", hint="see: bmigrate handover --help", reason="usage")
    host = Host(config)
    preempt = arguments.run_id if arguments.step == "resume" else None
    try:
        with opened(arguments.workload, wait_seconds=LOCK_SECONDS, preempt_for=preempt) as store:
            earlier = machine.recorded(store.state, arguments.step, arguments.run_id)
            if earlier is not None:
                result, changed = earlier, False
            else:
                machine.check(store.state, arguments.step, arguments.run_id, arguments.expect)
                result, changed = _act(arguments, store, host), True
            answer = _answer(store, arguments.step, result)
    except OSError as exc:
        raise RefusedError(
            f"{arguments.step} stopped at: {exc}",
            host=config.host,
            hint="what the state file says is still true; correct the cause and repeat the step",
            reason="os_error",
        ) from exc
    except RefusedError as error:
        if arguments.reason == DEAD_MAN and error.reason == "handover_open":
            # Its own handover is over, so its work is done; as a refusal systemd would repeat it for ever.
            raise PhaseError(error.message, host=error.host, reason="run_over") from error
        raise
    return _report(arguments, answer, changed)


def _act(arguments: argparse.Namespace, store: Store, host: Host) -> Fields:
    step, run_id = arguments.step, arguments.run_id
    side = machine.STEPS[step][0] if step in machine.STEPS else str((store.state.handover or {}).get("side"))
    if side == "source":
        from bmigrate.handover import source

        plain: dict[str, Callable[[Store, Host, str], Fields]] = {
            "begin": source.begin,
            "converge": source.converge,
            "quiesce": source.quiesce,
            "drain": source.drain,
            "finish": source.finish,
        }
        if step == "commit":
            return source.commit(store, host, run_id, shared.json_value("--candidate", arguments.candidate, dict))
        if step == "resume":
            return source.resume(store, host, run_id, arguments.reason)
        return plain[step](store, host, run_id)
    from bmigrate.handover import target

    if step == "prepare":
        candidate = shared.json_value("--candidate", arguments.candidate, dict)
        return target.prepare(store, host, run_id, candidate, _digest(arguments.digest))
    if step == "promote":
        certificate = shared.json_value("--certificate", arguments.certificate, dict)
        return target.promote(store, host, run_id, certificate, arguments.accept_unheld)
    if step == "cancel":
        return target.cancel(store, host, run_id, shared.json_value("--abandoned", arguments.abandoned, list))
    return target.start(store, host, run_id) if step == "start" else target.finish(store, host, run_id)


def _digest(text: str | None) -> str:
    if not text:
        raise UsageError("prepare needs --digest", hint="pass the digest that drain answered", reason="usage")
    return text


def _answer(store: Store, step: str, result: Fields) -> Fields:
    state = store.state
    record = state.handover or state.last_handover or {}
    return {
        "step": step,
        "host": state.host,
        "phase": machine.phase_of(state),
        "role": state.role,
        "generation": state.generation,
        "candidate": record.get("candidate"),
        "run_id": record.get("run_id"),
        "certificate": state.demoted,
        "abandoned": state.abandoned,
        "result": result,
        "results": record.get("results", {}),
        # the end of a handover says all that discover would, so that nobody has to ask again
        **({"state": state.to_dict()} if step == "finish" else {}),
    }


def _report(arguments: argparse.Namespace, answer: Fields, changed: bool) -> int:
    error = None
    if arguments.step == "resume":
        error = RolledBackError(
            f"handover {arguments.run_id} was given up; workload {arguments.workload} runs on this host",
            host=str(answer["host"]),
            hint="correct what stood in the way and begin a new handover",
            reason=str(answer["result"].get("reason") or "operator"),
        )
    text = f"{arguments.step}: done in {answer['result'].get('seconds', 0):.3f} s; phase {answer['phase']}"
    output.emit(answer, changed=changed, workload=arguments.workload, error=error, as_json=arguments.json, text=text)
    return error.exit_code if error is not None else 0


def _read(arguments: argparse.Namespace, config: configs.Config) -> int:
    from bmigrate.handover import discover, judge, preflight

    mine = discover.facts(config)
    if arguments.step == "discover":
        output.emit(mine, workload=config.workload, as_json=arguments.json, text=_discovered(mine))
        return 0
    peer = None
    if arguments.peer_facts is not None:
        peer = shared.json_value("--peer-facts", arguments.peer_facts, dict)
        peer = peer.get("data", peer) if "schema" in peer and "data" in peer else peer
    if arguments.step == "judge":
        if peer is None:
            raise UsageError("judge needs --peer-facts", hint="pass what discover printed on the peer", reason="usage")
        verdict = judge.verdict(mine, peer)
        error = (
            PhaseError(verdict["problem"], hint="see discover on both hosts", reason="roles")
            if verdict["problem"]
            else None
        )
        text = f"source {verdict['source']}, target {verdict['target']}, next: {verdict['next_step']}"
        output.emit(verdict, workload=config.workload, error=error, as_json=arguments.json, text=text)
        return error.exit_code if error else 0
    plan = preflight.check(config, mine, peer)
    blocked = None
    if plan["blockers"]:
        first = plan["blockers"][0]
        more = f" (and {len(plan['blockers']) - 1} more)" if len(plan["blockers"]) > 1 else ""
        blocked = RefusedError(
            first["message"] + more,
            volume=first["volume"],
            host=first["host"] or config.host,
            hint=first["hint"],
            reason=first["reason"],
        )
    if not arguments.json:
        output.progress(_planned(plan))
    output.emit(plan, workload=config.workload, error=blocked, as_json=arguments.json, text="nothing stands in the way")
    return blocked.exit_code if blocked else 0


def _discovered(mine: Fields) -> str:
    generation = mine["generation"] or {}
    lines = [
        f"workload {mine['workload']} on {mine['host']}: {mine['role']}, generation {generation.get('number', '-')}, "
        f"handover {mine['run_id'] or '-'} in phase {mine['phase']}"
    ]
    for name, volume in mine["volumes"].items():
        lines.append(f"  volume {name}: {volume['path']} " + ("present" if volume["present"] else volume["problem"]))
    lines += [f"  service {name}: {state}" for name, state in mine["services"].items()]
    return "\n".join(lines)


def _planned(plan: Fields) -> str:
    lines: list[str] = []
    for title in ("blockers", "warnings"):
        for item in plan[title]:
            where = ", ".join(str(part) for part in (item["volume"], item["host"]) if part)
            lines.append(f"{title[:-1]}: {item['message']} ({where}) -- {item['hint']}")
    lines.append(f"kernel {plan['kernel']['running']}: {plan['kernel']['secure_boot']}")
    guess = plan["prediction"]
    if guess["downtime_seconds"] is not None:
        lines.append(
            f"predicted downtime: {guess['downtime_seconds']:.1f} s, of which drain {guess['drain_seconds']:.1f} s"
        )
    return "\n".join(lines)
