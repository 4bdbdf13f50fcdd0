# SPDX-License-Identifier: GPL-3.0-or-later
"""Fault points are switched on by tests only: nothing that is installed sets the variable that does it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("roles", "playbooks", "library", "module_utils", "module_src", "src", "monitoring", "inventories", "demo")
VARIABLE = "BMIGRATE_FAULTS"
READER = "src/bmigrate/common/faults.py"


def _shipped() -> list[Path]:
    """Every text of the tree that reaches a host, or tells Ansible what to do there."""
    files = [path for name in SHIPPED for path in sorted((ROOT / name).rglob("*")) if path.is_file()]
    files += [path for path in sorted(ROOT.iterdir()) if path.suffix in (".yml", ".cfg")]
    return [path for path in files if "__pycache__" not in path.parts]


def _where(word: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in _shipped() if word in path.read_text(errors="replace")]


def test_nothing_that_is_installed_switches_a_fault_on() -> None:
    """One place reads the variable, none sets it, and no program makes a plan of its own."""
    assert _where(VARIABLE) == [READER]
    assert _where("faults.configure") == []
    assert (ROOT / READER).read_text().count(VARIABLE) == 2, "the documentation of the file, and the one look"


def test_what_is_installed_was_looked_at() -> None:
    """Units and their drop-ins, templates, roles and playbooks, also those that run at the root."""
    names = {str(path.relative_to(ROOT)) for path in _shipped()}
    assert {"failover.yml", "install.yml", "roles/programs/files/breqd.service", READER} <= names
    assert {path.suffix for path in _shipped()} >= {".service", ".j2", ".yml", ".py"}
