# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator sees: metrics, the live view, the journal's fields, alert rules and the dashboard."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from bmigrate.cli import metrics, status, watch
from bmigrate.common import log
from bmigrate.ship import gentle
from bmigrate.ship.engine import Engine
from bmigrate.ship.verdict import STATES
from tests.promtool import promtool

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "monitoring"

SHIP: dict[str, Any] = {
    "workload": "db", "state": "catching_up", "reason": None, "limiter": "link", "bandwidth_bytes_per_second": 0,
    "bandwidth_source": "config", "peer": "beta", "epoch": 7, "streams": 2, "passes": 12, "bytes_left": 300 << 20,
    "total_bytes": 1 << 30, "dirty_rate_bytes_per_second": 1e6, "ship_rate_bytes_per_second": 11e6,
    "predicted_drain_seconds": None, "lag_seconds": 4.5, "shipped_bytes_total": 5000, "zero_bytes_total": 0,
    "same_bytes_total": 0, "hashed_bytes_total": 0, "last_error": None, "progress": None, "volumes": [],
}  # fmt: skip
TRACKED: dict[str, Any] = {
    "workload": "db", "volume": "data", "attached": True, "suspect": None, "size_bytes": 1 << 30,
    "granule_bytes": 4096, "dirty_bytes": 299 << 20, "claimed_bytes": 1 << 20, "failed_bytes": 0, "total_records": 99,
    "written_bytes": 8192, "discarded_bytes": 0, "widened_bytes": 0, "overflow_regions": 0, "resync_count": 1,
    "seed_count": 1, "self_test": {"state": "proven", "proven_age_seconds": 3.0},
}  # fmt: skip


def told(**changes: Any) -> dict[str, Any]:
    """What `bmigrate status` collects, of a primary that catches up."""
    item: dict[str, Any] = {
        "workload": "db", "role": "primary", "generation": {"number": 3, "id": "x"}, "handover": None,
        "state_error": None, "ship": SHIP, "tracking": [TRACKED], "hold": [],
    }  # fmt: skip
    item.update(changes)
    daemons: dict[str, Any] = {"breqd": {"up": True, "error": None}}
    daemons["bmigrate-hold"] = {"up": False, "error": {"message": "no socket", "hint": "start it"}}
    kernel = {"warnings": [], "trust": {"signatures_required": False}, "secure_boot": ""}
    return {"workloads": [item], "daemons": daemons, "kernel": kernel}


def samples(data: dict[str, Any]) -> dict[str, float]:
    """All samples, by name and labels as in the exposition format."""
    found = {}
    for family in metrics.families(data):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_metrics_of_a_primary() -> None:
    """Values arrive under the documented names; what is not known is absent, not 0."""
    found = samples(told())
    assert found['bmigrate_state{state="catching_up",workload="db"}'] == 1
    assert sum(value for name, value in found.items() if name.startswith("bmigrate_state{")) == 1
    assert len([name for name in found if name.startswith("bmigrate_state{")]) == len(STATES)
    assert found['bmigrate_lag_seconds{workload="db"}'] == 4.5
    assert found['bmigrate_left_bytes{workload="db"}'] == 300 << 20
    assert found['bmigrate_shipped_bytes_total{workload="db"}'] == 5000
    assert found['bmigrate_daemon_up{daemon="bmigrate-hold"}'] == 0 and found['bmigrate_daemon_up{daemon="breqd"}'] == 1
    assert found['bmigrate_tracked{volume="data",workload="db"}'] == 1
    assert found['bmigrate_tracker_blind{volume="data",workload="db"}'] == 0
    assert found['bmigrate_volume_records_total{volume="data",workload="db"}'] == 99
    assert not [name for name in found if name.startswith("bmigrate_predicted_drain_seconds")]


def test_metrics_of_trouble() -> None:
    """Suspect, blind, not tracked, an open handover, a replica that nobody holds."""
    blind = {**TRACKED, "suspect": "reason", "self_test": {"state": "blind", "proven_age_seconds": None}}
    found = samples(told(tracking=[blind], handover={"phase": "begun"}))
    assert found['bmigrate_suspect{volume="data",workload="db"}'] == 1
    assert found['bmigrate_tracker_blind{volume="data",workload="db"}'] == 1
    assert found['bmigrate_handover_open{workload="db"}'] == 1
    found = samples(told(tracking=[{**TRACKED, "attached": False, "suspect": "not tracked"}]))
    assert found['bmigrate_tracked{volume="data",workload="db"}'] == 0
    hold = [{"volume": "data", "suspect": "foreign write", "held": False}]
    found = samples(told(role="standby", ship=None, tracking=[], hold=hold))
    assert found['bmigrate_replica_suspect{volume="data",workload="db"}'] == 1
    assert found['bmigrate_replica_held{volume="data",workload="db"}'] == 0
    assert not [name for name in found if name.startswith(("bmigrate_state{", "bmigrate_lag"))]


@pytest.mark.parametrize(("text", "value"), [("127.0.0.1:9637", ("127.0.0.1", 9637)), ("[::1]:80", ("::1", 80))])
def test_addresses(text: str, value: tuple[str, int]) -> None:
    assert metrics.listen(text) == value


@pytest.mark.parametrize("text", ["9637", ":9637", "host:", "host:0", "host:70000", "host:x"])
def test_what_is_no_address(text: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError):
        metrics.listen(text)


def metric_names() -> set[str]:
    """Every name that the exporter can give."""
    data = told(hold=[{"volume": "data", "suspect": None, "held": True}])
    data["workloads"][0]["ship"] = {**SHIP, "predicted_drain_seconds": 1.0}
    standby = dict(data["workloads"][0], role="standby", workload="other")
    data["workloads"].append(standby)
    return {sample.name for family in metrics.families(data) for sample in family.samples}


def test_rules_fire_when_they_must_and_only_then() -> None:
    """Prometheus' own checker, and its own test of the rules."""
    checked = promtool("check", "rules", "bmigrate.rules.yml", cwd=MONITORING)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = promtool("test", "rules", "bmigrate.test.yml", cwd=MONITORING)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_rules_and_dashboard_use_metrics_that_exist() -> None:
    """A name that the exporter does not have would be an alert that never fires."""
    known = metric_names()
    rules = (MONITORING / "bmigrate.rules.yml").read_text()
    expressions = re.findall(r"expr: (.*)", rules)
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    expressions += [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [item["query"] for item in dashboard["templating"]["list"]]
    used = set(re.findall(r"\bbmigrate_\w+", " ".join(expressions)))
    assert len(used) > 15 and used <= known, used - known
    states = set(re.findall(r'state=[~]?"([a-z_|]+)"', " ".join(expressions)))
    assert {name for group in states for name in group.split("|")} <= set(STATES)


def test_documented_metrics_are_all_there_are() -> None:
    """docs/monitoring.md names each metric, and none that is not there; the same for events."""
    text = (ROOT / "docs" / "monitoring.md").read_text()
    assert set(re.findall(r"^\| `(bmigrate_\w+)", text, re.MULTILINE)) == metric_names()
    events = dict(re.findall(r"^\| `([a-z]+)` \| `([0-9a-f]{32})`", text, re.MULTILINE))
    assert events == {name: log.message_id(name) for name in log.EVENTS}


def test_panels_do_not_overlap() -> None:
    panels = json.loads((MONITORING / "grafana-dashboard.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


# -- the live view -----------------------------------------------------------------------------------


def test_a_single_dirty_block_is_seen_on_the_map() -> None:
    """Shades grow with the share; nothing dirty rounds to blank, and what is under way has a sign of its own."""
    picture = {
        "cell_bytes": 4096 * 1000,
        "granule_bytes": 4096,
        "dirty": [0, 1, 500, 1000, 0],
        "claimed": [0, 0, 0, 9, 1],
    }
    text = watch.shades(picture)
    assert text[0] == " " and text[1] == "." and text[3] == "@" and text[4] == watch.CLAIMED
    assert watch.SHADES.index(text[1]) < watch.SHADES.index(text[2]) < watch.SHADES.index(text[3])
    assert watch.rows_of("abcdefg", 3) == ["abc", "def", "g"]


def test_when_it_will_be_done() -> None:
    assert watch.eta_seconds({**SHIP, "bytes_left": 100e6}) == pytest.approx(10.0)
    assert watch.eta_seconds({**SHIP, "bytes_left": 0}) == 0.0
    assert watch.eta_seconds({**SHIP, "ship_rate_bytes_per_second": 1e5}) is None
    assert watch.eta_seconds({**SHIP, "progress": {"done_bytes": 10, "total_bytes": 10e6 + 10}}) == pytest.approx(1.0)


def test_the_live_view_draws_everything() -> None:
    """The picture of a narrow terminal: state, bar, rates, what limits, notes, and the map of the device."""
    picture = {"cell_bytes": 1 << 20, "granule_bytes": 4096, "dirty": [0] * 959 + [256], "claimed": [3] + [0] * 959}
    live = watch.Live(told, status.notes, lambda workload, volume, cells: picture if volume == "data" else None)
    import rich.console

    live.console = rich.console.Console(width=140, record=True, file=open("/dev/null", "w"))
    live.console.print(live.view(told()))
    text = live.console.export_text()
    for word in ("db", "primary", "catching_up", "70.7 %", "300.0 MiB", "link", "4.5 s", "db/data", "~", "@", "map:"):
        assert word in text, f"{word} is not in\n{text}"
    assert "bmigrate-hold is down" in text


def test_a_scheduler_that_ignores_the_idle_class_is_named() -> None:
    """On the primary, in the table and in the live view; not where it is honoured, unknown, or nothing is read."""

    def noted(honoured: bool | None, role: str = "primary") -> bool:
        volumes = [{"volume": "data", "scheduler": "kyber", "idle_class_honoured": honoured}, {"volume": "older"}]
        data = told(role=role, ship={**SHIP, "volumes": volumes})
        found = [text for text in status.notes(data) if "idle class" in text]
        assert all("kyber of data " in text and text in status.render(data) for text in found)
        return bool(found)

    assert noted(False)
    assert not noted(True) and not noted(None) and not noted(False, "standby")


def test_status_says_which_scheduler_each_volume_has(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/null has none; the device asked about is this host's."""
    (volume,) = engine.report()["volumes"]
    assert (volume["scheduler"], volume["idle_class_honoured"]) == (None, None)
    monkeypatch.setattr(gentle, "scheduler", lambda device: ("none", False) if device == "/dev/null" else None)
    (volume,) = engine.report()["volumes"]
    assert (volume["scheduler"], volume["idle_class_honoured"]) == ("none", False)


# -- the journal -------------------------------------------------------------------------------------


def test_events_carry_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """With python3-systemd the journal gets fields; its handler is given what it documents: upper-case extras."""
    kept: list[logging.LogRecord] = []

    class Handler(logging.Handler):
        def __init__(self, **fields: str) -> None:
            super().__init__()
            self.fields = fields

        def emit(self, record: logging.LogRecord) -> None:
            kept.append(record)

    journal = types.ModuleType("systemd.journal")
    journal.JournalHandler = Handler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "systemd", types.ModuleType("systemd"))
    monkeypatch.setitem(sys.modules, "systemd.journal", journal)
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    before = logging.getLogger().handlers[:]
    try:
        logger = log.setup("breqd")
        assert logging.getLogger().handlers[0].fields == {"SYSLOG_IDENTIFIER": "breqd"}  # type: ignore[attr-defined]
        log.event(logger, logging.WARNING, "suspect", "volume db/data is suspect: x", "db", volume="data", state=None)
    finally:
        logging.getLogger().handlers[:] = before
    (record,) = kept
    extra = {key: value for key, value in record.__dict__.items() if key.isupper()}
    assert extra == {
        "BMIGRATE_EVENT": "suspect",
        "BMIGRATE_WORKLOAD": "db",
        "BMIGRATE_VOLUME": "data",
        "MESSAGE_ID": log.message_id("suspect"),
    }
    with pytest.raises(KeyError):
        log.event(logger, logging.INFO, "nosuch", "", "db")


def test_without_the_library_the_text_is_as_before(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "systemd", None)
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    before = logging.getLogger().handlers[:]
    try:
        log.event(log.setup("breqd"), logging.WARNING, "suspect", "volume db/data is suspect: x", "db")
    finally:
        logging.getLogger().handlers[:] = before
    assert capsys.readouterr().err == "<4>breqd: volume db/data is suspect: x\n"


def test_the_libraries_are_those_that_the_hosts_get() -> None:
    """What is imported here is named among the packages that install.yml puts on a host."""
    wanted = (ROOT / "playbooks" / "vars" / "bmigrate.yml").read_text()
    for module, package in (("prometheus_client", "prometheus-client"), ("rich", "rich")):
        assert importlib.util.find_spec(module) is not None
        assert f"python3-{package}" in wanted
