# SPDX-License-Identifier: GPL-3.0-or-later
"""Module files, installed kernels, Secure Boot, as they are read: against the tools' own words and faked trees."""

from __future__ import annotations

import lzma
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmigrate.kmod import der, kernels, modfile, trust
from tests.unit.kmod_files import (
    CRCS,
    FLAGS,
    MODULES,
    RELEASE,
    insist,
    install,
    make_kernel,
    make_key,
    make_module,
    sign_file,
)

NEWER = "6.1.0-10-amd64"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_module(tmp_path_factory.mktemp("module") / "reqlog.ko")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def signed(plain: Path, keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("signed") / "reqlog.ko"
    path.write_bytes(plain.read_bytes())
    subprocess.run([sign_file(), "sha256", str(keys[0]), str(keys[1]), str(path)], check=True)
    return path


def modinfo(path: Path, name: str) -> str:
    done = subprocess.run(["modinfo", "-F", name, str(path)], capture_output=True, text=True, check=True)
    return done.stdout.strip("\n")


# -- files ----------------------------------------------------------------------------------------------------------


def test_a_module_says_what_modinfo_shows(signed: Path) -> None:
    found = modfile.load(str(signed))
    assert found.vermagic == modinfo(signed, "vermagic") == RELEASE + FLAGS
    assert found.info["abi"] == modinfo(signed, "abi") == "1"
    assert found.build_id == "abcdef01" and found.versions == CRCS


def test_the_signer_is_the_one_that_the_tools_show(plain: Path, signed: Path, keys: tuple[Path, Path]) -> None:
    found = modfile.load(str(signed)).signature
    assert found is not None and found.signer == modinfo(signed, "signer") == "test key"
    assert found.serial == modinfo(signed, "sig_key").replace(":", "").lower()
    own = der.certificate(keys[1].read_bytes())
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(keys[1]), "-noout", "-serial", "-ext", "subjectKeyIdentifier"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert own.serial in shown.lower() and own.key_id is not None
    assert own.key_id == re.sub(r"[^0-9a-f]", "", shown.splitlines()[-1].lower())
    assert own.made(found) and modfile.load(str(plain)).signature is None
    assert modfile.unsigned(signed.read_bytes()) == plain.read_bytes() == modfile.unsigned(plain.read_bytes())


def test_another_key_of_the_same_name_did_not_sign_it(signed: Path, tmp_path: Path) -> None:
    other = der.certificate(make_key(tmp_path)[1].read_bytes())
    found = modfile.load(str(signed)).signature
    assert found is not None and other.subject == found.signer and not other.made(found)


def test_a_signature_by_key_id_is_read(plain: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["openssl", "cms", "-sign", "-binary", "-noattr", "-nocerts", "-keyid", "-outform", "DER", "-md", "sha256"]
    made = subprocess.run(
        [*words, "-signer", str(keys[1]), "-inkey", str(keys[0]), "-in", str(plain)], capture_output=True, check=True
    ).stdout
    found = der.signature(made)
    assert found.signer is None and der.certificate(keys[1].read_bytes()).made(found)


def test_packed_modules_are_read_too(plain: Path, tmp_path: Path) -> None:
    packed = tmp_path / "reqlog.ko.xz"
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert modfile.load(str(packed)) == modfile.load(str(plain))
    packed.write_bytes(b"\xfd7zXZ")
    with pytest.raises(ValueError, match="unpacked"):
        modfile.load(str(packed))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_in_one_way(data: Any, signed: Path, keys: tuple[Path, Path]) -> None:
    parsers: list[tuple[Path, Any]] = [(signed, modfile.parse), (keys[1], der.certificate)]
    path, parse = data.draw(st.sampled_from(parsers))
    raw = bytearray(path.read_bytes())
    if parse is der.certificate:
        raw = bytearray(subprocess_der(keys[1]))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        parse(bytes(raw))
    except ValueError:
        pass  # anything else would fail this test


def test_a_section_beyond_the_end_is_not_taken_for_a_short_one(plain: Path) -> None:
    raw = bytearray(plain.read_bytes())
    (table,) = struct.unpack_from("<Q", raw, 40)
    for index in range(1, struct.unpack_from("<H", raw, 60)[0]):
        if struct.unpack_from("<I", raw, table + index * 64 + 4)[0] == 1:  # a section with bytes in it
            struct.pack_into("<Q", raw, table + index * 64 + 32, 1 << 40)
    with pytest.raises(ValueError, match="beyond its end"):
        modfile.parse(bytes(raw))


_DER: dict[Path, bytes] = {}


def subprocess_der(cert: Path) -> bytes:
    """A certificate as openssl writes it in DER."""
    if cert not in _DER:
        words = ["openssl", "x509", "-in", str(cert), "-outform", "DER"]
        _DER[cert] = subprocess.run(words, capture_output=True, check=True).stdout
    return _DER[cert]


def test_a_certificate_is_the_same_in_both_forms(keys: tuple[Path, Path]) -> None:
    assert der.certificate(subprocess_der(keys[1])) == der.certificate(keys[1].read_bytes())


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_bytes_that_are_nothing_are_refused(raw: bytes) -> None:
    for parse in (modfile.parse, der.signature, der.certificate):
        with pytest.raises(ValueError):
            parse(raw)


# -- what the running kernel insists on -----------------------------------------------------------------------------

VARIABLE = "sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c"
SHIM = "sys/firmware/efi/efivars/MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23"
LOCKDOWN = "sys/kernel/security/lockdown"
ENFORCE = "sys/module/module/parameters/sig_enforce"
ON, OFF = b"\x06\0\0\0\x01", b"\x06\0\0\0\x00"


def tree(root: Path, files: dict[str, bytes]) -> trust.Trust:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return trust.read(str(root))


@pytest.mark.parametrize(
    ("files", "secure_boot"),
    [
        ({}, "no_efi"),
        ({VARIABLE: ON}, "on"),
        ({VARIABLE: OFF}, "off"),
        ({VARIABLE: ON, SHIM: b"\x06\0\0\0\x01"}, "off"),
        ({VARIABLE: ON, SHIM: b"\x06\0\0\0\x00"}, "on"),
        ({VARIABLE: b"\x01"}, "unknown"),
        ({VARIABLE: b"\x06\0\0\0\x07"}, "unknown"),
        ({"sys/firmware/efi/efivars/BootOrder-x": b""}, "off"),
        ({"sys/firmware/efi/fw_platform_size": b"64"}, "unknown"),
    ],
)
def test_secure_boot_is_what_the_firmware_says(tmp_path: Path, files: dict[str, bytes], secure_boot: str) -> None:
    assert tree(tmp_path, files).secure_boot == secure_boot


@pytest.mark.parametrize(
    ("files", "required"),
    [
        ({}, False),
        ({ENFORCE: b"N\n", LOCKDOWN: b"[none] integrity confidentiality\n"}, False),
        ({ENFORCE: b"Y\n", LOCKDOWN: b"[none] integrity confidentiality\n"}, True),
        ({ENFORCE: b"N\n", LOCKDOWN: b"none [integrity] confidentiality\n"}, True),
        ({ENFORCE: b"N\n", LOCKDOWN: b"none integrity [confidentiality]\n"}, True),
        ({VARIABLE: ON, ENFORCE: b"N\n", LOCKDOWN: b"[none] integrity confidentiality\n"}, False),
        ({VARIABLE: ON, ENFORCE: b"N\n"}, True),
        ({VARIABLE: OFF, ENFORCE: b"N\n"}, False),
    ],
)
def test_signatures_are_required_by_lockdown_or_by_the_parameter(
    tmp_path: Path, files: dict[str, bytes], required: bool
) -> None:
    found = tree(tmp_path, files)
    assert found.enforced is required and trust.Trust.from_dict(found.to_dict()) == found
    unsigned = trust.refusal(found, {"reqlog": None, "bufflink": None})
    assert (unsigned is not None) is required
    if unsigned:
        assert "bufflink and reqlog are not signed" in unsigned and "mokutil --import" in unsigned
        assert found.sentence() in unsigned


def test_a_key_is_known_by_its_number_and_a_signer_by_its_name(
    tmp_path: Path, signed: Path, keys: tuple[Path, Path]
) -> None:
    own = der.certificate(keys[1].read_bytes())
    said = modfile.load(str(signed)).signature
    assert said is not None
    insist(tmp_path, ("Debian Secure Boot CA", "6ccece7e"), ("Acme: test key", str(own.key_id)))
    found = trust.read(str(tmp_path))
    assert found.knows(own) is True and found.knows_signer(said) is True
    assert trust.refusal(found, {"reqlog": said}) is None and trust.refusal_of_key(found, own) is None
    insist(tmp_path, ("Debian Secure Boot CA", "6ccece7e"), ("test key 2", "00"))
    found = trust.read(str(tmp_path))
    assert found.knows(own) is False and found.knows_signer(said) is False
    text = trust.refusal(found, {"reqlog": said})
    assert text is not None and "reqlog is signed by test key, and no such key is in its keyrings" in text
    text = trust.refusal_of_key(found, own)
    assert text is not None and f"signed by test key ({own.key_id})" in text
    assert "would not be signed" in (trust.refusal_of_key(found, None) or "")


def test_keys_that_cannot_be_read_are_left_to_the_kernel(tmp_path: Path, signed: Path) -> None:
    insist(tmp_path)
    (tmp_path / "proc/keys").unlink()
    found = trust.read(str(tmp_path))
    assert found.keys is None and found.enforced
    assert trust.refusal(found, {"reqlog": modfile.load(str(signed)).signature}) is None
    assert trust.refusal(found, {"reqlog": None}) is not None


# -- installed kernels ----------------------------------------------------------------------------------------------

PARTS = st.tuples(
    st.integers(4, 12), st.integers(0, 20), st.integers(0, 300),
    st.sampled_from(["", "-1", "-9", "-56", "-rc3", "-rc10", "+deb13", "+deb13.1", "-0.deb12.2"]),
    st.sampled_from(["", "-amd64", "-cloud-amd64", "-rt-amd64", "-generic"]),
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(st.lists(PARTS.map(lambda parts: "{}.{}.{}{}{}".format(*parts)), min_size=2, max_size=40, unique=True))
def test_releases_are_sorted_as_the_boot_loader_does(releases: list[str]) -> None:
    done = subprocess.run(
        ["sort", "-V"], input="\n".join(releases) + "\n", capture_output=True, text=True, check=True,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert sorted(releases, key=kernels.version_key) == done.stdout.splitlines()


def report(root: Path) -> dict[str, dict[str, Any]]:
    """The report's entries per release."""
    return {entry["release"]: entry for entry in kernels.report(str(root), RELEASE)["kernels"]}


def test_a_host_that_is_as_it_should_be_is_warned_of_nothing(tmp_path: Path) -> None:
    for release in (RELEASE, NEWER):
        install(make_kernel(tmp_path, release))
    (tmp_path / "lib/modules/6.0.0-left-over-by-dpkg").mkdir()
    found = kernels.report(str(tmp_path), RELEASE)
    assert found["warnings"] == [] and found["boots_next"] == NEWER
    assert [entry["release"] for entry in found["kernels"]] == [RELEASE, NEWER]
    assert all(entry["ready"] for entry in found["kernels"])
    assert found["kernels"][0]["modules"]["reqlog"]["build_id"] == "abcdef01"


def test_a_kernel_without_the_module_is_told_before_the_reboot_into_it(tmp_path: Path) -> None:
    install(make_kernel(tmp_path))
    make_kernel(tmp_path, NEWER)
    (warning,) = kernels.report(str(tmp_path), RELEASE)["warnings"]
    assert warning["reason"] == "kernel_not_ready"
    assert f"kernel {NEWER} is installed, would be booted next, and has no bufflink module" in warning["message"]
    assert "not tracked" in warning["message"] and f"linux-headers-{NEWER}" in warning["hint"]
    (tmp_path / f"lib/modules/{NEWER}/build").mkdir()
    (tmp_path / f"lib/modules/{NEWER}/build/Makefile").touch()
    (warning,) = kernels.report(str(tmp_path), RELEASE)["warnings"]
    assert warning["hint"] == "run install.yml"


def test_the_running_kernel_counts_also_when_its_image_is_elsewhere(tmp_path: Path) -> None:
    make_kernel(tmp_path, image=False)
    assert report(tmp_path)[RELEASE]["problem"] == "has no bufflink module"


def test_a_boot_loader_that_was_told_another_entry_is_not_guessed_at(tmp_path: Path) -> None:
    for release in (RELEASE, NEWER):
        install(make_kernel(tmp_path, release))
    grub = tmp_path / "etc/default/grub"
    grub.parent.mkdir(parents=True)
    for setting, expected in (("0", NEWER), ('"0"', NEWER), ("saved", None), ("'1>2'", None)):
        grub.write_text(f"# GRUB_DEFAULT=7\nGRUB_DEFAULT={setting}\n")
        assert kernels.report(str(tmp_path), RELEASE)["boots_next"] == expected, setting


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flags": " SMP mod_unload "}, "it is made for"),
        ({"crcs": {"module_layout": 0x9999}}, "symbol module_layout has version 00009999 there and 00001111"),
        ({"abi": 2}, "of abi 2, the running kernel's is of 1"),
    ],
)
def test_a_module_that_would_not_load_or_not_be_understood_is_told(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    install(make_kernel(tmp_path))
    directory = make_kernel(tmp_path, NEWER)
    install(directory)
    assert report(tmp_path)[NEWER]["ready"]
    make_module(directory / "updates/dkms/reqlog.ko", NEWER, **change)
    entry = report(tmp_path)[NEWER]
    assert not entry["ready"] and words in entry["problem"] and "reqlog" in entry["problem"]
    assert report(tmp_path)[RELEASE]["ready"]


def test_a_damaged_or_unlisted_module_is_told(tmp_path: Path) -> None:
    directory = make_kernel(tmp_path)
    install(directory)
    (directory / "updates/dkms/bufflink.ko").write_bytes(b"")
    assert "cannot be read" in report(tmp_path)[RELEASE]["problem"]
    install(directory)
    (directory / "modules.dep").write_text("kernel/lib/own.ko:\n")
    assert report(tmp_path)[RELEASE]["problem"] == "has no bufflink module"


def test_what_is_not_signed_is_told_where_signatures_are_required(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    directory = make_kernel(tmp_path)
    install(directory)
    assert report(tmp_path)[RELEASE]["ready"]
    insist(tmp_path, ("another key", "00"))
    assert "not signed, and signatures are required" in report(tmp_path)[RELEASE]["problem"]
    assert "mokutil --import" in kernels.report(str(tmp_path), RELEASE)["warnings"][0]["hint"]
    for name in MODULES:
        path = directory / "updates/dkms" / f"{name}.ko"
        subprocess.run([sign_file(), "sha256", str(keys[0]), str(keys[1]), str(path)], check=True)
    assert "signed by test key, whose key" in report(tmp_path)[RELEASE]["problem"]
    insist(tmp_path, ("test key", str(der.certificate(keys[1].read_bytes()).key_id)))
    assert report(tmp_path)[RELEASE]["ready"]
