# SPDX-License-Identifier: GPL-3.0-or-later
"""The table of `make bench`: a target that is missed is shown as missed, and the page keeps all else."""

from __future__ import annotations

import itertools
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.bench import convergence, everything
from tests.bench.everything import BEGIN, END, Row, lines, page
from tests.bench.figures import Curve, curves


def test_a_missed_target_is_told() -> None:
    text = lines([Row("good", [0.98, 1.1, 0.9], "≥ 0.9", True, "c"), Row("bad", [0.5, 0.6], "≥ 0.9", False, "c")])
    good, bad = text.splitlines()[2:]
    assert "yes" in good and "0.9 … 1.1" in good and " 3 " in good
    assert "**no**" in bad and "0.55" in bad


def test_rows_judge_by_the_median() -> None:
    found = {"ratios": [0.5, 0.95, 1.2], "shipped_bytes_per_second": [1 << 20] * 3}
    ratio, rate = everything._shipping("seed", 0.9)(found, "c")
    assert ratio.holds and rate.values == [1.0, 1.0, 1.0]
    drained = [{"left_bytes": 1 << 20, "bound_seconds": 0.5, "durable_seconds": [0.2, 0.6, 0.7]}]
    (drain,) = everything._drain(drained, "c")
    assert drain.values == [0.4, 1.2, 1.4] and drain.holds is False


def test_rows_of_compression_and_streams() -> None:
    found = {
        "random": {"ratios": [0.99, 0.9, 0.97]},
        "text": {"ratios": [1.0, 1.0], "limit_bytes_per_second": 32 << 20},
    }
    random, text = everything._compression(found, "c")
    assert random.holds and text.holds is False, "zstd that brings nothing was said to help"
    assert "32 MiB/s" in text.what

    def case(delay: float) -> dict[str, object]:
        rates = {"1": [1 << 20] * 2, "2": [2 << 20] * 2, "4": [1 << 19] * 2}
        return {"delay_seconds": delay, "bytes_per_second": rates, "ratios": {"2": [2.0, 2.0], "4": [0.5, 0.5]}}

    rows = everything._streams({"loopback": case(0.0), "delay": case(0.02)}, "c")
    assert [row.holds for row in rows] == [None, None, None, None, True, False]
    assert "loopback" in rows[1].what and "20 ms" in rows[4].what


def test_rows_of_scattered_blocks() -> None:
    rate, ratio = everything._scattered({"ratios": [0.9, 0.8], "bytes_per_second": [1 << 20] * 2}, "c")
    assert rate.values == [1.0, 1.0] and rate.holds is None
    assert ratio.holds is False, "threads that make it slower were said to help"


def test_memory_beside_the_maps_has_a_row() -> None:
    rates = {"records_per_second": [6e6], "blocks_per_second": [1e8], "share_of_core": [0.01]}
    cases = dict.fromkeys(("uniform", "mix", "share_1", "share_256"), rates)
    memory = {"resident_bytes": 300 << 20, "maps_bytes": 200 << 20}
    rows = everything._records({"cases": cases, "amplification": [], "memory": memory}, "c")
    (row,) = [row for row in rows if "resident" in row.what]
    assert row.values == [100.0] and row.holds is False


def test_the_page_keeps_its_words() -> None:
    before = f"# Title\n\nwords\n\n{BEGIN}\nold\n{END}\n\nmore\n"
    after = page(before, "Commit 1", [Row("what", [1.0], "", None, "c")], ["python -m x"])
    assert after.startswith("# Title\n\nwords\n") and after.endswith(f"{END}\n\nmore\n") and "old" not in after
    assert (
        f"{BEGIN}\nCommit 1; " in after and "    python -m x\n" in after and page(after, "", [], []).count(BEGIN) == 1
    )
    with pytest.raises(ValueError, match="no place"):
        page("no place", "", [], [])


def test_curves_are_well_formed_and_inside() -> None:
    text = curves("a & b", "s", "MiB <left>", [Curve("one", [(0, 3), (2, 1)]), Curve("two", [(1, 0)])])
    root = ElementTree.fromstring(text.encode())
    lines_ = [item for item in root.iter() if item.tag.endswith("polyline")]
    assert len(lines_) == 2
    for line in lines_:
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 70 <= x <= 630 and 50 <= y <= 310
    with pytest.raises(ValueError):
        curves("", "", "", [])


def test_a_model_is_drawn_like_its_curve() -> None:
    text = curves(
        "t", "s", "m", [Curve("one", [(0, 3), (2, 1)]), Curve("two", [(1, 1)]), Curve("", [(0, 3)], model_of=1)]
    )
    root = ElementTree.fromstring(text.encode())
    one, two, model = [item.attrib for item in root.iter() if item.tag.endswith("polyline")]
    assert model["stroke"] == two["stroke"] != one["stroke"]
    assert "stroke-dasharray" in model and "stroke-dasharray" not in two
    assert text.count("dashed: the model") == 1
    assert "dashed" not in curves("t", "s", "m", [Curve("one", [(0, 3)])])


def test_the_models_curve_is_that_of_the_model() -> None:
    for ratio in convergence.RATIOS:
        points = convergence.model_curve(ratio, 4)
        assert points[0] == (0.0, 1.0) and points[-1] == pytest.approx(convergence.model(ratio, 4))
        assert points[16] == pytest.approx(convergence.model(ratio, 1))
        assert all(later[0] > one[0] for one, later in itertools.pairwise(points))


def test_rows_of_convergence() -> None:
    item = {
        "ratio_wanted": 0.5, "shipped_volumes": 1.8, "model_volumes": 1.5, "walk_volumes": 2.0, "residual_bytes": 3072,
        "model_residual_bytes": 2048.0, "curve": [[0.0, 0, 5]], "model_curve": [[0.0, 5], [1.0, 1]],
    }  # fmt: skip
    model, walk, left = everything._convergence([item], "c")
    assert (model.values, model.holds) == ([1.2], False) and walk.values == [0.9] and left.values == [1.5]
    assert "(2 KiB)" in left.what
    assert everything.pictures({"convergence": [item, item]})["convergence.svg"].count("<polyline") == 2


def test_the_scheduler_stands_below_the_table() -> None:
    runs = {"bare": [{"mean_seconds": 0.002}], "shipped": [{"mean_seconds": 0.004}, {"mean_seconds": 0.006}]}
    pacing = {"scheduler": "none [mq-deadline]", "capacity_bytes_per_second": 4 << 20, "runs": runs}
    scheduler, times = everything.notes({"pacing": pacing})
    assert "`mq-deadline`" in scheduler and "4 MiB/s" in scheduler
    assert "2.0 ms alone" in times and "5.0 ms beside" in times
    assert everything.notes({}) == []
    after = page(f"{BEGIN}\n{END}", "", [Row("what", [1.0], "", None, "c")], ["c"], [scheduler])
    assert f"{scheduler}\n\nMade by:" in after


def test_a_table_that_is_written_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    names = [benchmark.name for benchmark in everything.BENCHMARKS]
    assert "tracking" in names and len(set(names)) == len(names)
    for name in names:
        if name != "tracking":
            (tmp_path / f"{name}.json").write_text('{"commit": "1", "found": "kept"}')

    def measure(benchmark: everything.Benchmark) -> str:
        if benchmark.name == "tools":
            raise subprocess.CalledProcessError(1, benchmark.command)
        return "fresh"

    found, failed = everything.gather(["drain"], False, True, measure)
    assert found["drain"] == "fresh" and found["records"] == "kept"
    assert list(failed) == ["tracking"] and "--only tracking" in failed["tracking"]
    found, failed = everything.gather(["drain"], False, False, measure)
    assert found == {"drain": "fresh"} and not failed
    found, failed = everything.gather(names, False, True, measure)
    assert list(failed) == ["tools"] and list(found) == [name for name in names if name != "tools"]
    found, failed = everything.gather(names, True, False, measure)
    assert set(found.values()) == {"kept"} and list(failed) == ["tracking"]


def test_each_number_has_the_commit_that_it_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(everything, "RESULTS", tmp_path)
    for name, commit in (("records", "a1"), ("drain", "b2"), ("tools", "a1")):
        (tmp_path / f"{name}.json").write_text(f'{{"commit": "{commit}", "found": 1}}')
    assert everything.commits_of(["records", "tools"]) == "Commit a1"
    assert everything.commits_of(["records", "drain", "tools"]) == "Commits a1 (records, tools), b2 (drain)"
    assert everything.commit_now()


def test_the_repositorys_page_has_the_place() -> None:
    text = everything.PAGE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
