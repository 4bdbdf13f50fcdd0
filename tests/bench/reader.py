# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in a guest: attaches a device and consumes its records until SIGTERM; the tracked half of the benchmark."""

from __future__ import annotations

import os
import select
import signal
import sys

from bmigrate.kernel.channel import Channel
from bmigrate.kernel.control import Control


def main(path: str) -> None:
    """Attach, say so, read and consume, detach, and say how many records there were."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(1))
    with Control() as control, Channel() as channel:
        fd = os.open(path, os.O_RDONLY)
        attachment = control.attach(fd)
        os.close(fd)
        print("attached", flush=True)
        records = 0
        while not stopping:
            select.select([channel.fileno()], [], [], 0.2)
            batch = channel.read_batch()
            while batch is not None:
                records += len(batch.records)
                channel.consumed(batch.seq)
                batch = channel.read_batch()
        control.detach(attachment.slot, attachment.attachment_id)
        batch = channel.read_batch()
        while batch is not None:
            records += len(batch.records)
            channel.consumed(batch.seq)
            batch = channel.read_batch()
        print(f"records {records}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
