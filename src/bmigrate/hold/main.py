# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate-hold: the resident service that owns the exclusive descriptors and grants the epochs.

It promises that a crash of this process never lets a device go (the descriptors wait in the service
manager's store) and never lets an old receiver live on (they are on file and are killed at the next
start). Stopped in good order it kills the receivers, waits for them, and notes what proves at the
next start that nobody wrote meanwhile. Signals only set a flag; one loop does everything.
"""

from __future__ import annotations

import argparse
import logging
import os
import selectors
import signal
import time
from collections.abc import Sequence

from bmigrate import __version__
from bmigrate.common import log as logs
from bmigrate.common import output, paths, rpc, sysd
from bmigrate.common.errors import exit_code_table
from bmigrate.hold.service import Service

TICK_SECONDS = 2.0
STOP_SECONDS = 20.0
log = logging.getLogger("bmigrate-hold")


def main(arguments: Sequence[str]) -> int:
    """Run the program; returns the exit code of the documented table."""
    parser = argparse.ArgumentParser(
        prog="bmigrate-hold",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Holds the volumes of all standby workloads exclusively, and lends them to one receiver at a\n"
        "time. A service of systemd (bmigrate-hold.service); there is nothing to configure here.",
        epilog=exit_code_table(),
    )
    parser.add_argument("--version", action="version", version=f"bmigrate-hold {__version__}")
    parser.parse_args(arguments)
    logs.setup("bmigrate-hold")
    return output.run_main(_run)


def _run() -> int:
    wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(waker)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: stopping.append(signum))
    selector = selectors.DefaultSelector()
    selector.register(wake, selectors.EVENT_READ, lambda _mask: os.read(wake, 512))
    service = Service(selector)
    service.start(sysd.listen_fds())
    server = rpc.Server(paths.hold_socket(), service.handle, selector)
    sysd.notify("READY=1\nSTATUS=serving " + (", ".join(sorted(service.workloads)) or "no workload"))
    interval = min(sysd.watchdog_interval() or TICK_SECONDS, TICK_SECONDS)
    next_tick = time.monotonic() + interval
    while not stopping:
        _turn(selector, max(next_tick - time.monotonic(), 0))
        if time.monotonic() >= next_tick:
            service.tick()
            sysd.notify("WATCHDOG=1")
            next_tick = time.monotonic() + interval
    sysd.notify("STOPPING=1")
    server.close()
    _stop(service, selector)
    return 0


def _turn(selector: selectors.BaseSelector, timeout_seconds: float) -> None:
    for key, mask in selector.select(timeout_seconds):
        if selector.get_map().get(key.fd) is key:  # an earlier callback of this turn may have dropped it
            key.data(mask)


def _stop(service: Service, selector: selectors.BaseSelector) -> None:
    """The orderly stop: receivers first, then the clean-close records. Without them the volumes would be suspect."""
    for workload in service.workloads.values():
        workload.receivers.kill_all()
    deadline = time.monotonic() + STOP_SECONDS
    while any(workload.receivers.alive for workload in service.workloads.values()):
        if time.monotonic() >= deadline:
            log.error("a receiver does not die (is its device stuck?): its volumes will be suspect at the next start")
            break
        _turn(selector, 0.5)
    for workload in service.workloads.values():
        workload.close_orderly()
