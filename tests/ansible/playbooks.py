# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the shipped playbooks against the lab as an operator does, and reads what a host is like."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import Lab, wait
from lab.disks import DISKS

ROOT = Path(__file__).resolve().parents[2]
TOOLS = Path(sys.executable).parent
LIMIT_SECONDS = 1500
#: Where a guest says by which run of the tests it was installed on; a guest made anew does not say it.
INSTALLED = "/var/tmp/bmigrate-installed-by"
SESSION = uuid.uuid4().hex

# Everything that a playbook in check mode must leave as it is, as one digest per part. Times of access are not in it.
FINGERPRINT = r"""
set -u
digest() { sha256sum | cut -c1-32; }
tree() {
    find "$@" -xdev \( -type f -o -type l \) -not -name '*.pyc' -not -path '*/.ansible/*' \
        -printf '%p %s %m %U %G %T@ %l\n' | sort
}
for part in /etc /usr /lib/modules /var/lib/bmigrate ~root; do
    [ -e $part ] && echo "tree:$part $(tree $part 2>&1 | digest)"
done
echo "state $(cat /var/lib/bmigrate/*/state.json 2>/dev/null | digest)"
echo "units $(systemctl list-units --all --no-legend --plain 'bmigrate*' 'breqd*' '*.mount' 'postgresql*' \
    | awk '{print $1, $2, $3, $4}' | digest)"
echo "enabled $(systemctl list-unit-files --no-legend 'bmigrate*' 'breqd*' 'postgresql*' | digest)"
echo "modules $(lsmod | awk '{print $1}' | sort | digest)"
echo "mounts $(findmnt --raw --noheadings --output SOURCE,TARGET,FSTYPE | grep -v /run/user | digest)"
"""


@dataclass(frozen=True)
class Run:
    """A finished ansible-playbook."""

    returncode: int
    output: str

    def recap(self, host: str) -> dict[str, int]:
        """The line of a host in the recap."""
        (line,) = re.findall(rf"^{host}\s+:\s+(.*)$", self.output, re.MULTILINE)
        return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", line)}


def environment(lab: Lab) -> dict[str, str]:
    """What the tools of the venv need to find each other and the lab."""
    return {
        **os.environ,
        "BMIGRATE_LAB": lab.name,
        "PATH": f"{TOOLS}{os.pathsep}{os.environ.get('PATH', '')}",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
    }


def play(lab: Lab, name: str, *words: str, **extra: Any) -> Run:
    """``ansible-playbook NAME`` from the root of the repository.

    Args:
        words: further words of the command line. extra: extra-vars; given as JSON, so that types stay.
    """
    argv = [str(TOOLS / "ansible-playbook"), name, *words]
    if extra:
        argv += ["-e", json.dumps(extra)]
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=environment(lab),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    return Run(done.returncode, done.stdout)


def install_once(lab: Lab, **extra: Any) -> None:
    """``install.yml`` on both hosts, unless this very run of the tests has done so on these guests.

    With BMIGRATE_LAB_DEPLOYED=1 what an earlier run installed is used as it is: for work on a single test only, it
    shows nothing about a fresh installation.
    """
    if os.environ.get("BMIGRATE_LAB_DEPLOYED") == "1" or is_installed(lab):
        return
    run = play(lab, "install.yml", **extra)
    assert run.returncode == 0, run.output[-6000:]
    note_installed(lab)


def bare_guests(lab: Lab) -> None:
    """Make the guests anew when bmigrate was ever installed on them."""
    if any(lab.ssh(host, "command -v bmigrate", check=False).returncode == 0 for host in lab.vms):
        lab.down()
        lab.up()


def is_installed(lab: Lab) -> bool:
    """Whether this run of the tests has installed on both guests."""
    return all(lab.ssh(host, f"cat {INSTALLED}", check=False).stdout.strip() == SESSION for host in lab.vms)


def note_installed(lab: Lab) -> None:
    """This run of the tests has installed on both guests."""
    for host in lab.vms:
        lab.ssh(host, f"echo {SESSION} > {INSTALLED}")


def fingerprint(lab: Lab, host: str) -> dict[str, str]:
    """One digest per part of a host: files, durable state, units, loaded modules, mounts, data disks.

    The disks are hashed on the lab host, with what their server has not yet put into the file.
    """
    lines = lab.ssh(host, FINGERPRINT, timeout=600).stdout.splitlines()
    found = dict(line.rsplit(" ", 1) for line in lines)
    lab.control(host, {"op": "flush"})
    for disk in DISKS:
        with lab.disk_file(host, disk.number).open("rb") as stream:
            found[f"disk {disk.number}"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


@contextmanager
def still(lab: Lab) -> Iterator[dict[str, dict[str, str]]]:
    """Hosts on which nothing writes: the databases frozen, what they wrote shipped. Yields their fingerprints."""
    units = "systemctl list-units --no-legend --plain --state=running 'postgresql@*' | awk '{print $1}'"
    for host in lab.vms:
        lab.ssh(host, f"for unit in $({units}); do systemctl freeze $unit || exit; done; sync")
    try:
        found = {host: fingerprint(lab, host) for host in lab.vms}

        def settled() -> bool:
            nonlocal found
            before, found = found, {host: fingerprint(lab, host) for host in lab.vms}
            return before == found

        wait(settled, 300, "the hosts to be still", 0.0)
        yield found
    finally:
        for host in lab.vms:
            lab.ssh(host, f"for unit in $({units}); do systemctl thaw $unit || exit; done")
