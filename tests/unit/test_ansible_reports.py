# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator reads: the report of a handover, the table of all workloads, the documentation of the modules."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.ansible_module import ROOT, load, run_module

GENERATION = {"number": 2, "id": "a" * 32}
PLAN = {"workload": "w", "run_id": "r1", "continued": False, "source": "alpha", "target": "beta"}
SOURCE = {
    "role": "standby",
    "generation": GENERATION,
    "last_handover": {
        "run_id": "r1",
        "results": {
            "converge": {"seconds": 9.0},
            "quiesce": {"seconds": 1.5, "stopped_at": 100.0, "parts": [{"name": "unmount", "seconds": 0.5}]},
            "drain": {"seconds": 0.75, "bytes_left_at_start": 8192, "bytes_shipped": 4096, "digest": "d" * 64},
            "commit": {"seconds": 0.25, "problems": ["the timer was gone"]},
        },
    },
}
TARGET = {
    "role": "primary",
    "generation": GENERATION,
    "last_handover": {
        "run_id": "r1",
        "results": {
            "prepare": {"seconds": 0.5},
            "promote": {"seconds": 1.0},
            "start": {"seconds": 2.0, "running_at": 107.0},
        },
    },
}


def report(**words: Any) -> dict[str, Any]:
    options = {"plan": PLAN, "source": SOURCE, "target": TARGET, "clock": {"stop": 50.0, "run": 60.0}, **words}
    return run_module("bmigrate_report", options)


def test_a_good_handover_is_reported_in_numbers() -> None:
    told = report()["report"]
    assert (told["verdict"], told["downtime_seconds"], told["downtime_by_hosts_clocks_seconds"]) == ("ok", 10.0, 7.0)
    assert told["generation"] == GENERATION and told["digest"] == "d" * 64
    assert (told["bytes_left_when_drain_began"], told["drained_bytes"]) == (8192, 4096)
    assert told["between_the_phases_seconds"] == pytest.approx(10.0 - (1.5 + 0.75 + 0.5 + 0.25 + 1.0 + 2.0))
    assert told["phases"][1]["parts"] == {"unmount": 0.5} and told["problems"] == ["the timer was gone"]


def test_what_is_not_known_is_null_and_never_a_guess() -> None:
    told = report(source={}, target={}, clock={})["report"]
    assert told["downtime_seconds"] is None and told["digest"] is None and told["phases"] == []
    other = report(plan=dict(PLAN, run_id="another"))["report"]
    assert other["phases"] == [] and other["digest"] is None


def test_a_continued_run_has_only_the_hosts_clocks() -> None:
    assert report(clock={"run": 60.0})["report"]["downtime_seconds"] == 7.0


def test_the_page_needs_nothing_else_and_says_what_failed(tmp_path: Path) -> None:
    failure = {"task": "Ship what is left", "message": "digest <mismatch> & more", "verdict": "rolled_back"}
    told = report(failure=failure, directory=str(tmp_path / "new"))
    page = (tmp_path / "new" / "handover-w-r1.html").read_text()
    kept = json.loads((tmp_path / "new" / "handover-w-r1.json").read_text())
    assert kept == told["report"] and kept["verdict"] == "rolled_back" and sorted(told["files"]) == told["files"]
    assert "digest &lt;mismatch&gt; &amp; more" in page

    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.outside: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.outside += [tag for name, _ in attrs if name in ("src", "href")] + [tag] * (tag in ("script", "link"))

    links = Links()
    links.feed(page)
    assert links.outside == []


def facts(role: str, **found: Any) -> dict[str, Any]:
    discover = {"state": {"role": role, "generation": GENERATION}, **found}
    entry = {"configured": True, "error": None, "discover": discover}
    return {"ansible_facts": {"bmigrate": {"installed": True, "workloads": {"w": entry}}}}


def test_every_workload_and_host_has_a_line_also_a_host_that_is_gone() -> None:
    shipping = {"workload": "w", "state": "in_step", "bytes_left": 2048, "lag_seconds": 0.25, "last_error": None}
    reports = {
        "alpha": facts("primary", ship={"workloads": [shipping]}),
        "beta": {"unreachable": True, "msg": "no route to host"},
    }
    workloads = [{"workload": "w", "hosts": {"alpha": {}, "beta": {}, "gamma": {}}}]
    told = run_module("bmigrate_table", {"workloads": workloads, "reports": reports})
    assert [line["host"] for line in told["lines"]] == ["alpha", "beta", "gamma"]
    assert told["lines"][0]["state"] == "in_step" and told["lines"][0]["lag_seconds"] == 0.25
    assert "no route to host" in told["lines"][1]["problem"] and "inventory" in told["lines"][2]["problem"]
    assert len(told["text"]) == 4 and "2.0 KiB" in told["text"][1]


def test_a_suspect_volume_is_in_the_table() -> None:
    table = load("bmigrate_table")
    found = facts("standby", hold={"running": True, "volumes": [{"volume": "v", "suspect": "foreign write"}]})
    assert table.line("w", "beta", found)["problem"] == "volume v is suspect: foreign write"


MODULES = sorted(path.stem for path in (ROOT / "library").glob("*.py"))


def test_every_module_has_its_page_and_says_how_check_mode_and_diff_behave() -> None:
    argv = [str(Path(sys.executable).parent / "ansible-doc"), "--json", "-t", "module", *MODULES]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = json.loads(done.stdout)
    assert sorted(pages) == MODULES
    for name, page in pages.items():
        assert page["doc"]["short_description"] and page["examples"].strip() and page["return"], name
        assert set(page["doc"]["attributes"]) == {"check_mode", "diff_mode"}, name


@pytest.mark.parametrize("name", MODULES)
def test_the_page_and_the_module_know_the_same_options(name: str) -> None:
    """What the documentation promises is what AnsibleModule accepts: same names, types, choices and defaults."""
    source = (ROOT / "library" / f"{name}.py").read_text()
    text = re.search(r'DOCUMENTATION = r"""(.*?)"""', source, re.DOTALL)
    assert text is not None
    documented = yaml.safe_load(text.group(1)).get("options", {})
    accepted: dict[str, Any] = {}
    module = load(name)

    class Stop(Exception):
        pass

    def record(argument_spec: dict[str, Any], **_: Any) -> None:
        accepted.update(argument_spec)
        raise Stop

    module.AnsibleModule = record
    with pytest.raises(Stop):
        module.main()
    assert set(documented) == set(accepted)
    for option, spec in accepted.items():
        page = documented[option]
        assert page["type"] == spec["type"], option
        assert page.get("required", False) == spec.get("required", False), option
        assert page.get("choices") == spec.get("choices"), option
        assert page.get("default") == spec.get("default"), option


def test_every_role_has_an_argument_spec_for_exactly_its_defaults_and_a_readme() -> None:
    for role in sorted((ROOT / "roles").iterdir()):
        spec = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text())["argument_specs"]["main"]
        defaults_file = role / "defaults" / "main.yml"
        defaults = yaml.safe_load(defaults_file.read_text()) if defaults_file.exists() else {}
        options = spec.get("options", {})
        assert {name for name, option in options.items() if not option.get("required")} == set(defaults), role.name
        assert all(option["description"] for option in options.values()), role.name
        assert (role / "README.md").read_text().count("\n") > 3, role.name


def test_the_role_asks_for_the_versions_that_the_repository_has() -> None:
    from bmigrate import __version__
    from bmigrate.kernel import abi

    defaults = yaml.safe_load((ROOT / "roles" / "kmod" / "defaults" / "main.yml").read_text())
    assert defaults["kmod_abi"] == abi.REQLOG_ABI
    assert defaults["kmod_version"] == __version__
    assert f'PACKAGE_VERSION="{__version__}"' in (ROOT / "module_src" / "dkms.conf").read_text()
