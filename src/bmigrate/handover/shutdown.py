# SPDX-License-Identifier: GPL-3.0-or-later
"""The shutdown unit: writes the clean flag of each volume that nobody can write any more.

Promise: a flag is written only after unmount, exclusive open, a look for raw writers, and breqd's
barrier; in any doubt there is no flag, and the next boot compares by checksum. It must never run
while the host stays up: it ends the tracking.
"""

from __future__ import annotations

from typing import Any

from bmigrate.common import config as configs
from bmigrate.common import state as states
from bmigrate.common.errors import BmigrateError, RefusedError
from bmigrate.handover.host import Host

Fields = dict[str, Any]


def close_all(only_when_stopping: bool = True) -> list[Fields]:
    """Close every primary volume of this host cleanly; one result per volume, errors in it.

    Raises:
        RefusedError: reason ``not_stopping`` when the host is not going down.
    """
    results: list[Fields] = []
    items = [item for item in states.load_all() if item.role == "primary"]
    if not items:
        return results
    if only_when_stopping:
        probe = Host(configs.load(items[0].workload, validated=False))
        found = probe.attempt(["systemctl", "is-system-running"])[1].strip()
        if found != "stopping":
            raise RefusedError(
                f"this host is not going down (it is {found}): closing its volumes would end the tracking",
                hint="the unit bmigrate-shutdown does this by itself at poweroff and reboot",
                reason="not_stopping",
            )
    for item in items:
        results += _close(Host(configs.load(item.workload, validated=False)))
    return results


def _close(host: Host) -> list[Fields]:
    volumes = [volume.name for volume in host.config.volumes]
    # No start of the workload any more; then nobody else's open: after that, what breqd says is final.
    host.clear_marker()
    try:
        host.hold("hold", workload=host.workload)
    except BmigrateError as error:
        return [_failed(host, volume, error) for volume in volumes]
    results = []
    try:
        writers = host.writers()
        for volume in volumes:
            try:
                if writers.get(volume):
                    raise RefusedError(
                        f"open for writing in {', '.join(writers[volume])}", volume=volume, reason="device_busy"
                    )
                host.breqd("clean_close", workload=host.workload, volume=volume)
                results.append({"workload": host.workload, "volume": volume, "clean": True})
            except BmigrateError as error:
                results.append(_failed(host, volume, error))
    finally:
        host.hold("release", workload=host.workload)
    return results


def _failed(host: Host, volume: str, error: BmigrateError) -> Fields:
    return {"workload": host.workload, "volume": volume, "clean": False, "error": error.to_dict()}
