# SPDX-License-Identifier: GPL-3.0-or-later
"""A disk of a known speed for each end of a benchmark: a control group whose processes read so much per second at most.

Two ends on one machine share its disk, and a shared disk is as fast as others let it be. With a limit for each end, far
below what the disk can do, each has a disk of its own whose speed does not vary, as two hosts have.

Needs root and the kernel's block throttling, through version 1 (blkio) or 2 (io) of control groups.
"""

from __future__ import annotations

import os
from pathlib import Path

ONE, TWO = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")


def _disk(directory: Path) -> str:
    """MAJOR:MINOR of the whole disk under a directory.

    Raises:
        SystemExit: it does not lie on one.
    """
    number = os.stat(directory).st_dev
    place = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not place.exists():
        raise SystemExit(f"{directory} does not lie on a disk whose reads can be limited; name another with --disk")
    place = place.resolve()
    return ((place.parent if (place / "partition").exists() else place) / "dev").read_text().strip()


class ReadLimit:
    """A control group. ``close`` it when its processes are gone, or are back (``leave``).

    Args:
        name: of the group. directory: on the disk. bytes_per_second: of all its processes together.

    Raises:
        SystemExit: this kernel or this machine has no such limit.
    """

    def __init__(self, name: str, directory: Path, bytes_per_second: int) -> None:
        old = (ONE / "blkio.throttle.read_bps_device").exists()
        self._root = ONE if old else TWO
        self._group = self._root / f"bmigrate-bench-{os.getpid()}-{name}"
        try:
            if not old:
                (TWO / "cgroup.subtree_control").write_text("+io")
            self._group.mkdir()
            disk = _disk(directory)
            if old:
                (self._group / "blkio.throttle.read_bps_device").write_text(f"{disk} {bytes_per_second}")
            else:
                (self._group / "io.max").write_text(f"{disk} rbps={bytes_per_second}")
        except OSError as error:
            raise SystemExit(f"reads cannot be limited here: {error}") from error

    @property
    def procs(self) -> Path:
        """Where a process id is written to put the process into the group."""
        return self._group / "cgroup.procs"

    def enter(self, pid: int) -> None:
        """Put a process, with all its threads, into it."""
        self.procs.write_text(str(pid))

    def leave(self, pid: int) -> None:
        """Back to the root group."""
        (self._root / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Remove the group; whoever is left in it is put into the root group."""
        for pid in self.procs.read_text().split():
            try:
                self.leave(int(pid))
            except ProcessLookupError:
                continue
        self._group.rmdir()
