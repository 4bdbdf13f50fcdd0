#!/usr/bin/python
# SPDX-License-Identifier: GPL-3.0-or-later
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
"""Lays out an archive of M(bmigrate_payload) on a host, or takes it away again.

It promises to compare with what is really there, to replace each file atomically, and to remove only
files that an earlier archive of the same name brought. It must never follow a path out of the tree.
"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: bmigrate_tree
short_description: Lay out an archive of files on a host, or remove it
version_added: "0.1.0"
description:
  - Makes files and links on the host equal to those in the archive, and removes those that an earlier archive brought
    and this one does not. A file that is as it should be is not touched.
options:
  name:
    description: Name of the set of files; its list is kept under O(directory).
    type: str
    required: true
  archive:
    description: Archive on the host. Needed unless O(state=absent).
    type: path
  state:
    description: Whether the files shall be there.
    type: str
    choices: [present, absent]
    default: present
  directory:
    description: Where the lists of installed files are kept.
    type: path
    default: /usr/lib/bmigrate
author:
  - bmigrate project (@bmigrate)
attributes:
  check_mode:
    description: Says which paths would change.
    support: full
  diff_mode:
    description: Shows text files before and after.
    support: full
"""

EXAMPLES = r"""
- name: Lay out the programs
  bmigrate_tree:
    name: programs
    archive: /usr/lib/bmigrate/programs.tar
"""

RETURN = r"""
paths:
  description: Paths that were, or in check mode would be, written or removed.
  returned: always
  type: list
  elements: str
"""

import json
import os
import stat
import tarfile
import tempfile
from typing import Optional, Tuple, Union

from ansible.module_utils.basic import AnsibleModule

DIFF_LIMIT_BYTES = 64 * 1024
Content = Union[bytes, str]  # data of a file, or target of a link
Entry = Tuple[Content, Optional[int]]


def wanted(archive: str) -> dict[str, Entry]:
    """What the archive says: path -> (data or link target, mode or None for a link)."""
    found: dict[str, Entry] = {}
    with tarfile.open(archive) as members:
        for info in members:
            path = os.path.normpath("/" + info.name)
            if info.issym():
                found[path] = (info.linkname, None)
            elif info.isfile() and ".." not in info.name.split("/"):
                stream = members.extractfile(info)
                found[path] = (stream.read() if stream else b"", info.mode)
            else:
                raise ValueError("%s is neither a file nor a link, or leads out of the tree" % info.name)
    return found


def present(path: str, content: Content, mode: int | None) -> bool:
    """Whether the path is already as wanted."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    if mode is None:
        return stat.S_ISLNK(status.st_mode) and os.readlink(path) == content
    if not stat.S_ISREG(status.st_mode) or stat.S_IMODE(status.st_mode) != mode or status.st_uid or status.st_gid:
        return False
    with open(path, "rb") as stream:
        return stream.read() == content


def write(path: str, content: Content, mode: int | None) -> None:
    """Replace one path atomically and durably."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    if mode is None or isinstance(content, str):
        temporary = tempfile.mktemp(dir=os.path.dirname(path), prefix=".bmigrate-")
        os.symlink(content, temporary)
    else:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".bmigrate-")
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            os.fchmod(stream.fileno(), mode)
            os.fchown(stream.fileno(), 0, 0)
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, path)


def remove(path: str) -> None:
    """Take a path away, and the directories of ours, or below one of ours, that only it kept."""
    os.unlink(path)
    folder = os.path.dirname(path)
    while "bmigrate" in folder and not os.listdir(folder):
        os.rmdir(folder)
        folder = os.path.dirname(folder)


def shown(path: str, content: Content | None = None) -> str:
    """Text of a file for the diff; a note when it is no short text."""
    if content is None:
        try:
            with open(path, "rb") as stream:
                content = stream.read(DIFF_LIMIT_BYTES + 1)
        except OSError:
            return ""
    if not isinstance(content, bytes):
        return "link to %s\n" % content
    try:
        return content.decode() if len(content) <= DIFF_LIMIT_BYTES else "(%d bytes)\n" % len(content)
    except UnicodeDecodeError:
        return "(%d bytes, not text)\n" % len(content)


def listed(path: str) -> list[str]:
    """Paths that the last archive brought."""
    try:
        with open(path) as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return []


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "archive": {"type": "path"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "directory": {"type": "path", "default": "/usr/lib/bmigrate"},
        },
        required_if=[("state", "present", ("archive",))],
        supports_check_mode=True,
    )
    params, files = module.params, {}
    listing = os.path.join(params["directory"], params["name"] + ".list")
    if params["state"] == "present" and not (module.check_mode and not os.path.exists(params["archive"])):
        try:
            files = wanted(params["archive"])
        except (OSError, ValueError, tarfile.TarError) as error:
            module.fail_json(msg="archive %s cannot be laid out: %s" % (params["archive"], error))
        files[listing] = (json.dumps(sorted(files), indent=0).encode() + b"\n", 0o644)
    elif params["state"] == "present":
        module.exit_json(changed=True, paths=[], msg="the archive is not on the host yet")
    stale = [path for path in [*listed(listing), listing] if path not in files and os.path.lexists(path)]
    fresh = [path for path in sorted(files) if not present(path, *files[path])]
    diff = [{"before": shown(path), "after": "", "before_header": path, "after_header": path} for path in stale]
    diff += [
        {"before": shown(path), "after": shown(path, files[path][0]), "before_header": path, "after_header": path}
        for path in fresh
        if files[path][1] is not None
    ]
    if not module.check_mode:
        for path in fresh:
            write(path, *files[path])
        for path in stale:
            remove(path)
    module.exit_json(changed=bool(stale or fresh), paths=stale + fresh, diff=diff)


if __name__ == "__main__":
    main()
