#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Builds bufflink.ko and reqlog.ko for the running kernel, loads them, and proves which build runs.

It promises that "loaded" means: the GNU build-id in memory is that of the installed file, and the
module answers with the expected ABI number. It must never unload a module that is in use.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_kmod
short_description: Build, load and verify the kernel modules of bmigrate
version_added: "0.1.0"
description:
  - Adds the module source to DKMS, builds and installs it for the B(running) kernel, loads it and verifies it.
  - A module counts as loaded only when the GNU build-id under C(/sys/module) equals that of the installed file.
  - The source is built again when its content differs from the one that was built last, whatever its version says.
  - Needs the headers of the running kernel; says which package to install when they are missing.
options:
  state:
    description:
      - V(loaded) builds what is missing, loads it and verifies it.
      - V(built) builds and installs without loading.
      - V(absent) unloads the modules when nobody uses them and removes them from DKMS.
    type: str
    choices: [loaded, built, absent]
    default: loaded
  method:
    description:
      - How the modules come to the host.
      - V(prebuilt) is not supported by this version and is refused.
    type: str
    choices: [dkms, prebuilt]
    default: dkms
  source:
    description: Directory with the module source and its C(dkms.conf) on the host.
    type: path
    required: true
  name:
    description: Name of the package in DKMS.
    type: str
    default: bmigrate
  version:
    description: Version of the package in DKMS, as in C(dkms.conf).
    type: str
    required: true
  modules:
    description: Kernel modules in the order in which they are loaded.
    type: list
    elements: str
    default: [bufflink, reqlog]
  control:
    description: Character device that answers with the ABI number of the last module.
    type: path
    default: /dev/reqlog
  abi:
    description: ABI number that the programs speak; any other one is refused.
    type: int
    default: 1
  stamp:
    description: File that notes the digest of the source and the build-ids of the last build.
    type: path
    default: /var/lib/bmigrate/kmod.json
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Says what would be built or loaded and changes nothing.
    support: full
  diff_mode:
    description: Shows build and load state of each module before and after.
    support: full
"""

EXAMPLES = r"""
- name: Build and load the kernel modules for the running kernel
  bmigrate_kmod:
    source: /usr/src/bmigrate-0.1.0
    version: 0.1.0

- name: Remove them
  bmigrate_kmod:
    source: /usr/src/bmigrate-0.1.0
    version: 0.1.0
    state: absent
"""

RETURN = r"""
kernel:
  description: Release of the running kernel, for which the modules were built.
  returned: always
  type: str
  sample: 6.1.0-28-cloud-amd64
modules:
  description: For each module the installed file, its build-id, and the build-id of the loaded one.
  returned: always
  type: dict
  sample: {reqlog: {file: /lib/modules/6.1.0/updates/dkms/reqlog.ko, file_build_id: ab12, loaded_build_id: ab12}}
abi:
  description: ABI number that the loaded module answered with.
  returned: when state is loaded and not in check mode
  type: int
commands:
  description: Commands that were run and changed something.
  returned: always
  type: list
  elements: str
"""

import fcntl
import hashlib
import json
import os
import struct
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_elf import elf_build_id, notes_build_id, read_module

ABI_IOCTL = 0x8004BE00  # _IOR(0xBE, 0, __u32), module_src/uapi/reqlog.h


def source_digest(directory: str) -> str:
    """SHA-256 over names and content of all files below a directory."""
    digest = hashlib.sha256()
    for root, names, files in os.walk(directory):
        names.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            digest.update(os.path.relpath(path, directory).encode() + b"\0")
            with open(path, "rb") as content:
                digest.update(hashlib.sha256(content.read()).digest())
    return digest.hexdigest()


def loaded_build_id(name: str, sysfs: str = "/sys/module") -> str | None:
    """Build-id of the loaded module, "" when it has none, None when it is not loaded."""
    directory = os.path.join(sysfs, name)
    if not os.path.isdir(directory):
        return None
    try:
        with open(os.path.join(directory, "notes", ".note.gnu.build-id"), "rb") as notes:
            return notes_build_id(notes.read()) or ""
    except OSError:
        return ""


def users(name: str, sysfs: str = "/sys/module") -> int:
    """How many users the loaded module has (open files, attachments, other modules)."""
    with open(os.path.join(sysfs, name, "refcnt")) as count:
        return int(count.read())


class Kmod:
    """One package of kernel modules on this host, for the running kernel."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.kernel = os.uname().release
        self.commands: list[str] = []
        self.package = "%s/%s" % (self.params["name"], self.params["version"])

    def run(self, *cmd: str) -> None:
        """Run a command that changes something; any failure ends the module, with the end of its output."""
        rc, out, err = self.module.run_command(list(cmd))
        if rc != 0:
            self.fail(
                "%s failed with exit code %d" % (" ".join(cmd), rc),
                rc=rc,
                stdout="\n".join(out.splitlines()[-40:]),
                stderr="\n".join(err.splitlines()[-40:]),
            )
        self.commands.append(" ".join(cmd))

    def fail(self, message: str, **facts: Any) -> NoReturn:
        """End the module; the host is named."""
        self.module.fail_json(
            msg="%s (host %s, kernel %s)" % (message, os.uname().nodename, self.kernel),
            commands=self.commands,
            kernel=self.kernel,
            **facts,
        )
        raise SystemExit(1)  # fail_json does not return; said for type checkers

    def file_of(self, name: str) -> str | None:
        """Installed file of a module, or None."""
        base = os.path.join("/lib/modules", self.kernel)
        for folder in ("updates/dkms", "updates", "extra"):
            for suffix in ("", ".xz", ".gz"):
                path = os.path.join(base, folder, name + ".ko" + suffix)
                if os.path.exists(path):
                    return path
        return None

    def modules(self) -> dict[str, dict[str, Any]]:
        """File and both build-ids of every module."""
        found = {}
        for name in self.params["modules"]:
            path = self.file_of(name)
            found[name] = {
                "file": path,
                "file_build_id": elf_build_id(read_module(path)) if path else None,
                "loaded_build_id": loaded_build_id(name),
            }
        return found

    def dkms_state(self) -> str:
        """Word of DKMS for this package and the running kernel: "", added, built or installed."""
        rc, out, err = self.module.run_command(
            ["dkms", "status", "-m", self.params["name"], "-v", self.params["version"]]
        )
        if rc != 0:
            self.fail("dkms status failed", stderr=err)
        state = ""
        for line in out.splitlines():
            what, colon, word = line.partition(":")
            if not colon or not what.replace(",", "/").replace(" ", "").startswith(self.package.replace(" ", "")):
                continue
            word = word.split()[0] if word.split() else ""
            if self.kernel in what:
                return word
            state = "added"
        return state

    def current(self, digest: str, found: dict[str, dict[str, Any]]) -> bool:
        """Whether the installed files are those of this very source."""
        try:
            with open(self.params["stamp"]) as stamp:
                noted = json.load(stamp)
        except (OSError, ValueError):
            return False
        ids = {name: entry["file_build_id"] for name, entry in found.items()}
        return (
            all(ids.values())
            and noted.get("kernel") == self.kernel
            and noted.get("source") == digest
            and noted.get("build_ids") == ids
        )

    def note(self, digest: str, found: dict[str, dict[str, Any]]) -> None:
        """Remember what was built, atomically: the next run compares with it."""
        os.makedirs(os.path.dirname(self.params["stamp"]), mode=0o700, exist_ok=True)
        temporary = self.params["stamp"] + ".new"
        with open(temporary, "w") as stamp:
            json.dump(
                {
                    "kernel": self.kernel,
                    "source": digest,
                    "build_ids": {name: entry["file_build_id"] for name, entry in found.items()},
                },
                stamp,
            )
            stamp.flush()
            os.fsync(stamp.fileno())
        os.replace(temporary, self.params["stamp"])

    def need_tools(self) -> None:
        """Refuse, before anything changes, when the build cannot work."""
        if not os.path.isdir(self.params["source"]) and not self.module.check_mode:
            self.fail("there is no module source at %s" % self.params["source"], reason="source_missing")
        if not os.path.exists(os.path.join("/lib/modules", self.kernel, "build", "Makefile")):
            self.fail(
                "the headers of the running kernel are missing -- install linux-headers-%s; when that package "
                "is no longer to be had, boot into a kernel whose headers are" % self.kernel,
                reason="headers_missing",
            )
        for tool, package in (("dkms", "dkms"), ("gcc", "gcc"), ("make", "make")):
            if self.module.get_bin_path(tool) is None:
                self.fail("%s is missing -- install the package %s" % (tool, package), reason="tool_missing")

    def build(self, digest: str) -> None:
        """Add, build and install by DKMS; an older build of other source goes first."""
        if self.dkms_state():
            self.run("dkms", "remove", self.package, "-k", self.kernel) if self.dkms_state() != "added" else None
        if not self.dkms_state():
            self.run("dkms", "add", self.params["source"])
        self.run("dkms", "build", self.package, "-k", self.kernel)
        self.run("dkms", "install", self.package, "-k", self.kernel, "--force")
        self.note(digest, self.modules())

    def unload(self, names: list[str]) -> None:
        """Take loaded modules out, last first; one that is in use is refused by name."""
        for name in reversed(names):
            if loaded_build_id(name) is None:
                continue
            if users(name):
                self.fail(
                    "kernel module %s is in use and is not the build that is installed -- move or stop what "
                    "it tracks, or reboot this host, then run this again" % name,
                    reason="module_in_use",
                )
            self.run("rmmod", name)

    def load(self) -> None:
        """Load what is missing; replace what is another build and unused."""
        found = self.modules()
        if any(entry["loaded_build_id"] not in (None, entry["file_build_id"]) for entry in found.values()):
            self.unload(self.params["modules"])
        for name in self.params["modules"]:
            if loaded_build_id(name) is None:
                self.run("modprobe", name)

    def abi(self) -> int:
        """ABI number from the control device."""
        try:
            control = os.open(self.params["control"], os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            self.fail("%s cannot be opened: %s" % (self.params["control"], error), reason="no_control_device")
        try:
            return struct.unpack("I", fcntl.ioctl(control, ABI_IOCTL, b"\0\0\0\0"))[0]
        except OSError as error:
            self.fail("%s does not tell its ABI: %s" % (self.params["control"], error), reason="wrong_abi")
        finally:
            os.close(control)

    def verify(self) -> int:
        """The loaded build is the installed one and speaks our ABI; returns the ABI number."""
        for name, entry in self.modules().items():
            if not entry["file_build_id"] or entry["loaded_build_id"] != entry["file_build_id"]:
                self.fail(
                    "the loaded %s is not the installed build: build-id %s in memory, %s in %s"
                    % (name, entry["loaded_build_id"], entry["file_build_id"], entry["file"]),
                    reason="other_build",
                )
        number = self.abi()
        if number != self.params["abi"]:
            self.fail(
                "%s speaks ABI %d, the programs speak %d -- install modules and programs of one version"
                % (self.params["modules"][-1], number, self.params["abi"]),
                reason="wrong_abi",
            )
        return number


def ensure_absent(kmod: Kmod) -> tuple[bool, dict[str, Any]]:
    """Unload and remove; returns (changed, facts)."""
    loaded = [name for name in kmod.params["modules"] if loaded_build_id(name) is not None]
    present = kmod.module.get_bin_path("dkms") is not None and bool(kmod.dkms_state())
    if not kmod.module.check_mode:
        kmod.unload(kmod.params["modules"])
        if present:
            kmod.run("dkms", "remove", kmod.package, "--all")
        if os.path.exists(kmod.params["stamp"]):
            os.unlink(kmod.params["stamp"])
    return bool(loaded) or present, {}


def ensure_present(kmod: Kmod) -> tuple[bool, dict[str, Any]]:
    """Build, load, verify as asked; returns (changed, facts)."""
    check = kmod.module.check_mode
    digest = source_digest(kmod.params["source"])
    found = kmod.modules()
    rebuild = not kmod.current(digest, found)
    if rebuild:
        kmod.need_tools()
        if not check:
            kmod.build(digest)
            # DKMS does not flush what it writes: after a power cut soon afterwards the host would boot with
            # empty module files, and a workload that is not tracked.
            os.sync()
            found = kmod.modules()
    if kmod.params["state"] == "built":
        return rebuild, {}
    reload = rebuild or any(entry["loaded_build_id"] != entry["file_build_id"] for entry in found.values())
    before = {name: entry["loaded_build_id"] for name, entry in found.items()}
    if check:
        return reload, {}
    kmod.load()
    facts = {"abi": kmod.verify()}
    after = {name: entry["loaded_build_id"] for name, entry in kmod.modules().items()}
    return rebuild or before != after, facts


def summary(modules: dict[str, dict[str, Any]]) -> str:
    """The states of all modules as text, for the diff."""
    return "".join(
        "%s: installed %s, loaded %s\n" % (name, entry["file_build_id"], entry["loaded_build_id"])
        for name, entry in sorted(modules.items())
    )


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["loaded", "built", "absent"], "default": "loaded"},
            "method": {"type": "str", "choices": ["dkms", "prebuilt"], "default": "dkms"},
            "source": {"type": "path", "required": True},
            "name": {"type": "str", "default": "bmigrate"},
            "version": {"type": "str", "required": True},
            "modules": {"type": "list", "elements": "str", "default": ["bufflink", "reqlog"]},
            "control": {"type": "path", "default": "/dev/reqlog"},
            "abi": {"type": "int", "default": 1},
            "stamp": {"type": "path", "default": "/var/lib/bmigrate/kmod.json"},
        },
        supports_check_mode=True,
    )
    kmod = Kmod(module)
    if module.params["method"] == "prebuilt":
        kmod.fail("method prebuilt is not supported by this version -- use dkms", reason="not_supported")
    before = kmod.modules()
    changed, facts = (ensure_absent if module.params["state"] == "absent" else ensure_present)(kmod)
    after = kmod.modules()
    module.exit_json(
        changed=changed,
        kernel=kmod.kernel,
        modules=after,
        commands=kmod.commands,
        diff={"before": summary(before), "after": summary(after)},
        **facts,
    )


if __name__ == "__main__":
    main()
