# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate limit: what it takes for a rate, and what it says."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from bmigrate.cli import limit, main
from bmigrate.common import rpc


@pytest.mark.parametrize(
    ("text", "value"),
    [("20MiB", 20 << 20), ("1.5GiB", 3 << 29), ("2 MB/s", 2_000_000), ("65536", 65536), ("100kib", 100 << 10)],
)
def test_rates(text: str, value: int) -> None:
    assert limit.rate(text) == value


@pytest.mark.parametrize("text", ["", "fast", "-5MiB", "0", "10", "1TiB", "5 MiB MiB", "nan", "1e9"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        limit.rate(text)


@pytest.mark.parametrize(
    ("option", "sent"), [(["--bandwidth", "1MiB"], 1 << 20), (["--unlimited"], 0), (["--reset"], None)]
)
def test_the_shipper_is_told(
    option: list[str], sent: int | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def call(_path: object, operation: str, **fields: Any) -> dict[str, Any]:
        asked.append({"op": operation, **fields})
        return {"changed": True, "bandwidth_bytes_per_second": 7 << 20, "bandwidth_source": "operator"}

    monkeypatch.setattr(rpc, "call", call)
    assert main.main(["limit", "--workload", "wl", *option, "--json"]) == 0
    assert asked == [{"op": "limit", "workload": "wl", "bandwidth_bytes_per_second": sent}]
    said = json.loads(capsys.readouterr().out)
    assert said["changed"] and said["data"] == {"bandwidth_bytes_per_second": 7 << 20, "bandwidth_source": "operator"}


def test_exactly_one_way_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--reset", "--unlimited"]):
        try:
            code = main.main(["limit", "--workload", "wl", *words])
        except SystemExit as exc:
            code = int(exc.code or 0)
        assert code == 2
    assert "--bandwidth" in capsys.readouterr().err
