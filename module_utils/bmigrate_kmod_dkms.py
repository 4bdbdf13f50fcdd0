# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Kernel modules built on the host by DKMS, for the running kernel and for every other one whose headers are there.

It promises that nothing is built that the running kernel would refuse, as far as that can be known before. Signing is
DKMS's own: it is told the key, and so signs also what it builds later, when a kernel is installed.
"""

from __future__ import annotations

import os
import re
import stat

from ansible.module_utils.bmigrate_kmod import der, kernels, trust
from ansible.module_utils.bmigrate_kmod_host import Kmod, source_digest

FRAMEWORK = ("/etc/dkms/framework.conf", "/etc/dkms/framework.conf.d")
OURS = "/etc/dkms/framework.conf.d/bmigrate.conf"
#: Where DKMS looks for the certificate of its own key.
OWN_CERTIFICATES = ("/var/lib/shim-signed/mok/MOK.der", "/var/lib/dkms/mok.pub")
SIGNS_SINCE = 3
HOOK = "/etc/kernel/postinst.d/dkms"
SETTING = re.compile(r"^\s*(mok_signing_key|mok_certificate)=[\"']?([^\"'\n]*)", re.MULTILINE)


def settings(paths: list[str]) -> dict[str, str]:
    """What the configuration of DKMS says of signing; a later file counts."""
    found = {}
    for path in paths:
        try:
            with open(path) as stream:
                found.update({name: value.strip() for name, value in SETTING.findall(stream.read())})
        except OSError:
            continue
    return found


class Dkms(Kmod):
    """The modules as a package of DKMS."""

    folder = "updates/dkms"
    other_folder = "updates/bmigrate"

    @property
    def package(self) -> str:
        """Name and version, as DKMS writes them."""
        return "%s/%s" % (self.params["name"], self.params["version"])

    # -- before anything changes --------------------------------------------------------------

    def check(self) -> None:
        """Refuse what the running kernel would not load, and a key that cannot be used."""
        self.check_key()
        path = self.certificate_path()
        if path is None:
            return
        text = trust.refusal_of_key(trust.read(), self.certificate(path) if path else None)
        if text:
            self.fail(text, reason="signature_required")

    def check_key(self) -> None:
        """Refuse a signing key that is not there, that others may read, or that this DKMS cannot use."""
        key = self.params["signing_key"]
        if not key:
            return
        if not key.startswith("pkcs11:"):
            try:
                mode = stat.S_IMODE(os.stat(key).st_mode)
            except OSError as error:
                self.fail("the signing key %s cannot be read: %s" % (key, error.strerror), reason="signing_key")
            if mode & 0o077:
                self.fail("others may read the signing key %s -- chmod 600 it" % key, reason="signing_key")
        self.certificate(self.params["signing_cert"])
        said = self.module.run_command(["dkms", "--version"])[1] if self.module.get_bin_path("dkms") else ""
        version = re.search(r"(\d+)\.", said)
        if version and int(version.group(1)) < SIGNS_SINCE:
            self.fail(
                "%s does not sign modules -- use DKMS %d or later, or bmigrate_kmod_method prebuilt"
                % (said.strip(), SIGNS_SINCE),
                reason="signing_key",
            )
        others = settings([path for path in self.framework() if path != OURS])
        if others.get("mok_signing_key", key) != key:
            self.fail(
                "DKMS signs with %s on this host already -- leave bmigrate_kmod_signing_key empty, enrol that one"
                % others["mok_signing_key"],
                reason="signing_key",
            )

    def certificate(self, path: str) -> der.Certificate:
        """A certificate on this host; ends the module when it cannot be read."""
        try:
            with open(path, "rb") as stream:
                return der.certificate(stream.read())
        except (OSError, ValueError) as error:
            self.fail("the certificate %s cannot be read: %s" % (path, error), reason="signing_key")

    def framework(self) -> list[str]:
        """The files that configure DKMS."""
        folder = FRAMEWORK[1]
        more = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        return [FRAMEWORK[0], *[os.path.join(folder, name) for name in more if name.endswith(".conf")]]

    def certificate_path(self) -> str | None:
        """Certificate of the key with which DKMS would sign; "" when it would not, None when that is not known."""
        if self.params["signing_cert"]:
            return self.params["signing_cert"]
        found = settings(self.framework()).get("mok_certificate", "")
        if "$" in found:
            return None
        return next((path for path in (found, *OWN_CERTIFICATES) if path and os.path.exists(path)), "")

    def need_tools(self) -> None:
        """Refuse, before anything changes, when the build cannot work."""
        if not os.path.isdir(self.params["source"]) and not self.module.check_mode:
            self.fail("there is no module source at %s" % self.params["source"], reason="source_missing")
        if not self.headers(self.kernel):
            self.fail(
                "the headers of the running kernel are missing -- install linux-headers-%s; when that package "
                "is no longer to be had, boot into a kernel whose headers are, or use prebuilt modules" % self.kernel,
                reason="headers_missing",
            )
        for tool, package in (("dkms", "dkms"), ("gcc", "gcc"), ("make", "make")):
            if self.module.get_bin_path(tool) is None:
                self.fail("%s is missing -- install the package %s" % (tool, package), reason="tool_missing")

    def headers(self, release: str) -> bool:
        """Whether modules can be built for a kernel."""
        return os.path.exists(os.path.join("/lib/modules", release, "build", "Makefile"))

    # -- what is there ------------------------------------------------------------------------

    def dkms_state(self, release: str | None = None) -> str:
        """Word of DKMS for this package and a kernel (default: the running one): "", added, built or installed."""
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
            if (release or self.kernel) in [part.strip() for part in what.split(",")]:
                return word
            state = "added"
        return state

    def digest(self) -> str:
        """Of what would be installed."""
        return source_digest(self.params["source"])

    def targets(self) -> list[str]:
        """The kernels to build for: the running one first, then every other one whose headers are there."""
        others = [name for name in kernels.installed("/", self.kernel) if name != self.kernel and self.headers(name)]
        return [self.kernel, *reversed(others)]

    def current(self, release: str, digest: str) -> bool:
        """Whether the installed files of a kernel are those of this very source, signed as wanted."""
        ids = self.build_ids(release)
        noted = self.noted(release)
        paths = [self.file_of(name, release) or "" for name in ids]
        if not all(ids.values()) or not all("/%s/" % self.folder in path for path in paths):
            return False
        if self.params["signing_key"]:
            by = self.certificate(self.params["signing_cert"])
            signatures = [self.installed(path).signature for path in paths]
            if not all(signature and by.made(signature) for signature in signatures):
                return False
        return (noted.get("method"), noted.get("source"), noted.get("build_ids")) == ("dkms", digest, ids)

    def wanted_settings(self) -> str:
        """What DKMS must be told of signing; empty: nothing."""
        if not self.params["signing_key"]:
            return ""
        return "# Written by bmigrate: the key with which DKMS signs what it builds on this host.\n%s" % "".join(
            "%s='%s'\n" % (name, self.params[key])
            for name, key in (("mok_signing_key", "signing_key"), ("mok_certificate", "signing_cert"))
        )

    def settings_differ(self) -> bool:
        """Whether DKMS has to be told anew with which key to sign."""
        try:
            with open(OURS) as stream:
                return stream.read() != self.wanted_settings()
        except OSError:
            return bool(self.wanted_settings())

    # -- changes ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Tell DKMS the key, or take back what it was told."""
        if not self.settings_differ():
            return
        if not self.wanted_settings():
            os.unlink(OURS)
            return
        os.makedirs(os.path.dirname(OURS), exist_ok=True)
        with open(OURS + ".new", "w") as stream:
            stream.write(self.wanted_settings())
        os.replace(OURS + ".new", OURS)

    def install(self, release: str, digest: str) -> None:
        """Add, build and install by DKMS; an older build of other source goes first. Raises CommandFailed."""
        state = self.dkms_state(release)
        if state not in ("", "added"):
            self.run("dkms", "remove", self.package, "-k", release)
        if not self.dkms_state(release):
            self.run("dkms", "add", self.params["source"])
        self.run("dkms", "build", self.package, "-k", release)
        # Before DKMS installs: it would keep a module of the same name as the original and put it back later.
        self.remove_other(release)
        self.run("dkms", "install", self.package, "-k", release, "--force")
        self.note(release, digest)

    def remove_other(self, release: str) -> None:
        """Take prebuilt modules of a kernel away."""
        self.remove_files(self.other_folder, [release])

    def finish(self) -> None:
        """Take prebuilt modules of all other kernels away, too: two copies would leave the choice to depmod."""
        for release in self.remove_files(self.other_folder):
            self.run("depmod", release)

    def leftovers(self) -> bool:
        """Whether another method has left modules on this host."""
        return bool(self.files_in(self.other_folder))

    def remove(self, check: bool = False) -> bool:
        """Take the package out of DKMS; whether there was anything."""
        present = self.module.get_bin_path("dkms") is not None and bool(self.dkms_state())
        left = self.files_in(self.folder)
        if not check:
            if present:
                self.run("dkms", "remove", self.package, "--all")
            for release in self.remove_files(self.folder):
                self.run("depmod", release)
            if os.path.exists(OURS):
                os.unlink(OURS)
        return present or bool(left)

    def autoinstall(self) -> bool:
        """Whether DKMS builds by itself when a kernel is installed."""
        try:
            with open(os.path.join(self.params["source"], "dkms.conf")) as stream:
                wanted = re.search(r"^AUTOINSTALL=[\"']?y", stream.read(), re.MULTILINE | re.IGNORECASE)
        except OSError:
            return False
        return wanted is not None and os.access(HOOK, os.X_OK)
