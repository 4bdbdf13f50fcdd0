#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Makes the ssh keys of workloads on a host, pins the peer's host key, lets the peer's key in.

It promises that a private key never leaves its host, that a peer gets in only to one forced command,
and that no line of authorized_keys that is not ours is touched.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_keys
short_description: Make, pin and admit the ssh keys of the data path
version_added: "0.1.0"
description:
  - Makes one ed25519 key per workload on the host when there is none, and returns its public half together with
    the host's own ssh host key. Both come over the connection that Ansible has authenticated.
  - Given O(peers), writes the known_hosts file of each workload with the peer's host key, and admits the peer's key to
    root's authorized_keys with C(restrict) and a forced command.
options:
  workloads:
    description: Definitions of the workloads of this host; only C(workload) and C(hosts) are read.
    type: list
    elements: dict
    required: true
  host:
    description: Name of this host in these definitions.
    type: str
    required: true
  peers:
    description: Per other host what this module returned there. Empty to make keys only.
    type: dict
    default: {}
  directory:
    description: Where the keys are.
    type: path
    default: /etc/bmigrate/keys
  host_key_file:
    description: Public half of the host's own ssh key.
    type: path
    default: /etc/ssh/ssh_host_ed25519_key.pub
  authorized_keys:
    description: File that admits keys; root's own when empty.
    type: path
    default: ""
  command:
    description: Program that an admitted key may start, and nothing else.
    type: path
    default: /usr/sbin/breceive
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Says which keys would be made and which lines would be written.
    support: full
  diff_mode:
    description: Shows known_hosts and authorized_keys before and after, never a private key.
    support: full
"""

EXAMPLES = r"""
- name: Make the keys
  bmigrate_keys:
    workloads: "{{ bmigrate_workloads }}"
    host: alpha

- name: Pin the peer and let it in
  bmigrate_keys:
    workloads: "{{ bmigrate_workloads }}"
    host: alpha
    peers:
      beta:
        host_key: ssh-ed25519 AAAAC3Nza
        public_keys: {pgdemo: ssh-ed25519 AAAAC3Nzb}
"""

RETURN = r"""
host_key:
  description: Type and key of the host's own ssh host key.
  returned: always
  type: str
public_keys:
  description: Per workload type and key of this host's public key; empty text for one not made in check mode.
  returned: always
  type: dict
"""

import os
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

KEY_TYPE = "ssh-ed25519"


def key_words(text: str) -> str:
    """Type and key of a public key line, without options and comment."""
    words = text.split()
    if len(words) < 2 or words[0] != KEY_TYPE:
        raise ValueError("not a public key of type %s" % KEY_TYPE)
    return " ".join(words[:2])


def read(path: str) -> str:
    """Content of a text file, "" when there is none."""
    try:
        with open(path) as text:
            return text.read()
    except FileNotFoundError:
        return ""


def mark(workload: str, host: str) -> str:
    """Comment by which a line of ours is known."""
    return "bmigrate:%s:%s" % (workload, host)


def links(workloads: list[dict[str, Any]], host: str, peers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per workload whose peer is known: workload, peer, its address, port and keys."""
    found = []
    for entry in workloads:
        for name, reach in sorted(entry["hosts"].items()):
            if name != host and name in peers:
                found.append(
                    {
                        "workload": entry["workload"],
                        "host": name,
                        "address": reach["address"],
                        "port": int(reach.get("port", 22)),
                        "host_key": peers[name]["host_key"],
                        "public_key": peers[name]["public_keys"][entry["workload"]],
                    }
                )
    return found


def known_hosts(peer: dict[str, Any]) -> str:
    """The one line that pins a peer (format: sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
    name = peer["address"] if peer["port"] == 22 else "[%s]:%d" % (peer["address"], peer["port"])
    return "%s %s\n" % (name, key_words(peer["host_key"]))


def admission(peer: dict[str, Any], command: str) -> str:
    """The one line that lets a peer in, to one forced command only (format: sshd(8), AUTHORIZED_KEYS)."""
    return 'restrict,command="%s --workload %s" %s %s' % (
        command,
        peer["workload"],
        key_words(peer["public_key"]),
        mark(peer["workload"], peer["host"]),
    )


def admit(text: str, peers: list[dict[str, Any]], command: str) -> str:
    """authorized_keys with our lines for these workloads replaced and every other line as it was."""
    ours = tuple("bmigrate:%s:" % peer["workload"] for peer in peers)
    kept = [line for line in text.splitlines() if not (line.split() and line.split()[-1].startswith(ours))]
    return "\n".join(kept + [admission(peer, command) for peer in peers]) + "\n"


def replace(module: AnsibleModule, path: str, text: str, mode: int) -> tuple[bool, dict[str, str] | None]:
    """Write a file atomically with the given mode; returns (changed, diff)."""
    before = read(path)
    diff = {"before": before, "after": text, "before_header": path, "after_header": path}
    if before == text:
        return False, None
    if not module.check_mode:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        with os.fdopen(handle, "w") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(temporary, mode)
        module.atomic_move(temporary, path)
    return True, diff


def make_key(module: AnsibleModule, workload: str) -> tuple[bool, str]:
    """The public key of a workload on this host, made when missing; returns (changed, type and key)."""
    path = os.path.join(module.params["directory"], workload)
    if os.path.exists(path) and os.path.exists(path + ".pub"):
        return False, key_words(read(path + ".pub"))
    if module.check_mode:
        return True, ""
    os.makedirs(module.params["directory"], mode=0o700, exist_ok=True)
    keygen = module.get_bin_path("ssh-keygen", required=True)
    if os.path.exists(path):
        rc, out, err = module.run_command([keygen, "-y", "-f", path])
        if rc == 0:
            replace(module, path + ".pub", "%s %s\n" % (key_words(out), mark(workload, module.params["host"])), 0o644)
    else:
        rc, out, err = module.run_command(
            [keygen, "-q", "-t", "ed25519", "-N", "", "-f", path, "-C", mark(workload, module.params["host"])]
        )
    if rc != 0:
        module.fail_json(msg="no key could be made at %s on host %s: %s" % (path, module.params["host"], err.strip()))
    return True, key_words(read(path + ".pub"))


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "workloads": {"type": "list", "elements": "dict", "required": True},
            "host": {"type": "str", "required": True},
            "peers": {"type": "dict", "default": {}},
            "directory": {"type": "path", "default": "/etc/bmigrate/keys", "no_log": False},
            "host_key_file": {"type": "path", "default": "/etc/ssh/ssh_host_ed25519_key.pub", "no_log": False},
            "authorized_keys": {"type": "path", "default": "", "no_log": False},
            "command": {"type": "path", "default": "/usr/sbin/breceive"},
        },
        supports_check_mode=True,
    )
    params = module.params
    admitted = params["authorized_keys"] or os.path.join(os.path.expanduser("~root"), ".ssh", "authorized_keys")
    try:
        host_key = key_words(read(params["host_key_file"]))
    except ValueError as error:
        module.fail_json(
            msg="host %s has no usable ssh host key at %s: %s -- run 'ssh-keygen -A' there"
            % (params["host"], params["host_key_file"], error)
        )
    made = {entry["workload"]: make_key(module, entry["workload"]) for entry in params["workloads"]}
    peers = [
        peer
        for peer in links(params["workloads"], params["host"], params["peers"])
        if peer["public_key"] or not module.check_mode
    ]
    results = [
        replace(module, os.path.join(params["directory"], peer["workload"] + ".known_hosts"), known_hosts(peer), 0o644)
        for peer in peers
    ]
    if peers:
        results.append(replace(module, admitted, admit(read(admitted), peers, params["command"]), 0o600))
    module.exit_json(
        changed=any(item[0] for item in made.values()) or any(item[0] for item in results),
        host_key=host_key,
        public_keys={workload: item[1] for workload, item in made.items()},
        diff=[item[1] for item in results if item[1]],
    )


if __name__ == "__main__":
    main()
