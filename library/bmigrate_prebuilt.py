#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Chooses, on the controller, the prebuilt kernel modules that fit one host, and signs them where a key is given.

It promises that nothing travels to a host that the host's kernel would refuse, as far as its facts tell, and that the
private key stays where it is.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_prebuilt
short_description: Choose and sign prebuilt kernel modules for a host
version_added: "0.1.0"
description:
  - Runs on the controller. Looks for C(RELEASE/NAME.ko) of every kernel that is installed on a host and compares whole
    vermagic and symbol versions with what the facts of the host say of that kernel.
  - Refuses when there are none for the running kernel, when one does not fit, and when the running kernel takes signed
    modules only and would not take these.
  - With a key, makes signed copies by C(sign-file) of the kernel's build tools, or C(kmodsign). Only the path of the
    key is handed on. A copy that is signed already with that key is left as it is.
options:
  directory:
    description: Directory with one folder per kernel release.
    type: path
    required: true
  dest:
    description: Directory for the signed copies.
    type: path
    required: true
  target:
    description: Directory on the host that the files go to.
    type: path
    default: /usr/lib/bmigrate/prebuilt
  kernel:
    description: What M(bmigrate_facts) says of the host's kernels.
    type: dict
    required: true
  modules:
    description: Names of the kernel modules.
    type: list
    elements: str
    default: [bufflink, reqlog]
  signing_key:
    description: Private key on the controller, or a C(pkcs11:) name. Left out, the files go as they are.
    type: str
  signing_cert:
    description: X.509 certificate of the key, PEM or DER.
    type: path
  sign_file:
    description: The program that signs; looked for when left out.
    type: path
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Judges the files as they are; makes no signed copies, and takes for granted that they can be made.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Choose the modules for this host
  delegate_to: localhost
  bmigrate_prebuilt:
    directory: build/module
    dest: build/prebuilt
    kernel: "{{ ansible_facts['bmigrate']['kernel'] }}"
"""

RETURN = r"""
files:
  description: What M(bmigrate_payload) is to pack.
  returned: success
  type: list
  elements: dict
releases:
  description: Installed kernels of the host for which there are modules.
  returned: success
  type: list
  elements: str
missing:
  description: Installed kernels of the host for which there are none.
  returned: success
  type: list
  elements: str
"""

import glob
import os
import shutil
import tempfile
from typing import Any, NoReturn

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_kmod import der, kernels, modfile, trust

SIGNERS = ("/usr/lib/linux-kbuild-*/scripts/sign-file", "/lib/modules/*/build/scripts/sign-file")
DIGEST = "sha256"


class Chooser:
    """The modules for one host."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.kernel: dict[str, Any] = module.params["kernel"]

    def fail(self, message: str, reason: str) -> NoReturn:
        """End the module."""
        self.module.fail_json(msg="%s (controller)" % message, reason=reason)
        raise SystemExit(1)  # fail_json does not return; said for type checkers

    def given(self, release: str, name: str) -> str:
        """The operator's file."""
        return os.path.join(self.params["directory"], release, name + ".ko")

    def has(self, release: str) -> bool:
        """Whether there are modules for a kernel."""
        return all(os.path.exists(self.given(release, name)) for name in self.params["modules"])

    def releases(self) -> list[str]:
        """The host's kernels for which there are modules; the running one must be among them."""
        running = self.kernel["release"]
        if not self.has(running):
            folder = self.params["directory"]
            known = sorted(name for name in (os.listdir(folder) if os.path.isdir(folder) else []) if self.has(name))
            self.fail(
                "there are no prebuilt modules for kernel %s, which runs there: %s/%s/ has not both of %s (complete: "
                "%s) -- build them with KDIR=HEADERS tools/build-module, or boot that host into a kernel that has some"
                % (running, folder, running, ", ".join(self.params["modules"]), ", ".join(known) or "none"),
                "no_prebuilt",
            )
        return [name for name in self.kernel["requirements"] if self.has(name)]

    def read(self, path: str) -> tuple[bytes, modfile.ModuleFile]:
        """A file and what it says of itself."""
        try:
            data = modfile.read_module(path)
            return data, modfile.parse(data)
        except (OSError, ValueError) as error:
            self.fail("%s cannot be used: %s" % (path, error), "damaged_module")

    def judge(self, release: str, name: str) -> modfile.ModuleFile:
        """What a file says of itself, if it fits its kernel."""
        found = self.read(self.given(release, name))[1]
        asked = self.kernel["requirements"][release]
        own = modfile.ModuleFile(info={"vermagic": asked["vermagic"] or ""}, versions=asked["versions"])
        wrong = kernels.mismatch(found, release, own)
        if wrong:
            self.fail(
                "%s does not fit: %s -- build it with the headers of that kernel" % (self.given(release, name), wrong),
                "wrong_vermagic",
            )
        return found

    # -- signing ------------------------------------------------------------------------------

    def certificate(self) -> der.Certificate | None:
        """The certificate of the key, None when nothing is to be signed."""
        if not self.params["signing_key"]:
            return None
        try:
            with open(self.params["signing_cert"], "rb") as stream:
                return der.certificate(stream.read())
        except (OSError, ValueError) as error:
            self.fail("the certificate %s cannot be read: %s" % (self.params["signing_cert"], error), "signing_key")

    def signer(self) -> str:
        """The program that signs."""
        named = [self.params["sign_file"]] if self.params["sign_file"] else []
        found = named or [shutil.which("kmodsign") or "", *(path for words in SIGNERS for path in glob.glob(words))]
        for path in found:
            if path and os.access(path, os.X_OK):
                return path
        self.fail(
            "there is no program that signs modules -- install linux-kbuild (sign-file) or sbsigntool (kmodsign) on "
            "the controller, or name one",
            "signing_key",
        )

    def signed(self, release: str, name: str, certificate: der.Certificate) -> str:
        """Path of a copy that is signed with the key; made where it is not there yet."""
        data = modfile.unsigned(self.read(self.given(release, name))[0])
        path = os.path.join(self.params["dest"], release, name + ".ko")
        if os.path.exists(path):
            old, said = self.read(path)
            if said.signature and certificate.made(said.signature) and modfile.unsigned(old) == data:
                return path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".new-")
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        words = [self.signer(), DIGEST, self.params["signing_key"], self.params["signing_cert"], temporary]
        rc, out, err = self.module.run_command(words)
        said = self.read(temporary)[1]
        if rc != 0 or said.signature is None or not certificate.made(said.signature):
            os.unlink(temporary)
            self.fail("%s could not be signed: %s" % (path, (err or out).strip()[-500:]), "signing_key")
        os.replace(temporary, path)
        return path


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "target": {"type": "path", "default": "/usr/lib/bmigrate/prebuilt"},
            "kernel": {"type": "dict", "required": True},
            "modules": {"type": "list", "elements": "str", "default": ["bufflink", "reqlog"]},
            "signing_key": {"type": "str", "no_log": False},  # a path; what is in it is never read here
            "signing_cert": {"type": "path"},
            "sign_file": {"type": "path"},
        },
        required_together=[("signing_key", "signing_cert")],
        supports_check_mode=True,
    )
    chooser = Chooser(module)
    releases = chooser.releases()
    found = {release: {name: chooser.judge(release, name) for name in module.params["modules"]} for release in releases}
    certificate = chooser.certificate()
    state = trust.Trust.from_dict(chooser.kernel["trust"])
    said = {name: entry.signature for name, entry in found[chooser.kernel["release"]].items()}
    text = trust.refusal_of_key(state, certificate) if certificate else trust.refusal(state, said)
    if text:
        chooser.fail(text, "signature_required")
    files = []
    for release in releases:
        for name in module.params["modules"]:
            source = chooser.given(release, name)
            if certificate and not module.check_mode:
                source = chooser.signed(release, name, certificate)
            files.append({"src": source, "dest": "%s/%s/%s.ko" % (module.params["target"], release, name)})
    module.exit_json(
        changed=False,  # copies on the controller are by-products
        files=files,
        releases=releases,
        missing=[name for name in chooser.kernel["requirements"] if name not in releases],
    )


if __name__ == "__main__":
    main()
