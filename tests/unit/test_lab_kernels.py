# SPDX-License-Identifier: GPL-3.0-or-later
"""Which kernels the suites offer, how a guest gets another one, and what counts as a complaint of a build."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from lab import LabError, aptsources, guestconfig, initramfs, kernelindex, kernels, qemu
from lab.kernelindex import Offer

PACKAGES = "\n".join(
    f"Package: {name}\nVersion: 1\n"
    for name in (
        "linux-image-5.10.0-9-amd64",
        "linux-headers-5.10.0-9-amd64",
        "linux-image-5.10.0-46-amd64-unsigned",
        "linux-image-5.10.0-46-amd64",
        "linux-headers-5.10.0-46-amd64",
        "linux-image-5.10.0-47-amd64",  # no headers
        "linux-image-6.1.0-0.deb11.52-amd64",  # of another release
        "linux-headers-6.1.0-0.deb11.52-amd64",
        "linux-image-6.12.90+deb12.1-amd64-unsigned",
        "linux-headers-6.12.90+deb12.1-amd64",
        "linux-image-6.12.95+deb12-cloud-amd64",
        "linux-headers-6.12.95+deb12-cloud-amd64",
        "linux-image-7.3-amd64",  # a release candidate
        "linux-headers-7.3-amd64",
        "linux-image-amd64",
        "linux-headers-amd64",
    )
)


def offer(release: str, suite: str = "x") -> Offer:
    """A kernel of a suite."""
    return Offer(suite, f"{release}-amd64", f"linux-image-{release}-amd64")


def test_a_kernel_counts_that_has_image_and_headers() -> None:
    assert kernelindex.parse("s", PACKAGES) == [
        Offer("s", "5.10.0-46-amd64", "linux-image-5.10.0-46-amd64"),
        Offer("s", "5.10.0-9-amd64", "linux-image-5.10.0-9-amd64"),
        Offer("s", "6.12.90+deb12.1-amd64", "linux-image-6.12.90+deb12.1-amd64-unsigned"),
    ]


def test_the_newest_of_a_series_is_chosen_by_number() -> None:
    offers = [offer(r) for r in ("5.10.0-46", "5.10.0-9", "6.1.0-56", "6.12.117+deb13", "6.12.117+deb12", "6.12.95")]
    assert [kernelindex.choose(offers, series).release for series in ("5.10", "6.1", "6.12")] == [
        "5.10.0-46-amd64",
        "6.1.0-56-amd64",
        "6.12.117+deb13-amd64",
    ]


def test_the_two_newest_are_of_two_series() -> None:
    offers = [offer(r) for r in ("6.12.117", "7.2.9", "7.2.13+deb14", "7.10.1+deb13", "7.10.0+deb13")]
    assert kernelindex.choose(offers, "newest").release == "7.10.1+deb13-amd64"
    assert kernelindex.choose(offers, "previous").release == "7.2.13+deb14-amd64"
    with pytest.raises(LabError, match="offers a kernel of the series previous"):
        kernelindex.choose(offers[:3], "previous")


def test_the_root_is_of_the_suites_own_release() -> None:
    assert kernelindex.base_of(offer("5.10.0-46", "bullseye-security")) == "bullseye"
    assert kernelindex.base_of(offer("6.12.95+deb12", "bookworm-backports")) == "bookworm"
    assert kernelindex.base_of(offer("7.3.4+deb13", "trixie-backports")) == "sid"


def test_archives_are_the_machines_own_and_signed() -> None:
    text = "deb http://a.example/debian bookworm main\ndeb http://a.example/debian-security bookworm-security main\n"
    signed = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    sources = aptsources.parse_one_line(text)
    assert kernelindex.lines_of(("sid", "trixie-security"), sources) == [
        f"{signed} http://a.example/debian sid main",
        f"{signed} http://a.example/debian-security trixie-security main",
    ]
    # A machine without the security archive does without.
    assert kernelindex.lines_of(("trixie", "trixie-security"), sources[:1]) == [
        f"{signed} http://a.example/debian trixie main"
    ]


def test_compressed_modules_are_unpacked_for_busybox(tmp_path: Path) -> None:
    modules = tmp_path / "lib/modules/7.0"
    modules.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/busybox").write_bytes(b"BUSYBOX")
    (modules / "modules.dep").write_text("ext4.ko.xz: jbd2.ko.xz\njbd2.ko.xz:\n")
    for name in ("ext4", "jbd2"):
        (modules / f"{name}.ko.xz").write_bytes(lzma.compress(f"ELF {name}".encode()))
    made = initramfs.build(tmp_path, "7.0", b"INIT")
    assert b"jbd2.ko\next4.ko\n" in made
    assert b"ELF ext4" in made and b"ELF jbd2" in made


def test_a_guest_with_another_kernel_mounts_its_modules() -> None:
    plain = guestconfig.archive("beta", "0" * 32, b"", b"", b"")
    other = guestconfig.archive("beta", "0" * 32, b"", b"", b"", "7.3.4-amd64")
    assert b"lab-modules" not in plain
    assert b"LABEL=lab-modules /lib/modules/7.3.4-amd64" in other
    assert b"config/usr/lib/modules/7.3.4-amd64" in other
    ports = qemu.Ports(1, 2, 3)
    argv = qemu.arguments("beta", 2, ports, 4, Path("vmlinuz"), "x", Path("/there/modules.img"))
    assert "driver=raw,node-name=modules,read-only=on,file.driver=file,file.filename=/there/modules.img" in argv
    assert not any("modules" in argument for argument in qemu.arguments("beta", 2, ports, 4, Path("vmlinuz"), "x"))


def test_what_a_build_complains_of() -> None:
    said = (
        "warning: the compiler differs from the one used to build the kernel\n"
        "warning: pahole version differs from the one used to build the kernel\n"
        "  CC [M]  reqlog/whole.o\n"
        "./reqlog/bio.c:167:39: warning: incorrect type\n"
        "reqlog/main.c:1:1: error: bad constant expression\n"
        "WARNING: modpost: missing MODULE_LICENSE()\n"
    )
    assert len(kernels.complaints_in(said)) == 3
    assert "modpost" in kernels.complaints_in(said)[-1]


def test_a_directory_that_is_no_kernel_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="is no kernel of the lab's"):
        _ = kernels.Kernel(tmp_path).release
    with pytest.raises(LabError, match="no series"):
        kernels.ensure("4.19")


def test_prune_keeps_what_a_series_or_a_guest_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    where = kernels.kernels_directory()
    for release in ("named", "booted", "old"):
        (where / release).mkdir(parents=True)
        (where / release / "kernel.json").write_text("{}")
    (where / "series").mkdir()
    (where / "series/newest").symlink_to("../named")
    assert kernels.prune({where / "booted"}) == [where / "old"]
    assert sorted(path.parent.name for path in where.glob("*/kernel.json")) == ["booted", "named"]
