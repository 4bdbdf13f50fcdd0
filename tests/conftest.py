# SPDX-License-Identifier: GPL-3.0-or-later
"""What all tests share: the lab, booted once for everybody who asks for it.

Promises: the instance is BMIGRATE_LAB's, or `test`; it starts from fresh guests and leaves no process behind. With
BMIGRATE_LAB_KEEP=1 an instance that is up is used as it is and stays up, for work on a single test. A test that
fails shows the last console lines of both guests.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from lab import Lab, LabError

#: Each worker has guests of its own: those of the second one are NAME-gw1.
LAB_NAME = os.environ.get("BMIGRATE_LAB", "test")
if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
    LAB_NAME += f"-{os.environ['PYTEST_XDIST_WORKER']}"
os.environ["BMIGRATE_LAB"] = LAB_NAME


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With workers side by side (`make test`): tests that share guests stay with one worker, and in their order.

    Groups begin in the order of the command line (--no-loadscope-reorder): the longest ones first, the tests without
    guests, each a group of its own, last.
    """
    from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith("tests/vm/test_kernel"):
                return "kernel"
            return "/".join(nodeid.split("/")[:2]) if nodeid.startswith(("tests/vm/", "tests/ansible/")) else nodeid

    return Together(config, log)


@contextmanager
def _booted(name: str, guests: list[str] | None) -> Iterator[Lab]:
    keep = os.environ.get("BMIGRATE_LAB_KEEP") == "1"
    box = Lab(name)
    if not keep:
        box.down()
    try:
        box.up(guests)
        yield box
    finally:
        if not keep:
            box.down()


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Both guests, answering ssh."""
    with _booted(LAB_NAME, None) as box:
        yield box


@pytest.fixture(scope="session")
def bare_lab() -> Iterator[Lab]:
    """A guest of their own for the tests of the kernel modules, on which nothing is ever installed."""
    with _booted(f"{LAB_NAME}-bare", ["beta"]) as box:
        yield box


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """After a failure: a guest that runs and does not answer any more is booted again, and fails no other test."""
    box = Lab(LAB_NAME)
    if not item.session.testsfailed or "lab" not in getattr(item, "fixturenames", ()) or not box.exists():
        return
    for name in box.vms:
        if not box.guest(name).running():
            continue
        try:
            box.wait_for_ssh(name, 120)
        except LabError:
            box.kill(name)
            box.start(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add the guests' consoles to the report of a failed test that used them."""
    report = yield
    # The tests of the kernel modules have labs of their own.
    bench = getattr(item, "funcargs", {}).get("bench")
    if report.failed and (bench or "lab" in getattr(item, "fixturenames", ())):
        box = bench.lab if bench else Lab(LAB_NAME)
        for name in box.vms:
            try:
                report.sections.append((f"console of {name}", box.console(name, 8)))
            except LabError as error:
                report.sections.append((f"console of {name}", str(error)))
    return report
