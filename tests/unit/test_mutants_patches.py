# SPDX-License-Identifier: GPL-3.0-or-later
"""The sabotage patches fit the tree of today, and the tests that they are named for exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.mutants import checks, tree
from tests.mutants.catalogue import FAILOVER, MUTANTS, PATCHES, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_patch_applies_and_tells_its_loss(mutant: Mutant, tmp_path: Path) -> None:
    names = re.findall(r"^\+\+\+ b/(\S+)$", mutant.patch.read_text(), re.MULTILINE)
    assert names, "it changes nothing"
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((tree.ROOT / name).read_bytes())
    tree.apply(mutant.patch, tmp_path)
    assert all((tmp_path / name).read_bytes() != (tree.ROOT / name).read_bytes() for name in names)
    assert mutant.loss()


def test_a_patch_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src" / "bmigrate" / "breqd").mkdir(parents=True)
    (tmp_path / "src" / "bmigrate" / "breqd" / "maps.py").write_text("# something else\n")
    patch = next(mutant.patch for mutant in MUTANTS if mutant.name == "ignore-redirty-while-claimed")
    with pytest.raises(tree.PatchError, match="does not apply"):
        tree.apply(patch, tmp_path)


def test_no_patch_is_forgotten() -> None:
    assert {path.stem for path in PATCHES.glob("*.patch")} == {mutant.name for mutant in MUTANTS}


NODES = {FAILOVER, *(node for mutant in MUTANTS for node in (mutant.quiet, mutant.named))}


@pytest.mark.parametrize("node", sorted(NODES))
def test_the_tests_that_are_named_exist(node: str) -> None:
    path, _, name = node.partition("::")
    defined = {
        item.name for item in ast.parse((tree.ROOT / path).read_text()).body if isinstance(item, ast.FunctionDef)
    }
    assert name.partition("[")[0] in defined


@pytest.mark.parametrize(
    ("kind", "element", "judged"),
    [
        ("an assertion", "<failure message='AssertionError: lost 7'>x</failure>", "failed"),
        ("a plain assertion", "<failure message='assert 5 == 0'>x</failure>", "failed"),
        ("a timeout", "<failure message='Failed: Timeout (&gt;900.0s)'>AssertionError: lost 7</failure>", "broken"),
        ("another error", "<failure message='KeyError: 1'>AssertionError: lost 7</failure>", "broken"),
        ("a fixture", "<error message='failed on setup with &quot;AssertionError: lost 7&quot;'>x</error>", "broken"),
        ("not run", "<skipped message='AssertionError: lost 7'/>", "broken"),
    ],
)
def test_only_an_assertion_of_the_test_itself_counts(kind: str, element: str, judged: str) -> None:
    outcome = checks.judge(f"<testsuites><testsuite><testcase>{element}</testcase></testsuite></testsuites>", 1)
    assert outcome.kind == judged, kind
    assert outcome.shows("lost 7|assert 5") == (judged == "failed")


def test_nothing_that_ran_is_no_success() -> None:
    assert checks.judge("<testsuites><testsuite/></testsuites>", 5).kind == "broken"
    assert checks.judge("<testsuites><testsuite><testcase/></testsuite></testsuites>", 0).kind == "passed"
