# SPDX-License-Identifier: GPL-3.0-or-later
"""Entry point of the zipapp: one file, four programs, chosen by the name it is called by.

The symlinks ``bmigrate``, ``breqd``, ``bmigrate-hold`` and ``breceive`` all lead here; when run
as ``python3 -m bmigrate`` the first argument may name the program instead. Only the program that
is asked for gets imported: start-up time is downtime.
"""

from __future__ import annotations

import os
import sys

PROGRAMS = ("bmigrate", "breqd", "bmigrate-hold", "breceive")


def main() -> int:
    """Run the program named by argv[0], or by the first argument; returns its exit code."""
    name = os.path.basename(sys.argv[0])
    arguments = sys.argv[1:]
    if name not in PROGRAMS:
        name = "bmigrate"
        if arguments and arguments[0] in PROGRAMS:
            name, arguments = arguments[0], arguments[1:]
    if name == "breqd":
        from bmigrate.breqd import main as breqd

        return breqd.main(arguments)
    if name == "bmigrate-hold":
        from bmigrate.hold import main as hold

        return hold.main(arguments)
    if name == "breceive":
        from bmigrate.receive import main as receive

        return receive.main(arguments)
    from bmigrate.cli import main as cli

    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
