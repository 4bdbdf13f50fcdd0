# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator sees on a host as installed: metrics over HTTP, fields in the journal, the live view."""

from __future__ import annotations

import base64
import json
import os
import re

import pytest

from bmigrate.common import log
from lab import wait
from tests.vm.rig import BLOCK, LIMIT_SECONDS, WORKLOAD, Rig

pytestmark = pytest.mark.vm

FETCH = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9637/metrics', timeout=60).read().decode())"
#: A terminal of 100 columns for three seconds, and what was drawn on it.
WATCH = """
import os, pty, select, signal, sys, time
pid, fd = pty.fork()
if pid == 0:
    os.environ.update(TERM="xterm", COLUMNS="100", LINES="40")
    os.execvp("bmigrate", ["bmigrate", "status", "--watch", "--workload", sys.argv[1]])
end, drawn = time.monotonic() + 90, b""
while time.monotonic() < end and drawn.count(b"map:") < 3:
    if select.select([fd], [], [], 1.0)[0]:
        drawn += os.read(fd, 65536)
os.kill(pid, signal.SIGINT)
while True:
    try:
        drawn += os.read(fd, 65536)
    except OSError:
        break
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
sys.stdout.write(drawn.decode(errors="replace"))
"""


def scraped(rig: Rig, host: str) -> dict[str, float]:
    """The samples that the exporter of a host serves."""
    text = rig.run(host, "python3", "-c", FETCH)
    return {name: float(value) for name, value in re.findall(r"^(bmigrate\S*) (\S+)$", text, re.MULTILINE)}


def test_metrics_of_both_hosts(rig: Rig) -> None:
    """The unit serves what status says, and goes on when a daemon is down."""
    primary = rig.primary()
    rig.wait_in_step()
    for host in (primary, rig.other(primary)):
        rig.run(host, "systemctl", "start", "bmigrate-metrics")
    found = wait(lambda: scraped(rig, primary), LIMIT_SECONDS, "the exporter", 1.0)
    assert found[f'bmigrate_role{{role="primary",workload="{WORKLOAD}"}}'] == 1
    assert found[f'bmigrate_state{{state="in_step",workload="{WORKLOAD}"}}'] == 1
    volume = f'volume="{rig.volume}",workload="{WORKLOAD}"'
    assert found[f"bmigrate_tracked{{{volume}}}"] == 1 and found[f"bmigrate_suspect{{{volume}}}"] == 0
    assert found[f"bmigrate_volume_size_bytes{{{volume}}}"] == rig.tracked(primary)["size_bytes"]
    other = scraped(rig, rig.other(primary))
    assert other[f"bmigrate_replica_held{{{volume}}}"] == 1
    rig.run(primary, "systemctl", "stop", "bmigrate-ship")
    try:
        found = scraped(rig, primary)
        assert found['bmigrate_daemon_up{daemon="bmigrate-ship"}'] == 0
        assert not [name for name in found if name.startswith("bmigrate_state{")]
    finally:
        rig.run(primary, "systemctl", "start", "bmigrate-ship")
        for host in (primary, rig.other(primary)):
            rig.run(host, "systemctl", "stop", "bmigrate-metrics")
    rig.wait_in_step()


def test_the_journal_has_fields(rig: Rig) -> None:
    """A change of state is an entry of its own, found by its fields."""
    primary = rig.primary()
    rig.wait_in_step()

    def told() -> list[dict[str, str]]:
        text = rig.run(
            primary, "journalctl", "-b", "-o", "json", "-u", "bmigrate-ship", "BMIGRATE_EVENT=state",
            f"BMIGRATE_WORKLOAD={WORKLOAD}", check=False,
        )  # fmt: skip
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if line["BMIGRATE_STATE"] == "paused"]

    # Other tests paused on these hosts too: only what comes after theirs counts.
    rig.run(primary, "journalctl", "--sync")
    before = len(told())
    rig.ship(primary, "pause", workload=WORKLOAD)
    rig.wait_shipping(primary, ("paused",))
    try:
        entry = wait(lambda: told()[before:], LIMIT_SECONDS, "an entry in the journal", 0.5)[-1]
        assert entry["BMIGRATE_BEFORE"] == "in_step" and entry["MESSAGE_ID"] == log.message_id("state")
        assert entry["MESSAGE"].startswith(f"workload {WORKLOAD}: in_step -> paused")
        assert entry["SYSLOG_IDENTIFIER"] == "bmigrate-ship" and entry["PRIORITY"] == "6"
    finally:
        rig.ship(primary, "resume", workload=WORKLOAD)
    rig.wait_in_step()


def test_the_live_view_shows_where_the_device_is_dirty(rig: Rig) -> None:
    """On a terminal, with the library that the host has: one written block is one cell of the map."""
    primary = rig.primary()
    rig.wait_in_step()
    rig.ship(primary, "pause", workload=WORKLOAD)
    try:
        rig.wait_shipping(primary, ("paused",))
        content = base64.b64encode(os.urandom(BLOCK)).decode()
        rig.agents[primary].call("write", device=rig.device(primary), offset=0, content=content)
        rig.breqd(primary, "barrier", workload=WORKLOAD)
        told = rig.breqd(primary, "map", workload=WORKLOAD, volume=rig.volume, cells=64)
        assert told["dirty"][0] >= 1 and told["cell_bytes"] * 64 >= told["size_bytes"]
        status, _, drawn = rig.run(primary, "python3", "-c", WATCH, WORKLOAD).partition("\n")
        assert status == "0", drawn[-2000:]
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn)
        assert "paused" in plain and f"{WORKLOAD}/{rig.volume}" in plain and "map:" in plain, plain[-3000:]
        rows = re.findall(r"│ ?([.:=+*%#@~ -]{20,}) ?│", plain)
        assert any(row.lstrip()[:1] == "." for row in rows), f"no dirty cell is drawn\n{plain[-3000:]}"
    finally:
        rig.ship(primary, "resume", workload=WORKLOAD)
    rig.wait_in_step()
