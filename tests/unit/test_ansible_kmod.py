# SPDX-License-Identifier: GPL-3.0-or-later
"""How kernel modules come to a host: built by DKMS, or chosen and signed on the controller; what is told of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bmigrate.cli import status
from bmigrate.handover import preflight
from bmigrate.kmod import der, kernels, modfile
from tests.unit.ansible_module import Programs, load, run_module
from tests.unit.handover_world import config_of
from tests.unit.kmod_files import CRCS, FLAGS, MODULES, RELEASE, insist, install, make_kernel, make_key, make_module
from tests.unit.test_handover_preflight import preflight_facts

NEWER = "6.1.0-10-amd64"
TRUSTING = {"secure_boot": "off", "lockdown": "none", "sig_enforce": False, "keys": []}

# -- built by DKMS --------------------------------------------------------------------------------------------------


def test_build_ids_are_those_that_the_toolchain_shows(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text("int x;\n")
    subprocess.run(["gcc", "-c", "-o", str(tmp_path / "x.o"), str(tmp_path / "x.c")], check=True)
    assert modfile.elf_build_id((tmp_path / "x.o").read_bytes()) is None
    subprocess.run(
        [
            "gcc",
            "-shared",
            "-nostdlib",
            "-Wl,--build-id=0xabcdef0123456789",
            "-o",
            str(tmp_path / "x"),
            str(tmp_path / "x.o"),
        ],
        check=True,
    )
    assert modfile.elf_build_id((tmp_path / "x").read_bytes()) == "abcdef0123456789"
    assert modfile.elf_build_id(b"not an elf file") is None


def kmod(programs: Programs, source: Path, check: bool = False, **options: Any) -> dict[str, Any]:
    words = {"source": str(source), "version": "0.1.0", "stamp": str(source.parent / "stamp.json"), **options}
    return run_module("bmigrate_kmod", words, programs, check=check)


def test_missing_headers_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    programs = Programs(tmp_path / "bin")
    programs.add("dkms", ["", 0, ""])
    source = tmp_path / "src"
    source.mkdir()
    (source / "dkms.conf").write_text("x")
    release = os.uname().release
    if Path(f"/lib/modules/{release}/build/Makefile").exists():  # a machine whose own headers are there
        answer = kmod(programs, tmp_path / "nowhere")
        assert answer["reason"] == "source_missing"
    else:
        answer = kmod(programs, source)
        assert answer["reason"] == "headers_missing" and f"linux-headers-{release}" in answer["msg"]
    assert answer["failed"] is True
    assert [call for call in programs.calls() if call[1:2] != ["status"]] == []


@pytest.mark.parametrize(
    "text, state",
    [
        ("", ""),
        ("bmigrate/0.1.0: added\n", "added"),
        ("bmigrate/0.1.0, 1.2.3-other, x86_64: installed\n", "added"),
        ("bmigrate/0.1.0, {kernel}, x86_64: built\n", "built"),
        ("bmigrate, 0.1.0, {kernel}, x86_64: installed\n", "installed"),
        (
            "bmigrate/0.1.0, {kernel}, x86_64: installed (WARNING! Diff between built and installed module!)\n",
            "installed",
        ),
        ("other/0.1.0, {kernel}, x86_64: installed\n", ""),
    ],
)
def test_the_words_of_dkms_are_understood(text: str, state: str) -> None:
    module = load("bmigrate_kmod")

    class Asked:
        def __init__(self) -> None:
            self.params = {"name": "bmigrate", "version": "0.1.0"}

        def run_command(self, _: Any) -> tuple[int, str, str]:
            return 0, text.format(kernel=os.uname().release), ""

    assert module.Dkms(Asked()).dkms_state() == state


def test_other_source_with_the_same_version_is_another_build(tmp_path: Path) -> None:
    from ansible.module_utils.bmigrate_kmod_host import source_digest

    (tmp_path / "a.c").write_text("one")
    first = source_digest(str(tmp_path))
    (tmp_path / "a.c").write_text("two")
    assert source_digest(str(tmp_path)) != first
    (tmp_path / "a.c").write_text("one")
    assert source_digest(str(tmp_path)) == first
    (tmp_path / "a.c").rename(tmp_path / "b.c")
    assert source_digest(str(tmp_path)) != first


def test_an_installed_file_that_a_power_cut_has_emptied_counts_as_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asked:
        params = {"modules": ["reqlog"], "signing_key": None, "stamp": str(tmp_path / "stamp")}  # noqa: RUF012

    way = load("bmigrate_kmod").Dkms(Asked())
    directory = make_kernel(tmp_path)
    install(directory)
    monkeypatch.setattr(way, "file_of", lambda name, release=None: str(directory / "updates/dkms" / f"{name}.ko"))
    assert way.build_ids(RELEASE) == {"reqlog": "abcdef01"}
    (directory / "updates/dkms/reqlog.ko").write_bytes(b"")
    assert way.build_ids(RELEASE) == {"reqlog": None} and not way.current(RELEASE, "digest")
    assert way.modules()["reqlog"]["file_build_id"] is None


def test_a_signing_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    answer = kmod(Programs(tmp_path / "bin"), tmp_path, signing_key="/somewhere/key.pem")
    assert answer["failed"] is True and "signing_cert" in answer["msg"]


@pytest.mark.parametrize(
    ("mode", "version", "words"),
    [(0o600, "dkms: 2.8.4", "does not sign modules"), (0o640, "dkms-3.0.10", "others may read the signing key")],
)
def test_a_key_that_cannot_be_used_is_refused_before_anything_is_built(
    tmp_path: Path, mode: int, version: str, words: str
) -> None:
    key, cert = make_key(tmp_path)
    key.chmod(mode)
    programs = Programs(tmp_path / "bin")
    programs.add("dkms", ["--version", 0, version])
    answer = kmod(programs, tmp_path, state="checked", signing_key=str(key), signing_cert=str(cert))
    assert answer["failed"] is True and answer["reason"] == "signing_key" and words in answer["msg"]


def test_what_dkms_is_told_of_signing_is_found_again(tmp_path: Path) -> None:
    load("bmigrate_kmod")
    from ansible.module_utils.bmigrate_kmod_dkms import settings

    plain, ours = tmp_path / "framework.conf", tmp_path / "bmigrate.conf"
    plain.write_text("# mok_signing_key=/not/this\nmok_certificate=/etc/cert.pub\nverbose=1\n")
    ours.write_text("mok_signing_key='/etc/key'\n")
    found = settings([str(plain), str(tmp_path / "missing"), str(ours)])
    assert found == {"mok_certificate": "/etc/cert.pub", "mok_signing_key": "/etc/key"}


@pytest.mark.parametrize(
    ("said", "meaning"),
    [
        ("modprobe: ERROR: could not insert 'reqlog': Required key not available", "does not know the key"),
        ("could not insert 'reqlog': Key was rejected by service", "signed modules only"),
        ("reqlog: disagrees about version of symbol module_layout", "another build of this kernel"),
        ("reqlog: version magic '1' should be '2'", "another kernel"),
        ("could not insert 'reqlog': Cannot allocate memory", ""),
    ],
)
def test_the_refusals_of_the_kernel_are_told_in_words(said: str, meaning: str) -> None:
    load("bmigrate_kmod")
    from ansible.module_utils.bmigrate_kmod_host import why_not_loaded

    told = why_not_loaded(said)
    assert meaning in told and bool(told) is bool(meaning)


# -- built elsewhere ------------------------------------------------------------------------------------------------


def host(*releases: str, **changes: Any) -> dict[str, Any]:
    """What the facts of a host say of its kernels; it runs the first."""
    asked = {release: {"vermagic": release + FLAGS, "versions": CRCS} for release in releases}
    return {"release": releases[0], "requirements": asked, "trust": TRUSTING, **changes}


def choose(folder: Path, kernel: dict[str, Any], check: bool = False, **options: Any) -> dict[str, Any]:
    words = {"directory": str(folder / "given"), "dest": str(folder / "signed"), "kernel": kernel, **options}
    return run_module("bmigrate_prebuilt", words, check=check)


def give(folder: Path, release: str = RELEASE, **how: Any) -> None:
    for name in MODULES:
        make_module(folder / "given" / release / f"{name}.ko", release, **how)


def test_the_modules_of_every_installed_kernel_are_chosen(tmp_path: Path) -> None:
    give(tmp_path)
    give(tmp_path, NEWER)
    give(tmp_path, "5.10.0-not-installed")
    answer = choose(tmp_path, host(RELEASE, NEWER, "6.12.1"))
    assert answer["changed"] is False and answer["releases"] == [RELEASE, NEWER] and answer["missing"] == ["6.12.1"]
    assert answer["files"][0] == {
        "src": str(tmp_path / "given" / RELEASE / "bufflink.ko"),
        "dest": f"/usr/lib/bmigrate/prebuilt/{RELEASE}/bufflink.ko",
    }
    assert len(answer["files"]) == 4


def test_no_modules_for_the_running_kernel_is_a_refusal_that_names_both(tmp_path: Path) -> None:
    give(tmp_path, NEWER)
    (tmp_path / "given" / RELEASE).mkdir()
    make_module(tmp_path / "given" / RELEASE / "bufflink.ko")
    answer = choose(tmp_path, host(RELEASE, NEWER))
    assert answer["failed"] is True and answer["reason"] == "no_prebuilt"
    assert f"kernel {RELEASE}" in answer["msg"] and f"complete: {NEWER}" in answer["msg"]
    assert "tools/build-module" in answer["msg"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"flags": " SMP mod_unload modversions "}, f"made for '{RELEASE} SMP mod_unload modversions'"),
        ({"flags": "-rt" + FLAGS}, f"made for '{RELEASE}-rt SMP"),
        ({"crcs": {"module_layout": 1}}, "symbol module_layout has version 00000001 there and 00001111"),
    ],
)
def test_a_module_for_another_kernel_is_refused_also_in_check_mode(
    tmp_path: Path, how: dict[str, Any], words: str
) -> None:
    give(tmp_path)
    make_module(tmp_path / "given" / RELEASE / "reqlog.ko", **how)
    for check in (True, False):
        answer = choose(tmp_path, host(RELEASE), check=check)
        assert answer["failed"] is True and answer["reason"] == "wrong_vermagic" and words in answer["msg"]
        assert "reqlog.ko" in answer["msg"] and "headers of that kernel" in answer["msg"]


def test_a_host_that_cannot_tell_its_vermagic_is_compared_by_release(tmp_path: Path) -> None:
    give(tmp_path)
    kernel = host(RELEASE)
    kernel["requirements"][RELEASE] = {"vermagic": None, "versions": {}}
    assert choose(tmp_path, kernel)["releases"] == [RELEASE]
    make_module(tmp_path / "given" / RELEASE / "reqlog.ko", NEWER)
    assert choose(tmp_path, kernel)["reason"] == "wrong_vermagic"


def test_copies_are_signed_once_and_the_key_stays_secret(tmp_path: Path) -> None:
    give(tmp_path)
    key, cert = make_key(tmp_path, extra=())
    options: dict[str, Any] = {"signing_key": str(key), "signing_cert": str(cert)}
    assert choose(tmp_path, host(RELEASE), check=True, **options)["changed"] is False
    assert not (tmp_path / "signed").exists()
    answer = choose(tmp_path, host(RELEASE), **options)
    copies = [Path(entry["src"]) for entry in answer["files"]]
    certificate = der.certificate(cert.read_bytes())
    for copy in copies:
        signature = modfile.load(str(copy)).signature
        assert signature is not None and certificate.made(signature)
        plain = tmp_path / "given" / RELEASE / copy.name
        assert modfile.unsigned(copy.read_bytes()) == plain.read_bytes()
        assert subprocess.run(["modinfo", "-F", "signer", copy], capture_output=True, text=True).stdout == "test key\n"
    assert key.read_text().splitlines()[1] not in json.dumps(answer)
    before = [copy.stat().st_mtime_ns for copy in copies]
    assert choose(tmp_path, host(RELEASE), **options) == answer
    assert [copy.stat().st_mtime_ns for copy in copies] == before
    give(tmp_path, build_id="01020304")
    choose(tmp_path, host(RELEASE), **options)
    assert modfile.load(str(copies[0])).build_id == "01020304"
    assert not list((tmp_path / "signed").rglob(".new-*"))


def test_a_key_that_does_not_belong_to_its_certificate_leaves_nothing_signed(tmp_path: Path) -> None:
    give(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    key, cert = make_key(tmp_path / "one")[0], make_key(tmp_path / "two")[1]
    answer = choose(tmp_path, host(RELEASE), signing_key=str(key), signing_cert=str(cert))
    assert answer["failed"] is True and answer["reason"] == "signing_key"
    assert [path for path in (tmp_path / "signed").rglob("*") if path.is_file()] == []
    own = make_key(tmp_path / "two")
    idle: dict[str, Any] = {"signing_key": str(own[0]), "signing_cert": str(own[1]), "sign_file": "/bin/true"}
    answer = choose(tmp_path, host(RELEASE), **idle)
    assert answer["failed"] is True and "could not be signed" in answer["msg"]


def test_a_host_that_insists_on_signatures_gets_only_what_it_would_take(tmp_path: Path) -> None:
    give(tmp_path)
    key, cert = make_key(tmp_path)
    number = der.certificate(cert.read_bytes()).key_id
    strict = {**TRUSTING, "lockdown": "integrity", "secure_boot": "on", "keys": ["Debian Secure Boot CA: 6ccece7e"]}
    answer = choose(tmp_path, host(RELEASE, trust=strict))
    assert answer["reason"] == "signature_required" and "mokutil --import" in answer["msg"]
    assert "Secure Boot on, lockdown integrity" in answer["msg"]
    options: dict[str, Any] = {"signing_key": str(key), "signing_cert": str(cert)}
    answer = choose(tmp_path, host(RELEASE, trust=strict), **options)
    assert answer["reason"] == "signature_required" and f"test key ({number})" in answer["msg"]
    assert not (tmp_path / "signed").exists()
    knowing = {**strict, "keys": ["Debian Secure Boot CA: 6ccece7e", f"test key: {number}"]}
    assert choose(tmp_path, host(RELEASE, trust=knowing), **options)["releases"] == [RELEASE]


# -- what is told ---------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A faked host with a ready kernel that runs, in the place of this machine."""
    real = kernels.report
    monkeypatch.setattr(kernels, "report", lambda: real(str(tmp_path), RELEASE))
    install(make_kernel(tmp_path))
    return tmp_path


def test_preflight_and_status_name_a_kernel_without_the_module_and_secure_boot(tree: Path) -> None:
    plan = preflight.check(config_of("alpha"), preflight_facts("primary"), preflight_facts("standby"))
    assert "kernel_not_ready" not in [item["reason"] for item in plan["warnings"]]
    assert plan["kernel"]["trust"]["secure_boot"] == "no_efi"
    make_kernel(tree, NEWER)
    insist(tree)
    plan = preflight.check(config_of("alpha"), preflight_facts("primary"), preflight_facts("standby"))
    said = [item for item in plan["warnings"] if item["reason"] == "kernel_not_ready"]
    assert [item["host"] for item in said] == ["alpha", "alpha"]
    assert "not signed" in said[0]["message"] and "mokutil" in said[0]["hint"]
    assert f"kernel {NEWER} is installed, would be booted next" in said[1]["message"]
    assert not [item for item in plan["blockers"] if "kernel" in item["reason"]]
    data = status.collect(None)
    assert [entry["ready"] for entry in data["kernel"]["kernels"]] == [False, False]
    text = status.render(data)
    assert f"kernel {NEWER} is installed" in text and "signed modules only: no EFI firmware" in text
    json.dumps(data)


def test_the_table_ends_with_what_a_reboot_would_do(tree: Path) -> None:
    make_kernel(tree, NEWER)
    entry = {"configured": True, "error": None, "discover": {"state": {"role": "primary"}}}
    texts = [item["message"] for item in kernels.report()["warnings"]]
    assert len(texts) == 1
    kernel = {"warnings": texts, "secure_boot": "Secure Boot on"}
    bmigrate = {"installed": True, "workloads": {"w": entry}, "kernel": kernel}
    reports = {"alpha": {"ansible_facts": {"bmigrate": bmigrate}}, "beta": {"unreachable": True, "msg": "gone"}}
    workloads = [{"workload": "w", "hosts": {"alpha": {}, "beta": {}}}]
    told = run_module("bmigrate_table", {"workloads": workloads, "reports": reports})
    assert told["kernel_warnings"] == [f"alpha: {texts[0]}"] and told["secure_boot"] == {"alpha": "Secure Boot on"}
    assert told["text"][-1] == f"warning: alpha: {texts[0]}"


def test_facts_name_the_installed_kernels_and_what_they_take() -> None:
    kernel = run_module("bmigrate_facts", {})["ansible_facts"]["bmigrate"]["kernel"]
    assert os.uname().release in [entry["release"] for entry in kernel["installed"]]
    assert set(kernel["requirements"]) == {entry["release"] for entry in kernel["installed"]}
    assert kernel["trust"]["secure_boot"] in ("no_efi", "on", "off", "unknown")
    assert any(os.uname().release in text for text in kernel["warnings"]), "this machine has no modules of ours"
