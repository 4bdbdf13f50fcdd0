# SPDX-License-Identifier: GPL-3.0-or-later
"""Which kernels are installed on this host, and which of them would load our modules after a reboot.

Promise: reads only, and never fails because something is missing or damaged: that is in the answer. A kernel counts
as ready only when modprobe would find both modules there, made for exactly that kernel.
"""

from __future__ import annotations

import os
import re
from typing import Any

from . import modfile, trust
from .modfile import ModuleFile

Fields = dict[str, Any]

MODULES = ("bufflink", "reqlog")
SUFFIXES = ("", ".xz", ".gz", ".zst")
#: Where our modules can be when modules.dep does not tell, in the order in which depmod prefers them.
FOLDERS = ("updates/bmigrate", "updates/dkms", "updates", "extra")
DEFAULT_ENTRY = re.compile(r"^\s*GRUB_DEFAULT=[\"']?([^\"'#\s]*)", re.MULTILINE)


def version_key(release: str) -> list[Any]:
    """Sorts releases as boot loaders do (Debian Policy 5.6.12): numbers as numbers, `~` before everything."""
    key: list[Any] = []
    for text, number in re.findall(r"(\D*)(\d*)", release):
        key.append([-1 if char == "~" else ord(char) if char.isalpha() else ord(char) + 256 for char in text] + [0])
        key.append(int(number or 0))
    return key


def installed(root: str = "/", running: str | None = None) -> list[str]:
    """Releases of the kernels that have modules and an image, oldest first; the running one in any case."""
    base = os.path.join(root, "lib/modules")
    try:
        names = os.listdir(base)
    except OSError:
        names = []
    found = {name for name in names if _image(root, name)}
    if running:
        found.add(running)
    return sorted(found, key=version_key)


def _image(root: str, release: str) -> bool:
    places = (f"boot/vmlinuz-{release}", f"boot/vmlinux-{release}", f"lib/modules/{release}/vmlinuz")
    return any(os.path.exists(os.path.join(root, place)) for place in places)


def boots_next(root: str, releases: list[str]) -> str | None:
    """The release that the boot loader takes by itself: the newest; None when it was told another one."""
    try:
        with open(os.path.join(root, "etc/default/grub")) as stream:
            entry = DEFAULT_ENTRY.search(stream.read())
    except OSError:
        entry = None
    if entry and entry.group(1) not in ("", "0"):
        return None
    return releases[-1] if releases else None


def module_path(root: str, release: str, name: str) -> str | None:
    """The file that modprobe would load in that kernel, or None."""
    base = os.path.join(root, "lib/modules", release)
    try:
        with open(os.path.join(base, "modules.dep")) as lines:
            for line in lines:
                path = line.partition(":")[0]
                if os.path.basename(path).partition(".ko")[0].replace("-", "_") == name:
                    full = os.path.join(base, path)
                    return full if os.path.exists(full) else None
            return None
    except OSError:
        paths = [os.path.join(base, folder, name + ".ko" + suffix) for folder in FOLDERS for suffix in SUFFIXES]
        return next((path for path in paths if os.path.exists(path)), None)


def reference(root: str, release: str) -> ModuleFile | None:
    """One of the kernel's own modules: what ours must have been made like. None when none can be read."""
    base = os.path.join(root, "lib/modules", release, "kernel")
    for folder, names, files in os.walk(base):
        names.sort()
        for name in sorted(files):
            if name.partition(".ko")[2] in SUFFIXES and ".ko" in name:
                try:
                    found = modfile.load(os.path.join(folder, name))
                except (OSError, ValueError):
                    return None
                if found.vermagic:
                    return found
    return None


def mismatch(found: ModuleFile, release: str, own: ModuleFile | None) -> str | None:
    """Why a module does not fit a kernel, or None.

    Args:
        own: one of the kernel's own modules; without it only the release is compared.
    """
    vermagic = (found.vermagic or "").strip()
    if not vermagic:
        return "it has no vermagic, so it is no finished kernel module"
    wanted = (own.vermagic or "").strip() if own else ""
    if vermagic != wanted if wanted else vermagic.split()[0] != release:
        return f"it is made for '{vermagic}', and this kernel is '{wanted or release}'"
    if own:
        for symbol in sorted(set(found.versions) & set(own.versions)):
            theirs, ours = found.versions[symbol], own.versions[symbol]
            if theirs != ours:
                return (
                    f"it is made for another build of {release}: symbol {symbol} has version {theirs:08x} there "
                    f"and {ours:08x} in this kernel"
                )
    return None


def _module(root: str, release: str, name: str, own: ModuleFile | None, state: trust.Trust) -> Fields:
    path = module_path(root, release, name)
    entry: Fields = {"file": path, **dict.fromkeys(("build_id", "version", "abi", "signer", "trusted", "problem"))}
    if path is None:
        entry["problem"] = f"has no {name} module"
        return entry
    try:
        found = modfile.load(path)
    except (OSError, ValueError) as error:
        entry["problem"] = f"has a {name} module that cannot be read: {error}"
        return entry
    who = found.signature
    entry.update(build_id=found.build_id, version=found.info.get("version"), abi=found.info.get("abi"))
    entry["signer"] = None if who is None else who.signer or who.key_id
    wrong = mismatch(found, release, own)
    entry["trusted"] = not state.enforced or (who is not None and state.knows_signer(who) is not False)
    if wrong:
        entry["problem"] = f"has a {name} module that does not fit: {wrong}"
    elif not entry["trusted"] and who is None:
        entry["problem"] = f"has a {name} module that is not signed, and signatures are required here"
    elif not entry["trusted"]:
        entry["problem"] = (
            f"has a {name} module signed by {entry['signer']}, whose key this host's kernel does not know"
        )
    return entry


def report(root: str = "/", running: str | None = None, modules: tuple[str, ...] = MODULES) -> Fields:
    """All that this host knows: {running, boots_next, trust, kernels: [...], warnings: [...]}.

    Each kernel is {release, running, boots_next, headers, modules, ready, problem}, each warning {reason, message,
    hint}. Signatures are judged by what the running kernel insists on: the same firmware will boot the next one.
    """
    release = running or os.uname().release
    state = trust.read(root)
    releases = installed(root, release)
    following = boots_next(root, releases)
    kernels = []
    for name in releases:
        own = reference(root, name)
        found = {module: _module(root, name, module, own, state) for module in modules}
        problem = next((entry["problem"] for entry in found.values() if entry["problem"]), None)
        kernels.append(
            {
                "release": name,
                "running": name == release,
                "boots_next": name == following,
                "headers": os.path.exists(os.path.join(root, "lib/modules", name, "build/Makefile")),
                "modules": found,
                "ready": problem is None,
                "problem": problem,
            }
        )
    _compare_versions(kernels)
    return {
        "running": release,
        "boots_next": following,
        "trust": state.to_dict(),
        "secure_boot": state.sentence(),
        "kernels": kernels,
        "warnings": [warning(entry) for entry in kernels if not entry["ready"]],
    }


def requirements(root: str, releases: list[str]) -> Fields:
    """Per release what its modules must be like: {vermagic, versions}, as far as one of its own modules tells."""
    found = {}
    for release in releases:
        own = reference(root, release)
        found[release] = {"vermagic": own.vermagic if own else None, "versions": own.versions if own else {}}
    return found


def _compare_versions(kernels: list[Fields]) -> None:
    """A module of another version than the running kernel's may speak another ABI: that kernel is not ready.

    The srcversion would say more, but differs between kernels for the same source.
    """
    here: Fields = next((entry["modules"] for entry in kernels if entry["running"]), {})
    for entry in kernels:
        for name, found in entry["modules"].items():
            wanted = here.get(name, {})
            for what in ("version", "abi"):
                if entry["ready"] and wanted.get(what) and found[what] != wanted[what]:
                    entry["ready"] = False
                    text = f"has a {name} module of {what} {found[what]}, the running kernel's is of {wanted[what]}"
                    entry["problem"] = found["problem"] = text


def warning(kernel: Fields) -> Fields:
    """What a kernel that is not ready means, and what to do."""
    release = kernel["release"]
    if kernel["running"]:
        when, what = "is running and", "after a reboot into it"
    elif kernel["boots_next"]:
        when, what = "is installed, would be booted next, and", "after a reboot"
    else:
        when, what = "is installed and", "if it is booted"
    hint = "run install.yml"
    if any(entry["trusted"] is False for entry in kernel["modules"].values()):
        hint = trust.ENROL + "; then run install.yml"
    elif not kernel["headers"]:
        hint += f", for bmigrate_kmod_method dkms after apt install linux-headers-{release}"
    return {
        "reason": "kernel_not_ready",
        "message": f"kernel {release} {when} {kernel['problem']}: {what} its volumes are not tracked, become suspect "
        "and are compared in full",
        "hint": hint,
    }
