# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel modules on one host, where nothing else is installed: prebuilt, refused, by DKMS, and under sig_enforce.

Early by its name: the modules can only be exchanged while no daemon has them. The tests build on each other; the last
one leaves the host with DKMS's modules, as the installation that follows wants them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bmigrate.kmod import modfile
from lab import Lab
from tests.ansible.playbooks import ROOT, Run, bare_guests, fingerprint, play
from tests.unit.kmod_files import make_key
from tests.vm import kernel_bench

pytestmark = [pytest.mark.ansible, pytest.mark.timeout(1800)]

HOST = "beta"
MODULES = ("bufflink", "reqlog")
PLAYBOOK = str(ROOT / "tests/ansible/kernel_modules.yml")
NEXT = "6.99.0-next-amd64"
#: What a host needs only to build.
TOOLS = ("/usr/bin/gcc", "/usr/bin/make", "/usr/sbin/dkms", "/lib/modules/$(uname -r)/build")


@pytest.fixture(scope="module")
def host(lab: Lab) -> Lab:
    """A guest without bmigrate, with nothing of ours loaded."""
    bare_guests(lab)
    lab.ssh(HOST, "for m in reqlog bufflink; do test ! -e /sys/module/$m || rmmod $m || exit; done")
    return lab


@pytest.fixture(scope="module")
def given(host: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operator's directory, with modules for the guest's kernel."""
    return kernel_bench.given(host, tmp_path_factory.mktemp("prebuilt"))


@pytest.fixture
def without_tools(host: Lab) -> Iterator[None]:
    """No compiler, no DKMS, no headers on the host."""
    for path in TOOLS:
        host.ssh(HOST, f"mv {path} {path}.aside")
    yield
    for path in TOOLS:
        host.ssh(HOST, f"mv {path}.aside {path}")


def modules(lab: Lab, given: Path, *words: str, **extra: str) -> Run:
    return play(lab, PLAYBOOK, *words, bmigrate_kmod_prebuilt=str(given), **extra)


def copies(lab: Lab) -> list[str]:
    """Our module files on the host, relative to the kernel's directory, by the system's own tool."""
    found = lab.ssh(HOST, "cd /lib/modules/$(uname -r); find . -name 'reqlog.ko*' -o -name 'bufflink.ko*'").stdout
    return sorted(found.split())


def loaded(lab: Lab) -> dict[str, str]:
    """The build-ids that the kernel shows, without a module: nothing."""
    shown = "for m in bufflink reqlog; do od -An -v -tx1 -w99 /sys/module/$m/notes/.note.gnu.build-id || exit; done"
    done = lab.ssh(HOST, shown, check=False)
    if done.returncode:
        return {}
    notes = [bytes.fromhex(line) for line in done.stdout.splitlines()]
    return {name: str(modfile.notes_build_id(note)) for name, note in zip(MODULES, notes)}


def everything(lab: Lab) -> tuple[list[str], dict[str, str], str]:
    """What a refused run must leave as it is."""
    ours = "find /usr/lib/bmigrate /usr/src/bmigrate* /etc/dkms /var/lib/bmigrate -type f -printf '%p %s %T@\\n' | sort"
    return copies(lab), loaded(lab), lab.ssh(HOST, ours + " 2>/dev/null", check=False).stdout


def test_prebuilt_modules_need_nothing_on_the_host(host: Lab, given: Path, without_tools: None) -> None:
    before = fingerprint(host, HOST)
    run = modules(host, given, "--check", bmigrate_kmod_method="prebuilt")
    assert run.returncode == 0 and run.recap(HOST)["changed"] > 0, run.output
    assert fingerprint(host, HOST) == before
    run = modules(host, given, bmigrate_kmod_method="prebuilt")
    assert run.returncode == 0, run.output[-6000:]
    assert copies(host) == [f"./updates/bmigrate/{name}.ko" for name in MODULES]
    (release,) = given.iterdir()
    files = {name: modfile.load(str(release / f"{name}.ko")).build_id for name in MODULES}
    assert loaded(host) == files


def test_a_second_run_changes_nothing_and_warns_of_the_next_kernel(host: Lab, given: Path) -> None:
    host.ssh(HOST, f"mkdir /lib/modules/{NEXT} && touch /boot/vmlinuz-{NEXT}")
    try:
        run = modules(host, given, bmigrate_kmod_method="prebuilt")
        assert run.returncode == 0 and run.recap(HOST)["changed"] == 0, run.output
        said = " ".join(run.output.split())
        assert f"kernel {NEXT} is installed, would be booted next, and has no bufflink module" in said, run.output
    finally:
        host.ssh(HOST, f"rm -r /lib/modules/{NEXT} /boot/vmlinuz-{NEXT}")


def test_modules_of_another_kernel_are_refused_and_nothing_changes(host: Lab, given: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(given, other)
    (path,) = other.glob("*/reqlog.ko")
    content = path.read_bytes()
    assert content.count(b" SMP preempt ") == 1
    path.write_bytes(content.replace(b" SMP preempt ", b" SMP rrempt2 "))
    before = everything(host)
    run = modules(host, other, bmigrate_kmod_method="prebuilt")
    said = " ".join(run.output.split())
    assert run.returncode == 2 and "SMP rrempt2" in said and "SMP preempt" in said, run.output
    assert "build it with the headers of that kernel" in said
    assert everything(host) == before and run.recap(HOST)["changed"] == 0


def test_the_way_back_to_dkms_leaves_one_copy_signed_with_the_key_of_the_host(
    host: Lab, given: Path, tmp_path: Path
) -> None:
    prebuilt = loaded(host)
    host.ssh(HOST, "mkdir -m 700 -p /var/lib/kernel-test-mok")
    for path in make_key(tmp_path, "modules of beta"):
        host.put(HOST, path, f"/var/lib/kernel-test-mok/{path.name}")
    run = modules(
        host,
        given,
        bmigrate_kmod_method="dkms",
        bmigrate_kmod_signing_key="/var/lib/kernel-test-mok/key.pem",
        bmigrate_kmod_signing_cert="/var/lib/kernel-test-mok/cert.pem",
    )
    assert run.returncode == 0, run.output[-6000:]
    assert host.ssh(HOST, "modinfo -F signer reqlog bufflink").stdout.splitlines() == ["modules of beta"] * 2
    assert copies(host) == [f"./updates/dkms/{name}.ko" for name in MODULES]
    assert "installed" in host.ssh(HOST, "dkms status -m bmigrate").stdout
    assert loaded(host) and loaded(host) != prebuilt


def test_where_signatures_are_required_it_is_said_before_the_kernel_says_no(
    host: Lab, given: Path, tmp_path: Path
) -> None:
    """The kernel's own refusal comes last, to prove that ours was right; the switch cannot be taken back but by a
    reboot, after which the modules are loaded again."""
    host.ssh(HOST, "echo Y > /sys/module/module/parameters/sig_enforce")
    before = everything(host)
    key, cert = make_key(tmp_path, "nobody enrolled this")
    for extra, words in (
        (
            {
                "bmigrate_kmod_method": "dkms",
                "bmigrate_kmod_signing_key": "/var/lib/kernel-test-mok/key.pem",
                "bmigrate_kmod_signing_cert": "/var/lib/kernel-test-mok/cert.pem",
            },
            "signed by modules of beta",
        ),
        ({"bmigrate_kmod_method": "prebuilt"}, "bufflink and reqlog are not signed"),
        (
            {
                "bmigrate_kmod_method": "prebuilt",
                "bmigrate_kmod_signing_key": str(key),
                "bmigrate_kmod_signing_cert": str(cert),
            },
            "signed by nobody enrolled this",
        ),
    ):
        run = modules(host, given, **extra)
        said = " ".join(run.output.split())
        assert run.returncode == 2 and words in said, run.output
        assert "module.sig_enforce on" in said and "mokutil --import" in said, run.output
    assert everything(host) == before and run.recap(HOST)["changed"] == 0
    host.ssh(HOST, "rmmod reqlog bufflink")
    done = host.ssh(HOST, "modprobe reqlog", check=False)
    assert done.returncode != 0 and "key" in done.stderr.lower(), done.stderr
    host.reboot(HOST)
    assert set(loaded(host)) == set(MODULES)
    host.ssh(HOST, "rm -r /var/lib/kernel-test-mok /etc/dkms/framework.conf.d/bmigrate.conf")
