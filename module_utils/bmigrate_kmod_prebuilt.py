# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Kernel modules that were built elsewhere, one folder per kernel release: no compiler, headers or DKMS here.

It promises that no file is installed that was not made for exactly the kernel it is installed for, as the kernel itself
would judge: the whole vermagic, and the versions of the symbols.
"""

from __future__ import annotations

import os
import tempfile

from ansible.module_utils.bmigrate_kmod import kernels, trust
from ansible.module_utils.bmigrate_kmod_dkms import Dkms
from ansible.module_utils.bmigrate_kmod_host import Kmod, source_digest


class Prebuilt(Kmod):
    """The modules as files of the operator."""

    folder = "updates/bmigrate"

    def given(self, release: str, name: str) -> str:
        """The operator's file."""
        return os.path.join(self.params["source"], release, name + ".ko")

    def has(self, release: str) -> bool:
        """Whether modules were given for a kernel."""
        return all(os.path.exists(self.given(release, name)) for name in self.params["modules"])

    def check(self) -> None:
        """Refuse what does not fit the kernel it is for, and what the running kernel would not load."""
        if not os.path.isdir(self.params["source"]) and self.module.check_mode:
            return  # they would be copied first
        if not self.has(self.kernel):
            known = sorted(os.listdir(self.params["source"])) if os.path.isdir(self.params["source"]) else []
            self.fail(
                "there are no prebuilt modules for the running kernel in %s (there are some for: %s) -- build them "
                "with KDIR=HEADERS tools/build-module and add the folder, or boot into a kernel that has some"
                % (self.params["source"], ", ".join(known) or "none"),
                reason="no_prebuilt",
            )
        signatures = {}
        for release in self.targets():
            own = kernels.reference("/", release)
            for name in self.params["modules"]:
                found = self.parsed(self.given(release, name))
                wrong = kernels.mismatch(found, release, own)
                if wrong:
                    self.fail(
                        "%s does not fit: %s -- build it with the headers of that kernel"
                        % (self.given(release, name), wrong),
                        reason="wrong_vermagic",
                    )
                if release == self.kernel:
                    signatures[name] = found.signature
        text = trust.refusal(trust.read(), signatures)
        if text:
            self.fail(text, reason="signature_required")

    def need_tools(self) -> None:
        """Refuse a host without depmod."""
        if self.module.get_bin_path("depmod") is None:
            self.fail("depmod is missing -- install the package kmod", reason="tool_missing")

    def digest(self) -> str:
        """Of what would be installed."""
        return source_digest(self.params["source"])

    def targets(self) -> list[str]:
        """The kernels to install for: the running one first, then every other one for which there are modules."""
        others = [name for name in kernels.installed("/", self.kernel) if name != self.kernel and self.has(name)]
        return [self.kernel, *reversed(others)]

    def current(self, release: str, digest: str) -> bool:
        """Whether the given files are installed and are those that modprobe would load."""
        for name in self.params["modules"]:
            path, given = self.file_of(name, release), self.given(release, name)
            if path != self.place(release, name) or not os.path.exists(given):
                return False
            with open(path, "rb") as mine, open(given, "rb") as wanted:
                if mine.read() != wanted.read():
                    return False
        return True

    def place(self, release: str, name: str) -> str:
        """Where a module belongs."""
        return os.path.join("/lib/modules", release, self.folder, name + ".ko")

    def settings_differ(self) -> bool:
        """There are none."""
        return False

    def prepare(self) -> None:
        """Nothing to do."""

    def install(self, release: str, digest: str) -> None:
        """Copy the files, whole or not at all, and have modprobe know them. Raises CommandFailed."""
        for name in self.params["modules"]:
            place = self.place(release, name)
            os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
            with open(self.given(release, name), "rb") as given:
                content = given.read()
            handle, temporary = tempfile.mkstemp(dir=os.path.dirname(place), prefix=".bmigrate-")
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                os.fchmod(stream.fileno(), 0o644)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, place)
        # One copy only: which of two modprobe takes is depmod's choice.
        self.remove_files(Dkms.folder, [release])
        self.run("depmod", release)
        self.note(release, digest)

    def finish(self) -> None:
        """Take the package out of DKMS, which would build it again for the next kernel."""
        Dkms.of(self).remove()

    def leftovers(self) -> bool:
        """Whether DKMS has the package on this host."""
        return Dkms.of(self).remove(check=True)

    def remove(self, check: bool = False) -> bool:
        """Take the files away; whether there were any."""
        left = self.files_in(self.folder)
        if not check:
            for release in self.remove_files(self.folder):
                self.run("depmod", release)
        return bool(left)

    def autoinstall(self) -> bool:
        """Nobody does anything when a kernel is installed."""
        return False
