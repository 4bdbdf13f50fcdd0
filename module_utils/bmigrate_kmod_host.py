# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""The kernel modules of this host as they are: installed files, loaded builds, and how one becomes the other.

It promises that "loaded" means: the GNU build-id in memory is that of the installed file, and the module answers with
the expected ABI number. It must never unload a module that is in use. How the files come to be is not its business.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import struct
from typing import Any, NoReturn

from ansible.module_utils.bmigrate_kmod import kernels, modfile, trust

ABI_IOCTL = 0x8004BE00  # _IOR(0xBE, 0, __u32), module_src/uapi/reqlog.h
LIBRARY = "/lib/modules"
#: Words that modprobe and the kernel log use, and what they mean for an operator.
LOAD_ERRORS = (
    ("Required key not available", "the kernel does not know the key that signed it (or nobody signed it)"),
    ("Key was rejected", "the kernel takes signed modules only, and not this signature"),
    ("Operation not permitted", "the kernel takes no unsigned modules (Secure Boot, lockdown)"),
    ("disagrees about version of symbol", "it was built for another build of this kernel"),
    ("Unknown symbol", "it uses something that this kernel does not offer"),
    ("version magic", "it was built for another kernel"),
    ("Exec format error", "it was built for another kernel"),
)


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
            return modfile.notes_build_id(notes.read()) or ""
    except OSError:
        return ""


def users(name: str, sysfs: str = "/sys/module") -> int:
    """How many users the loaded module has (open files, attachments, other modules)."""
    with open(os.path.join(sysfs, name, "refcnt")) as count:
        return int(count.read())


def why_not_loaded(text: str) -> str:
    """What the words of modprobe and of the kernel log mean; empty when they say nothing known."""
    return next((meaning for words, meaning in LOAD_ERRORS if words in text), "")


class CommandFailed(Exception):
    """A command ended with an error; `facts` has the end of its output."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts


class Kmod:
    """The kernel modules on this host; a way to install them is a subclass.

    Args:
        module: the Ansible module, with the options of bmigrate_kmod.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.params = module.params
        self.kernel = os.uname().release
        self.commands: list[str] = []

    @classmethod
    def of(cls, other: Kmod) -> Any:
        """This way to install, on the host of another one."""
        made = cls(other.module)
        made.commands = other.commands
        return made

    # -- outcomes -----------------------------------------------------------------------------

    def run(self, *cmd: str) -> None:
        """Run a command that changes something. Raises CommandFailed, which ends the module if nobody minds."""
        rc, out, err = self.module.run_command(list(cmd))
        if rc != 0:
            raise CommandFailed(
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

    # -- files --------------------------------------------------------------------------------

    def file_of(self, name: str, release: str | None = None) -> str | None:
        """The file that modprobe would load in a kernel (default: the running one), or None."""
        return kernels.module_path("/", release or self.kernel, name)

    def parsed(self, path: str) -> modfile.ModuleFile:
        """What a module file says of itself; ends the module when it cannot be read."""
        try:
            return modfile.load(path)
        except (OSError, ValueError) as error:
            self.fail("%s cannot be read: %s" % (path, error), reason="damaged_module")

    def installed(self, path: str | None) -> modfile.ModuleFile:
        """The same of an installed file; one that is missing or damaged says nothing, so that it is replaced: a power
        cut leaves empty ones."""
        try:
            return modfile.load(path) if path else modfile.ModuleFile()
        except (OSError, ValueError):
            return modfile.ModuleFile()

    def modules(self) -> dict[str, dict[str, Any]]:
        """File, both build-ids and signer of every module, for the running kernel."""
        found = {}
        for name in self.params["modules"]:
            path = self.file_of(name)
            said = self.installed(path)
            by = said.signature
            found[name] = {
                "file": path,
                "file_build_id": said.build_id,
                "loaded_build_id": loaded_build_id(name),
                "signed": by is not None,
                "signer": None if by is None else by.signer or by.key_id,
            }
        return found

    def build_ids(self, release: str) -> dict[str, str | None]:
        """Build-id of the installed file of every module in a kernel."""
        return {name: self.installed(self.file_of(name, release)).build_id for name in self.params["modules"]}

    def signatures(self) -> dict[str, Any]:
        """Per module who signed the file that the running kernel would load."""
        paths = {name: self.file_of(name) for name in self.params["modules"]}
        return {name: self.installed(path).signature for name, path in paths.items() if path}

    def files_in(self, folder: str, releases: list[str] | None = None) -> dict[str, list[str]]:
        """Our modules in a folder below some kernels' modules (default: all), per kernel that has any."""
        found = {}
        for release in releases or sorted(os.listdir(LIBRARY)):
            place = os.path.join(LIBRARY, release, folder)
            ours = [name + ".ko" + suffix for name in self.params["modules"] for suffix in kernels.SUFFIXES]
            paths = [os.path.join(place, name) for name in ours if os.path.lexists(os.path.join(place, name))]
            if paths:
                found[release] = paths
        return found

    def remove_files(self, folder: str, releases: list[str] | None = None) -> list[str]:
        """Take them away; returns the kernels that had one, whose depmod is then due."""
        found = self.files_in(folder, releases)
        for paths in found.values():
            for path in paths:
                os.unlink(path)
            if not os.listdir(os.path.dirname(paths[0])):
                os.rmdir(os.path.dirname(paths[0]))
        return sorted(found)

    # -- what was installed last --------------------------------------------------------------

    def noted(self, release: str) -> dict[str, Any]:
        """What the last installation for a kernel noted; empty when there was none."""
        try:
            with open(self.params["stamp"]) as stamp:
                return dict(json.load(stamp)["kernels"][release])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def note(self, release: str, digest: str) -> None:
        """Remember what was installed for a kernel, atomically: the next run compares with it."""
        os.makedirs(os.path.dirname(self.params["stamp"]), mode=0o700, exist_ok=True)
        others = {name: self.noted(name) for name in os.listdir(LIBRARY) if self.noted(name)}
        temporary = self.params["stamp"] + ".new"
        with open(temporary, "w") as stamp:
            json.dump({"kernels": dict(others, **{release: self.entry(release, digest)})}, stamp)
            stamp.flush()
            os.fsync(stamp.fileno())
        os.replace(temporary, self.params["stamp"])

    def entry(self, release: str, digest: str) -> dict[str, Any]:
        """What is noted of a kernel."""
        return {"method": self.params["method"], "source": digest, "build_ids": self.build_ids(release)}

    def forget(self) -> None:
        """Remember nothing any more."""
        if os.path.exists(self.params["stamp"]):
            os.unlink(self.params["stamp"])

    # -- the running kernel -------------------------------------------------------------------

    def refuse_untrusted(self) -> None:
        """End the module when the running kernel would not load the installed files."""
        text = trust.refusal(trust.read(), self.signatures())
        if text:
            self.fail(text, reason="signature_required")

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
                self.modprobe(name)

    def modprobe(self, name: str) -> None:
        """Load one module; a refusal of the kernel is told with its reason from the kernel log."""
        rc, _out, err = self.module.run_command(["modprobe", name])
        if rc == 0:
            self.commands.append("modprobe " + name)
            return
        log = self.module.run_command(["dmesg"])[1].splitlines()
        said = [line for line in log[-50:] if name in line or "module" in line.lower()][-5:]
        meaning = why_not_loaded("\n".join([err, *said]))
        self.fail(
            "modprobe %s failed: %s%s" % (name, err.strip(), " -- " + meaning if meaning else ""),
            reason="not_loadable",
            kernel_log=said,
        )

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
