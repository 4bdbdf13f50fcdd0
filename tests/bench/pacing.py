# SPDX-License-Identifier: GPL-3.0-or-later
"""What shipping costs a workload on a slow disk, and what it gets of it: a disk throttled by QEMU.

Two guests with the shipped playbooks run on them. The primary's disk is held to CAPACITY by QEMU; fio writes at half of
that, at random, past the cache. In alternating rounds: fio alone, and fio while everything is dirty and is shipped.
Printed are what fio got, as a ratio to its round alone, and what was shipped, as a share of what fio left. Afterwards,
with the throttle off, a few drains for their barriers: here they go through the kernel's log.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from lab import Lab, qemu
from tests.bench import command
from tests.bench.figures import spread
from tests.vm.rig import BLOCK, DISK, WORKLOAD, Rig

MIB = 1 << 20
CAPACITY = 4 * MIB
FIO = (
    "fio --name=f --filename={device} --rw=randwrite --bs=16k --iodepth=8 --ioengine=libaio --direct=1 "
    "--rate={rate} --time_based --runtime={seconds} --output-format=json"
)


def throttle(lab: Lab, host: str, bytes_per_second: int) -> None:
    """Hold the fault disk of a guest to a rate; 0 lets go of it."""
    monitor = lab.guest(host).directory / "monitor.sock"
    serial = f"disk{DISK}"
    (place,) = [
        item["qdev"]
        for item in qemu.monitor(monitor, "query-block")
        if (item.get("inserted") or {}).get("node-name") == serial
    ]
    limits = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    # QEMU's own bucket holds a tenth of a second.
    qemu.monitor(monitor, "block_set_io_throttle", {"id": place, "bps": bytes_per_second, **limits})


def fio(rig: Rig, host: str, seconds: int) -> dict[str, float]:
    """One run; bytes per second, and seconds until 99 % of the writes were done."""
    command = FIO.format(device=rig.device(host), rate=CAPACITY // 2, seconds=seconds)
    text = rig.run(host, *command.split(), timeout_seconds=seconds + 300)
    write = json.loads(text[text.index("{") :])["jobs"][0]["write"]
    return {
        "bytes_per_second": write["io_bytes"] / (write["runtime"] / 1000),
        "p99_seconds": write["clat_ns"]["percentile"]["99.000000"] / 1e9,
        "mean_seconds": write["clat_ns"]["mean"] / 1e9,
    }


def round_of(rig: Rig, primary: str, seconds: int, ships: bool) -> dict[str, Any]:
    """fio, with or without everything being shipped beside it."""
    rig.ship(primary, "pause", workload=WORKLOAD)
    rig.wait_shipping(primary, ("paused",))
    shipped = 0
    began = time.monotonic()
    if ships:
        size = rig.tracked(primary)["size_bytes"]
        rig.breqd(primary, "mark", workload=WORKLOAD, volume=rig.volume, extents=[[0, size]], reason="benchmark")
        before = rig.shipping(primary)["shipped_bytes_total"]
        rig.ship(primary, "resume", workload=WORKLOAD)
        rig.wait_shipping(primary, ("catching_up", "losing_ground", "in_step"))
        began = time.monotonic()
    found: dict[str, Any] = fio(rig, primary, seconds)
    if ships:
        now = rig.shipping(primary)
        shipped = now["shipped_bytes_total"] - before
        found["left_bytes"] = now["bytes_left"]
        found["limiter"] = now["limiter"]
    found["ship_bytes_per_second"] = shipped / (time.monotonic() - began)
    return found


def barriers(rig: Rig, primary: str, count: int) -> list[float]:
    """Seconds that the barriers of a drain took, of so many drains with something left."""
    found = []
    for number in range(count):
        rig.wait_in_step()
        write = (
            f"dd if=/dev/urandom of={rig.device(primary)} bs=4k count=64 seek={64 * number} oflag=direct status=none"
        )
        rig.run(primary, *write.split())
        found.append(float(rig.drain(primary)["barrier_seconds"]))
        rig.unseal(primary)
    return found


def measure(rig: Rig, rounds: int, seconds: int) -> dict[str, Any]:
    """All rounds."""
    primary = rig.primary()
    fill = f"dd if=/dev/urandom of={rig.device(primary)} bs=1M oflag=direct status=none; sync"
    rig.run(primary, "sh", "-c", f"{fill} || true", timeout_seconds=300)
    rig.wait_in_step()
    throttle(rig.lab, primary, CAPACITY)
    runs: dict[str, list[dict[str, Any]]] = {"bare": [], "shipped": []}
    try:
        round_of(rig, primary, 5, False)
        for number in range(rounds):
            for name in ("bare", "shipped") if number % 2 else ("shipped", "bare"):
                runs[name].append(round_of(rig, primary, seconds, name == "shipped"))
                print(f"{name}: {json.dumps(runs[name][-1])}", file=sys.stderr, flush=True)
    finally:
        throttle(rig.lab, primary, 0)
        rig.ship(primary, "resume", workload=WORKLOAD)
    drained = barriers(rig, primary, rounds)
    pairs = list(zip(runs["shipped"], runs["bare"]))
    name = f"$(basename $(readlink -f {rig.device(primary)}))"
    scheduler = rig.run(primary, "sh", "-c", f"cat /sys/block/{name}/queue/scheduler")
    return {
        "capacity_bytes_per_second": CAPACITY,
        "scheduler": scheduler.strip(),
        "block_bytes": BLOCK,
        "runs": runs,
        "foreground_ratios": [with_["bytes_per_second"] / bare["bytes_per_second"] for with_, bare in pairs],
        "seed_shares": [one["ship_bytes_per_second"] / (CAPACITY - bare["bytes_per_second"]) for one, bare in pairs],
        "latency_ratios": [with_["mean_seconds"] / bare["mean_seconds"] for with_, bare in pairs],
        "barrier_seconds": drained,
        "p99_ratios": [with_["p99_seconds"] / bare["p99_seconds"] for with_, bare in pairs],
    }


def _lines(result: dict[str, Any]) -> Iterator[str]:
    yield f"foreground beside the seed / alone: {spread(result['foreground_ratios'])}"
    yield f"seed / what the foreground leaves of the disk: {spread(result['seed_shares'])}"
    yield f"mean time of a write beside the seed / alone: {spread(result['latency_ratios'])}"
    yield f"99 % of the writes done, beside the seed / alone: {spread(result['p99_ratios'])}"
    yield f"scheduler: {result['scheduler']}"
    yield f"barriers of a drain: {' '.join(f'{1000 * value:.0f}' for value in result['barrier_seconds'])} ms"


def main() -> int:
    """Command line."""
    parser = command.parser("pacing", __doc__, rounds=5, of="of each kind")
    parser.add_argument("--seconds", type=int, default=20, help="of each round (%(default)s)")
    arguments = command.parse(parser)
    keep = os.environ.get("BMIGRATE_LAB_KEEP") == "1"
    lab = Lab(os.environ.setdefault("BMIGRATE_LAB", "bench-pacing"))
    if not keep:
        lab.down()
    rig = Rig(lab)
    try:
        lab.up()
        if os.environ.get("BMIGRATE_LAB_DEPLOYED") == "1":
            rig.find_volume()
        else:
            rig.deploy()
        result = measure(rig, arguments.rounds, arguments.seconds)
    finally:
        rig.close()
        if not keep:
            lab.down()
    return command.tell(arguments.json, result, _lines(result))


if __name__ == "__main__":
    sys.exit(main())
