#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Packs what a role puts on hosts into one archive on the controller.

It promises the same bytes for the same files (sorted names, fixed time stamps, owners and modes), so
that a second install finds nothing to copy. It must never touch anything but that archive.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_payload
short_description: Pack the static files of a role into one reproducible archive
version_added: "0.1.0"
description:
  - Writes an uncompressed tar file on the controller with files under the paths that they get on the host.
    M(bmigrate_tree) lays it out there. One archive and two calls take the place of a call per file.
options:
  dest:
    description: The archive to write.
    type: path
    required: true
  files:
    description: Files and directories to pack.
    type: list
    elements: dict
    required: true
    suboptions:
      src:
        description: File or directory on the controller.
        type: path
        required: true
      dest:
        description: Absolute path on the host.
        type: path
        required: true
      mode:
        description: Mode of files on the host.
        type: str
        default: "0644"
      patterns:
        description: Of a directory, only files whose relative path matches one of these shell patterns.
        type: list
        elements: str
        default: ["*"]
  links:
    description: Symbolic links on the host, path to target.
    type: dict
    default: {}
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Writes the archive in check mode as well, because what follows compares with it. No host is changed.
    support: partial
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Pack the module source
  delegate_to: localhost
  bmigrate_payload:
    dest: build/kmod.tar
    files:
      - src: module_src
        dest: /usr/src/bmigrate-0.1.0
        patterns: ["*.c", "*.h", Kbuild]
"""

RETURN = r"""
sha256:
  description: Digest of the archive.
  returned: always
  type: str
names:
  description: Paths on the host that it holds.
  returned: always
  type: list
  elements: str
"""

import fnmatch
import hashlib
import io
import os
import tarfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule


def expand(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Pairs of (file on the controller, path on the host) of one entry."""
    if not os.path.isdir(entry["src"]):
        return [(entry["src"], entry["dest"])]
    found = []
    for root, names, files in os.walk(entry["src"]):
        names.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            relative = os.path.relpath(path, entry["src"])
            if any(fnmatch.fnmatch(relative, pattern) for pattern in entry["patterns"]):
                found.append((path, os.path.join(entry["dest"], relative)))
    return found


def member(path: str, mode: int) -> tarfile.TarInfo:
    """A tar header that is the same on every controller and at any time."""
    info = tarfile.TarInfo(path.lstrip("/"))
    info.mode = mode
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = "root"
    return info


def pack(files: list[dict[str, Any]], links: dict[str, str]) -> tuple[bytes, list[str]]:
    """The archive as bytes and the sorted paths in it."""
    contents = {}
    for entry in files:
        for source, path in expand(entry):
            with open(source, "rb") as stream:
                contents[path] = (stream.read(), int(entry["mode"], 8))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sorted(contents):
            data, mode = contents[path]
            info = member(path, mode)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for path in sorted(links):
            info = member(path, 0o777)
            info.type = tarfile.SYMTYPE
            info.linkname = links[path]
            archive.addfile(info)
    return buffer.getvalue(), sorted(contents) + sorted(links)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "dest": {"type": "path", "required": True},
            "files": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "src": {"type": "path", "required": True},
                    "dest": {"type": "path", "required": True},
                    "mode": {"type": "str", "default": "0644"},
                    "patterns": {"type": "list", "elements": "str", "default": ["*"]},
                },
            },
            "links": {"type": "dict", "default": {}},
        },
        supports_check_mode=True,
    )
    try:
        data, names = pack(module.params["files"], module.params["links"])
    except OSError as error:
        module.fail_json(msg="a file to be installed cannot be read on the controller: %s" % error)
    dest = module.params["dest"]
    digest = hashlib.sha256(data).hexdigest()
    old = b""
    if os.path.exists(dest):
        with open(dest, "rb") as stream:
            old = stream.read()
    if old != data:
        os.makedirs(os.path.dirname(dest), exist_ok=True)
        with open(dest + ".new", "wb") as stream:
            stream.write(data)
        os.replace(dest + ".new", dest)
    module.exit_json(changed=old != data, sha256=digest, names=names)


if __name__ == "__main__":
    main()
