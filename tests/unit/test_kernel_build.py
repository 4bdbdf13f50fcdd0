# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules build alone, without a warning, for every kernel whose headers this machine has."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from bmigrate.kernel import buildid

SOURCE = Path(__file__).resolve().parents[2] / "module_src"
HEADERS = sorted(path for path in Path("/lib/modules").glob("*/build") if (path / "scripts").is_dir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of module_src, as git has it."""
    ignored = shutil.ignore_patterns("*.ko", "*.o", "*.mod*", "*.cmd", "Module.symvers", "modules.order")
    shutil.copytree(SOURCE, tmp_path / "module_src", ignore=ignored)
    return tmp_path / "module_src"


def make(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the copy."""
    return subprocess.run(["make", "-C", str(source), *arguments], capture_output=True, text=True)


def test_this_machine_has_kernel_headers() -> None:
    assert HEADERS, "no kernel headers below /lib/modules: run make setup"


@pytest.mark.parametrize("headers", HEADERS, ids=lambda path: path.parent.name)
def test_builds_without_warnings(source: Path, headers: Path) -> None:
    done = make(source, f"KDIR={headers}", "W=1")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    # Said by the kernel's build about this machine, not about the modules.
    excused = re.compile(r"Skipping BTF generation|the compiler differs from the one used")
    complaints = [line for line in output.splitlines() if "warning:" in line.lower() and not excused.search(line)]
    assert not complaints, output
    identities = {name: buildid.of_file(source / f"{name}.ko") for name in ("bufflink", "reqlog")}
    assert len(set(identities.values())) == 2 and all(len(value) == 40 for value in identities.values()), identities
    for name in identities:
        assert _modinfo(source / f"{name}.ko")["abi"] == "1"


def test_the_abi_can_be_another_for_tests(source: Path) -> None:
    assert make(source, f"KDIR={HEADERS[-1]}", "BMIGRATE_ABI=99").returncode == 0
    for name in ("bufflink", "reqlog"):
        assert _modinfo(source / f"{name}.ko")["abi"] == "99"


def test_clean_leaves_what_git_has(source: Path) -> None:
    before = {path.relative_to(source) for path in source.rglob("*")}
    assert make(source, f"KDIR={HEADERS[-1]}").returncode == 0
    assert (source / "reqlog.ko").exists()
    assert make(source, "clean", "KDIR=/nonexistent").returncode == 0
    assert {path.relative_to(source) for path in source.rglob("*")} == before


def test_missing_headers_are_said_by_name(source: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-headers"
    done = make(source, f"KDIR={missing}")
    assert done.returncode == 2 and f"no kernel headers at {missing}" in done.stderr


def supported(release: str) -> bool:
    """Whether DKMS would build for this kernel: as its programs of Debian 11 to 13 read dkms.conf."""
    script = 'source "$1" && [[ ! ( $BUILD_EXCLUSIVE_KERNEL && ! $2 =~ $BUILD_EXCLUSIVE_KERNEL ) ]]'
    argv = ["bash", "-c", script, "bash", str(SOURCE / "dkms.conf"), release]
    return subprocess.run(argv, check=False).returncode == 0


@pytest.mark.parametrize(
    "release",
    ["5.10.0-46-amd64", "5.15.0-130-generic", "6.1.0-56-amd64", "6.12.117+deb13-amd64", "7.2.13+deb14-amd64",
     "7.3.4+deb13-amd64", "7.3-amd64"],
)  # fmt: skip
def test_dkms_builds_for_the_supported_kernels(release: str) -> None:
    assert supported(release)


@pytest.mark.parametrize(
    "release",
    [
        "4.19.0-27-amd64",
        "5.4.0-200-generic",
        "5.9.0-5-amd64",
        "5.1.21",
        "7.4.1+deb14-amd64",
        "7.30.1-amd64",
        "8.0-amd64",
    ],
)
def test_dkms_builds_for_no_other_kernel(release: str) -> None:
    assert not supported(release)


def _modinfo(module: Path) -> dict[str, str]:
    """The strings in .modinfo: name=value, ended by NULs."""
    found = re.findall(rb"(?<=\0)(abi|license|version|name|vermagic)=([^\0]*)\0", module.read_bytes())
    return {key.decode(): value.decode() for key, value in found}
