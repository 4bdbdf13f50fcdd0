# SPDX-License-Identifier: GPL-3.0-or-later
"""``make demo``: the main job, from nothing to the evidence, and back.

Boots the lab, puts a PostgreSQL on its volume, keeps writing with a client that is told nothing,
installs, syncs and fails over while it writes, prints the evidence, fails back, prints it again, and
at the end shows that the checker can fail: one WAL block is overwritten and commits must be missing.
Exit code 0 only if everything is as promised.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo import ledger
from demo.client_process import ClientProcess
from demo.cluster import SERVICE, Cluster
from demo.evidence import MIN_COMMITS, Evidence
from demo.playbooks import ROOT, PlaybookError, report_of, run
from lab import Lab, LabError

WORKLOAD = "pgdemo"
HOOK = ROOT / "demo" / "hooks" / "hash_devices.yml"


@dataclass(frozen=True)
class Totals:
    """Of a primary up to now: bytes, and how often a full copy or a comparison by checksum was begun."""

    shipped_bytes: int
    zero_bytes: int
    written_bytes: int
    copies: int


class Demo:
    """One run; ``directory`` keeps logs and reports."""

    def __init__(self, box: Lab, directory: Path) -> None:
        self.box = box
        self.directory = directory
        self.cluster = Cluster(box)
        self.log = directory / "ansible.log"
        self.began = time.monotonic()
        self.next_id = 1
        self.seeded_bytes = 0
        self.known_copies: dict[str, int] = {}

    def say(self, text: str) -> None:
        """One line of progress with the time since the start."""
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def playbook(self, name: str, **extra: str) -> None:
        """Run a shipped playbook."""
        shown = " ".join(f"-e {key}={value}" for key, value in extra.items())
        self.say(f"ansible-playbook {name} {shown}")
        run(name, self.box.name, self.log, **extra)

    def totals(self, host: str) -> Totals:
        """What the primary has shipped and recorded so far, from ``bmigrate status --json``."""
        answer = json.loads(self.box.ssh(host, f"bmigrate status --workload {WORKLOAD} --json").stdout)
        (entry,) = answer["data"]["workloads"]
        return Totals(
            shipped_bytes=entry["ship"]["shipped_bytes_total"],
            zero_bytes=entry["ship"]["zero_bytes_total"],
            written_bytes=sum(volume["written_bytes"] for volume in entry["tracking"]),
            copies=sum(volume["seed_count"] + volume["resync_count"] for volume in entry["tracking"]),
        )

    # -- the way there -----------------------------------------------------------------------------------------

    def set_up(self) -> ClientProcess:
        """Everything up to a client that writes to a PostgreSQL on a volume in step."""
        self.say("booting the lab")
        self.box.up()
        self.say("PostgreSQL: settings on both hosts, its files on alpha's volume")
        self.cluster.settle("alpha")
        self.playbook("install.yml")
        self.playbook("sync.yml", bmigrate_workload=WORKLOAD, bmigrate_initial_primary="alpha", bmigrate_wait="false")
        self.box.ssh("alpha", f"systemctl start {SERVICE}", timeout=300)
        self.cluster.create_ledger("alpha")
        self.say(f"durability settings: {self.cluster.check_durability_settings('alpha')}")
        client = self.client("client-1")
        try:
            self.say("the client writes; the seed is on its way")
            self.playbook("sync.yml", bmigrate_workload=WORKLOAD)
            seeded = self.totals("alpha")
            self.seeded_bytes, self.known_copies["alpha"] = seeded.shipped_bytes, seeded.copies
            client.wait_for_commits(MIN_COMMITS)
        except BaseException:
            client.stop()
            raise
        return client

    def client(self, name: str) -> ClientProcess:
        """Start a client whose numbers go on where the last one's ended."""
        return ClientProcess(self.cluster.conninfo(), self.directory / f"{name}.events", self.next_id)

    # -- one handover ------------------------------------------------------------------------------------------

    def fail_over(self, title: str, source: str, target: str, client: ClientProcess) -> Evidence:
        """Hand over while the client writes, and gather the evidence; the client is stopped at the end."""
        place = self.directory / f"{source}-to-{target}"
        place.mkdir()
        digests = place / "digests.json"
        before = self.totals(source)
        self.playbook(
            "failover.yml",
            bmigrate_confirm=WORKLOAD,
            bmigrate_hook_after_drain=str(HOOK),
            bmigrate_report_directory=str(place),
            demo_root=str(ROOT),
            demo_digest_file=str(digests),
        )
        client.wait_for_commits(200)
        client.stop()
        events = client.events()
        self.next_id = max(event["id"] for event in events) + 1
        seen = ledger.outages(events)
        first_refusal = seen[0].first_refusal if seen else float("inf")
        converge = self.converge_span(source)
        hashed = json.loads(digests.read_text())
        return Evidence(
            title=title,
            report=report_of(place),
            outages=seen,
            commits_before=ledger.acknowledged_between(events, 0.0, first_refusal),
            commits_converging=ledger.acknowledged_between(events, *converge),
            commits_after=ledger.acknowledged_between(events, first_refusal, float("inf")),
            lost=ledger.missing(self.all_events(), self.cluster.rows(target)),
            devices=hashed["devices"],
            hashing_took=hashed["took"],
            seeded_bytes=self.seeded_bytes,
            shipped_bytes=before.shipped_bytes,
            written_bytes=before.written_bytes,
            full_copies=self.totals(target).copies - self.known_copies.get(target, 0),
        )

    def all_events(self) -> list[dict[str, Any]]:
        """The logs of all clients so far."""
        return [event for path in sorted(self.directory.glob("client-*.events")) for event in ledger.read_events(path)]

    def converge_span(self, source: str) -> tuple[float, float]:
        """From the opening of the handover to the order to stop, on the client's clock: converging, service running."""
        began = time.monotonic()
        text = self.box.ssh(source, f"date +%s.%N; cat /var/lib/bmigrate/{WORKLOAD}/state.json").stdout
        ended = time.monotonic()
        clock, _, state = text.partition("\n")
        offset = (began + ended) / 2 - float(clock)
        results = json.loads(state)["last_handover"]["results"]
        return results["begin"]["started_at"] + offset, results["quiesce"]["stopped_at"] + offset

    # -- the checker must be able to fail ----------------------------------------------------------------------

    def corrupt_and_check(self, host: str) -> int:
        """Crash the server after some commits, overwrite one WAL block, start it; how many commits are missing.

        This is the end of the data on this host; it comes last.
        """
        self.cluster.sql(host, "checkpoint")
        first = self.next_id
        with self.client("client-control") as client:
            client.wait_for_commits(100)
            position = self.cluster.sql(host, "select pg_current_wal_lsn()")
            client.wait_for_commits(100)
            self.cluster.crash(host)
        place = self.cluster.corrupt_one_wal_block(host, position)
        self.box.ssh(host, f"systemctl start {SERVICE}", timeout=300)
        lost = ledger.missing(client.events(), self.cluster.rows(host))
        self.say(f"overwrote WAL segment {place}; of the commits from {first} on, {len(lost)} are missing")
        return len(lost)

    def run(self) -> bool:
        """The whole demo; True if everything is as promised."""
        client = self.set_up()
        with client:
            there = self.fail_over("failover", "alpha", "beta", client)
        print("\n".join(there.lines()), flush=True)
        with self.client("client-2") as client:
            client.wait_for_commits(MIN_COMMITS)
            back = self.fail_over("failback, nothing edited", "beta", "alpha", client)
        print("\n".join(back.lines()), flush=True)
        self.say("negative control: the checker must notice one overwritten WAL block")
        noticed = self.corrupt_and_check("alpha") > 0
        print(f"the same checker, one WAL block overwritten: {'reports a loss' if noticed else 'NOTICED NOTHING'}")
        return noticed and not there.failures() and not back.failures()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python3 -m demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the lab running afterwards (python3 -m lab down)")
    parser.add_argument("--directory", type=Path, help="where logs and reports go (default: a new one under build/)")
    arguments = parser.parse_args()
    if arguments.directory is None:
        (ROOT / "build").mkdir(exist_ok=True)
        arguments.directory = Path(tempfile.mkdtemp(prefix="demo-", dir=ROOT / "build"))
    directory = arguments.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    box = Lab(os.environ.get("BMIGRATE_LAB", "demo"))
    box.down()  # a demo starts from nothing
    demo = Demo(box, directory)
    try:
        good = demo.run()
    except (LabError, PlaybookError) as error:
        print(f"the demo failed: {error}", file=sys.stderr)
        good = False
    finally:
        if not arguments.keep:
            box.down()
    demo.say(f"{'done, everything as promised' if good else 'FAILED'}; logs and reports: {directory}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
