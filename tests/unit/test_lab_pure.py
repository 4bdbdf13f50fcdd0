# SPDX-License-Identifier: GPL-3.0-or-later
"""The lab's parts that only turn values into values, and its way of ending processes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lab import LabError, aptsources, disks, guestconfig, initramfs, ports, procs, wait
from lab.compare import compare_files

DEB822 = """\
# a comment
Types: deb
URIs: http://mirror.example/debian
# another
Suites: bookworm bookworm-updates
Components: main

Types: deb deb-src
URIs: http://mirror.example/debian-security/
Suites:
 bookworm-security
Components: main

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Enabled: no

Types: deb
URIs: https://third.example/node_20.x
Suites: nodistro
Components: main
"""


def test_sources_of_both_formats_and_only_debian_itself() -> None:
    one_line = (
        "deb [signed-by=/x.gpg arch=amd64] http://first.example/debian/ bookworm main contrib\n"
        "# deb http://comment.example/debian bookworm main\n"
        "deb-src http://src.example/debian bookworm main\n"
        "deb https://cloud.example/apt cloud-sdk-bookworm main\n"
    )
    found = aptsources.parse_one_line(one_line) + aptsources.parse_deb822(DEB822)
    assert [source.uri for source in found if aptsources.is_debian(source)] == [
        "http://first.example/debian/",
        "http://mirror.example/debian",
        "http://mirror.example/debian-security/",
    ]
    assert aptsources.mirror_lines(found) == [
        "deb http://first.example/debian/ bookworm main",
        "deb http://first.example/debian/ bookworm-updates main",
        "deb http://mirror.example/debian-security/ bookworm-security main",
    ]


def test_a_machine_without_debian_sources_is_told_so() -> None:
    with pytest.raises(LookupError, match="no Debian archive"):
        aptsources.mirror_lines(aptsources.parse_one_line("deb http://x.example/ubuntu noble main\n"))


def test_modules_load_after_what_they_need() -> None:
    dep = "kernel/a.ko: kernel/b.ko kernel/c.ko\nkernel/b.ko: kernel/c.ko\nkernel/c.ko:\nkernel/virtio_x.ko:\n"
    assert initramfs.load_order(dep, ["a", "virtio-x", "builtin"]) == [
        "kernel/c.ko",
        "kernel/b.ko",
        "kernel/a.ko",
        "kernel/virtio_x.ko",
    ]


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    made = guestconfig.archive("beta", "0" * 32, b"PRIVATE", b"PUBLIC", b"ssh-ed25519 AAAA me\n")
    listing = _read_cpio(made)
    assert listing["config/etc/hostname"] == (0o100644, b"beta\n")
    assert listing["config/etc/ssh/ssh_host_ed25519_key"] == (0o100600, b"PRIVATE")
    assert listing[f"{guestconfig.HOME}/.ssh"][0] == 0o040700
    assert b"Address=10.77.0.2/24" in listing["config/etc/systemd/network/10-lan.network"][1]
    names = list(listing)
    assert names.index(f"{guestconfig.HOME}/.ssh") < names.index(f"{guestconfig.HOME}/.ssh/authorized_keys")


def _read_cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        begin = (at + 110 + fields[11] + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = (fields[1], data[begin : begin + fields[6]])
        at = (begin + fields[6] + 3) // 4 * 4


def test_compare_counts_blocks_and_sectors_and_says_where(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    size = (2 << 20) + 3584
    content = bytearray(size)
    one.write_bytes(content)
    for at in (0, 700, 4096 * 5 + 513, size - 1):
        content[at] = 1
    two.write_bytes(content)
    result = compare_files({"one": one, "two": two}, count_nonzero=True)
    assert (result.equal, result.different_blocks, result.different_sectors) == (False, 3, 4)
    assert result.first_offsets == [0, 512, 4096 * 5 + 512, size - 512]
    assert result.nonzero_sectors == {"one": 0, "two": 4}
    assert compare_files({"a": two, "b": two}).equal


def test_a_longer_file_is_not_equal(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(bytes(4096))
    (tmp_path / "two").write_bytes(bytes(8192))
    assert not compare_files({"one": tmp_path / "one", "two": tmp_path / "two"}).equal


def test_serial_numbers_fit_and_differ() -> None:
    serials = [disk.serial(vm) for disk in disks.DISKS for vm in disks.VM_NAMES]
    assert len(set(serials)) == len(serials)
    assert max(map(len, serials)) <= 20
    assert disks.disk_by_number(2).size_bytes == 64 * 1024 * 1024 + 3584


def test_ports_are_free_distinct_and_not_those_of_others() -> None:
    kinds = [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_STREAM]
    first = ports.choose(kinds, set(), "seed")
    second = ports.choose(kinds, set(first), "seed")
    assert len(set(first + second)) == 6
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", first[0]))
        assert not ports.is_free(first[0], socket.SOCK_STREAM)
        assert first[0] not in ports.choose(kinds, set(), "seed")


def test_a_process_is_ended_only_if_it_is_the_one_that_was_started(tmp_path: Path) -> None:
    process = procs.Process(tmp_path / "x.pid")
    pid = process.spawn(["sleep", "600"], tmp_path / "log", tmp_path)
    assert process.pid() == pid
    noted = process.pid_file.read_text()
    process.pid_file.write_text(noted.replace('"start_ticks": ', '"start_ticks": 1'))
    process.end()
    assert procs.start_ticks(pid) is not None, "a process with another start time was killed"
    process.pid_file.write_text(noted)
    process.end()
    assert procs.start_ticks(pid) is None
    assert not process.pid_file.exists()


def test_waiting_names_what_did_not_come() -> None:
    with pytest.raises(LabError, match="waited 0 s for the moon, in vain\nit is day"):
        wait(lambda: False, 0.05, "the moon", 0.01, lambda: "it is day")
