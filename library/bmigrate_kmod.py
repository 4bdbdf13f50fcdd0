#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Brings bufflink.ko and reqlog.ko to a host, built there or elsewhere, loads them, and proves which build runs.

It promises that "loaded" means: the GNU build-id in memory is that of the installed file, and the
module answers with the expected ABI number. It must never unload a module that is in use, and refuses
before anything changes what the running kernel would not load.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_kmod
short_description: Install, load and verify the kernel modules of bmigrate
version_added: "0.1.0"
description:
  - Builds the modules by DKMS, or installs files that were built elsewhere, for the B(running) kernel and for every
    other installed one for which that is possible; loads them into the running one and verifies them.
  - A module counts as loaded only when the GNU build-id under C(/sys/module) equals that of the installed file.
  - The source is built again when its content differs from the one that was built last, whatever its version says.
  - Only one copy stays on the host, that of O(method).
  - Refuses before anything changes when the running kernel takes signed modules only (Secure Boot, lockdown,
    C(module.sig_enforce)) and these would not be signed with a key that it knows.
  - Warns of every installed kernel that would boot without usable modules.
options:
  state:
    description:
      - V(loaded) builds or installs what is missing, loads it and verifies it.
      - V(built) builds or installs without loading.
      - V(checked) changes nothing and refuses what would be refused for its signature, its key or its vermagic.
      - V(absent) unloads the modules when nobody uses them and removes them, whichever way they came.
    type: str
    choices: [loaded, built, checked, absent]
    default: loaded
  method:
    description:
      - How the modules come to the host.
      - V(dkms) builds them here; needs the headers of the running kernel and a compiler.
      - V(prebuilt) takes files, one folder per kernel release, and needs neither. A file is refused unless its whole
        vermagic and the versions of its symbols are those of the kernel it is for.
    type: str
    choices: [dkms, prebuilt]
    default: dkms
  source:
    description:
      - For V(dkms), directory with the module source and its C(dkms.conf) on the host.
      - For V(prebuilt), directory on the host with C(RELEASE/NAME.ko).
    type: path
    required: true
  signing_key:
    description:
      - For V(dkms), private key on the host, or a C(pkcs11:) name, with which DKMS signs what it builds. It is written
        into C(/etc/dkms/framework.conf.d/bmigrate.conf), so that modules for kernels that come later are signed, too;
        DKMS uses it for the modules of all packages on the host. Needs DKMS 3.
      - Without it DKMS signs with its own key, if it has one. Prebuilt files are signed before they come to the host.
    type: path
  signing_cert:
    description: X.509 certificate of O(signing_key) on the host, PEM or DER. Its key must be enrolled by the operator.
    type: path
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

- name: Install modules that were built elsewhere
  bmigrate_kmod:
    method: prebuilt
    source: /usr/lib/bmigrate/prebuilt
    version: 0.1.0

- name: Build them and have DKMS sign them with an enrolled key
  bmigrate_kmod:
    source: /usr/src/bmigrate-0.1.0
    version: 0.1.0
    signing_key: /var/lib/shim-signed/mok/MOK.priv
    signing_cert: /var/lib/shim-signed/mok/MOK.der
"""

RETURN = r"""
kernel:
  description: Release of the running kernel.
  returned: always
  type: str
  sample: 6.1.0-28-cloud-amd64
modules:
  description: For each module the installed file, its build-id and signer, and the build-id of the loaded one.
  returned: always
  type: dict
  sample:
    reqlog:
      file: /lib/modules/6.1.0/updates/dkms/reqlog.ko
      file_build_id: ab12
      loaded_build_id: ab12
      signed: true
      signer: DKMS module signing key
kernels:
  description: For each installed kernel whether it would boot with usable modules, and why not.
  returned: success
  type: list
  elements: dict
secure_boot:
  description: Secure Boot, lockdown and C(module.sig_enforce) in words.
  returned: success
  type: str
autoinstall:
  description: Whether the modules for a kernel that is installed later are built without this module.
  returned: success
  type: bool
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

import os
from typing import Any, Union

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.bmigrate_kmod import kernels
from ansible.module_utils.bmigrate_kmod_dkms import Dkms
from ansible.module_utils.bmigrate_kmod_host import CommandFailed, loaded_build_id
from ansible.module_utils.bmigrate_kmod_prebuilt import Prebuilt

Way = Union[Dkms, Prebuilt]
WAYS = {"dkms": Dkms, "prebuilt": Prebuilt}


def ensure_absent(way: Way) -> tuple[bool, dict[str, Any]]:
    """Unload and remove; returns (changed, facts)."""
    loaded = [name for name in way.params["modules"] if loaded_build_id(name) is not None]
    check = way.module.check_mode
    if not check:
        way.unload(way.params["modules"])
    present = [kind.of(way).remove(check) for kind in WAYS.values()]
    if not check:
        way.forget()
    return bool(loaded) or any(present), {}


def ensure_present(way: Way) -> tuple[bool, dict[str, Any]]:
    """Build or copy, load, verify as asked; returns (changed, facts)."""
    check = way.module.check_mode
    way.check()
    if way.params["state"] == "checked":
        return False, {}
    digest = way.digest()
    due = [release for release in way.targets() if not way.current(release, digest)]
    install = bool(due) or way.settings_differ() or way.leftovers()
    if install:
        if way.kernel in due:
            way.need_tools()
        if not check:
            install_all(way, due, digest)
    found = way.modules()
    if way.params["state"] == "built":
        return install, {}
    reload = any(entry["loaded_build_id"] != entry["file_build_id"] for entry in found.values())
    before = {name: entry["loaded_build_id"] for name, entry in found.items()}
    if check:
        return install or reload, {}
    # What DKMS has made is seen only now: without its tool it says that it does not sign, and goes on.
    way.refuse_untrusted()
    way.load()
    facts = {"abi": way.verify()}
    after = {name: entry["loaded_build_id"] for name, entry in way.modules().items()}
    return install or before != after, facts


def install_all(way: Way, due: list[str], digest: str) -> None:
    """Install for the running kernel, which must work, and for the others, which is worth a warning."""
    way.prepare()
    for release in due:
        try:
            way.install(release, digest)
        except CommandFailed as error:
            if release == way.kernel:
                raise
            way.module.warn("no modules for kernel %s: %s: %s" % (release, error, error.facts.get("stderr", "")[-300:]))
    way.finish()
    # DKMS does not flush what it writes: after a power cut soon afterwards the host would boot with
    # empty module files, and a workload that is not tracked.
    os.sync()


def summary(modules: dict[str, dict[str, Any]]) -> str:
    """The states of all modules as text, for the diff."""
    return "".join(
        "%s: installed %s (%s), loaded %s\n" % (name, entry["file_build_id"], entry["file"], entry["loaded_build_id"])
        for name, entry in sorted(modules.items())
    )


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["loaded", "built", "checked", "absent"], "default": "loaded"},
            "method": {"type": "str", "choices": ["dkms", "prebuilt"], "default": "dkms"},
            "source": {"type": "path", "required": True},
            "signing_key": {"type": "path", "no_log": False},  # a path; what is in it is never read here
            "signing_cert": {"type": "path"},
            "name": {"type": "str", "default": "bmigrate"},
            "version": {"type": "str", "required": True},
            "modules": {"type": "list", "elements": "str", "default": ["bufflink", "reqlog"]},
            "control": {"type": "path", "default": "/dev/reqlog"},
            "abi": {"type": "int", "default": 1},
            "stamp": {"type": "path", "default": "/var/lib/bmigrate/kmod.json"},
        },
        required_together=[("signing_key", "signing_cert")],
        supports_check_mode=True,
    )
    way: Way = WAYS[module.params["method"]](module)
    before = way.modules()
    try:
        changed, facts = (ensure_absent if module.params["state"] == "absent" else ensure_present)(way)
    except CommandFailed as error:
        way.fail(str(error), **error.facts)
    after = way.modules()
    seen = kernels.report("/", way.kernel, tuple(module.params["modules"]))
    if module.params["state"] in ("loaded", "built") and not module.check_mode:
        for warning in seen["warnings"]:
            module.warn("%s -- %s" % (warning["message"], warning["hint"]))
        if module.params["method"] == "dkms" and not way.autoinstall():
            module.warn("DKMS does not build by itself when a kernel is installed: run install.yml before you boot it")
    module.exit_json(
        changed=changed,
        kernel=way.kernel,
        modules=after,
        commands=way.commands,
        kernels=seen["kernels"],
        secure_boot=seen["secure_boot"],
        autoinstall=way.autoinstall(),
        diff={"before": summary(before), "after": summary(after)},
        **facts,
    )


if __name__ == "__main__":
    main()
