# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in a guest: a random O_DIRECT writer, a shipper into memory, and breqd killed again and again.

Promises to say the truth about one device: what differs between it and the replica in memory is
compared, block by block, with what breqd still calls dirty. It must never look into breqd's files,
and never ask it to forget anything but by acknowledging a claim. Prints one JSON object.

Arguments: DEVICE WORKLOAD VOLUME SEED ROUNDS.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, "/usr/lib/bmigrate/bmigrate.pyz")

from bmigrate.common import paths, rpc
from bmigrate.common.errors import BmigrateError

BLKZEROOUT, BLKDISCARD = 0x127F, 0x1277
MIB = 1 << 20
LIMIT_SECONDS = 300.0
HOT_SECTORS = 16 * MIB // 512
RING_LIMIT = Path("/sys/module/reqlog/parameters/ring_limit")
REQUESTS_A_SESSION, REQUESTS_OVERFLOW = 500, 2500


class Device:
    """The volume, past the page cache."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the medium."""
        buffer = mmap.mmap(-1, length)
        done = 0
        while done < length:
            done += os.preadv(self.fd, [memoryview(buffer)[done:]], offset + done)
        return bytes(buffer)

    def all(self) -> bytearray:
        """The whole content."""
        out = bytearray()
        while len(out) < self.size:
            out += self.read(len(out), min(MIB, self.size - len(out)))
        return out


class Writer(threading.Thread):
    """512 B to 1 MiB, overlapping, with zero-outs and discards; most near the start, where the shipper is.

    It may only make so many requests as it is granted: a device that is dirty all over proves nothing.
    """

    def __init__(self, device: Device, seed: float) -> None:
        super().__init__(daemon=True)
        self.device, self.rng = device, random.Random(seed)
        self.stopping = threading.Event()
        self.requests = self.granted = 0
        self.pattern = mmap.mmap(-1, 2 * MIB)
        self.pattern.write(os.urandom(2 * MIB))

    def run(self) -> None:
        """Write until told to stop."""
        sectors = self.device.size // 512
        while not self.stopping.is_set():
            if self.requests >= self.granted:
                time.sleep(0.001)
                continue
            length = self.rng.choice([1, 1, 7, 8, 8, 8, 16, 64] if self.rng.random() < 0.99 else [256, 2048])
            reach = sectors if self.rng.random() < 0.02 else min(sectors, HOT_SECTORS)
            start = self.rng.randrange(reach - length + 1)
            kind = self.rng.random()
            try:
                if kind < 0.9:
                    at = self.rng.randrange(MIB // 512) * 512
                    struct.pack_into("<Q", self.pattern, at, self.rng.getrandbits(64))
                    os.pwritev(self.device.fd, [memoryview(self.pattern)[at : at + length * 512]], start * 512)
                else:
                    number = BLKZEROOUT if kind < 0.95 else BLKDISCARD
                    fcntl.ioctl(self.device.fd, number, struct.pack("QQ", start * 512, length * 512))
            except BlockingIOError:
                continue
            self.requests += 1


def wait(condition: Any, what: str) -> Any:
    """Poll until the condition gives something true."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise SystemExit(f"not in time: {what}")
        time.sleep(0.05)


class Trial:
    """One device under breqd, with its replica."""

    def __init__(self, device: str, workload: str, volume: str, seed: int) -> None:
        self.device, self.workload, self.volume = Device(device), workload, volume
        self.rng = random.Random(seed)
        self.replica = bytearray(self.device.size)
        self.epoch = 0
        self.result: dict[str, Any] = {
            "kills": 0, "outstanding_at_kills": 0, "redirtied_claimed_blocks": 0, "claims": 0, "problems": []
        }  # fmt: skip

    def call(self, client: rpc.Client, op: str, **fields: Any) -> dict[str, Any]:
        """One request about this volume."""
        return client.call(op, workload=self.workload, volume=self.volume, **fields)

    def status(self) -> dict[str, Any] | None:
        """This volume's status; None while breqd is down."""
        try:
            with rpc.Client(paths.breqd_socket(), 60.0) as client:
                answer = client.call("status", workload=self.workload)
        except BmigrateError:
            return None
        return next((item for item in answer["volumes"] if item["volume"] == self.volume and item["attached"]), None)

    def session(self, claims: int, victim: Writer | None = None) -> int:
        """Fence, then claim, read, copy and acknowledge; returns how many claims were made.

        Args:
            victim: kill breqd when that many claims were made and one is outstanding, while this
                writer works; it is granted more requests whenever nothing is dirty.
        """
        wait(self.status, "breqd to be back")
        with rpc.Client(paths.breqd_socket(), 60.0) as client:
            highest = (self.status() or {}).get("highest_epoch") or 0
            self.epoch = max(self.epoch, highest) + 1
            client.call("fence", workload=self.workload, epoch=self.epoch, fence_id=str(self.epoch))
            made = 0
            while made < claims:
                size = self.rng.choice([4096, 65536, MIB])
                taken = self.call(client, "claim", epoch=self.epoch, max_bytes=size, from_offset_bytes=0)
                if taken["claim"] is None:
                    if victim is None:
                        break
                    victim.granted += 20
                    time.sleep(0.01)
                    continue
                made += 1
                self.result["claims"] += 1
                for offset, length in taken["extents"]:
                    self.replica[offset : offset + length] = self.device.read(offset, length)
                if victim is not None and made == claims:
                    if self.result["kills"] % 2:  # else whatever the writer happens to hit
                        self.write_again(taken["extents"])
                    status = self.status() or {}
                    self.result["redirtied_claimed_blocks"] += status["redirtied_claimed_blocks"]
                    self.result["outstanding_at_kills"] += status["claims_outstanding"]
                    # Something must be on its way, or in the map only, or the kill could lose nothing.
                    victim.granted = victim.requests + 20
                    wait(lambda: victim.requests >= victim.granted, "the writes before the kill")
                    self.kill(signal.SIGKILL)
                    break
                self.call(client, "ack", claim=taken["claim"])
        return made

    def write_again(self, extents: list[list[int]]) -> None:
        """Write to a block that is claimed and was read already, and wait until breqd knows."""
        sector = mmap.mmap(-1, 512)
        sector.write(os.urandom(512))
        os.pwritev(self.device.fd, [sector], extents[0][0])
        wait(lambda: (self.status() or {}).get("redirtied_claimed_blocks"), "the claimed block to be dirty again")

    def kill(self, number: int) -> None:
        """Signal breqd's main process."""
        text = subprocess.check_output(["systemctl", "show", "-p", "MainPID", "--value", "breqd.service"], text=True)
        os.kill(int(text), number)
        if number == signal.SIGKILL:
            self.result["kills"] += 1

    def dirty_now(self) -> list[list[int]]:
        """Everything that breqd calls dirty, by claiming all of it and acknowledging nothing."""
        extents: list[list[int]] = []
        with rpc.Client(paths.breqd_socket(), 60.0) as client:
            self.epoch = max(self.epoch, (self.status() or {})["highest_epoch"]) + 1
            client.call("fence", workload=self.workload, epoch=self.epoch, fence_id=str(self.epoch))
            client.call("barrier", workload=self.workload)
            while True:
                taken = self.call(client, "claim", epoch=self.epoch, max_bytes=1 << 40, from_offset_bytes=0)
                if taken["claim"] is None:
                    return extents
                extents += taken["extents"]

    def check(self, what: str) -> None:
        """Every sector that differs from the replica must be called dirty."""
        called = bytearray(self.device.size // 512)
        dirty = self.dirty_now()
        for offset, length in dirty:
            called[offset // 512 : (offset + length) // 512] = b"\x01" * (length // 512)
        content = self.device.all()
        differing = [
            sector
            for sector in range(len(called))
            if content[sector * 512 : sector * 512 + 512] != self.replica[sector * 512 : sector * 512 + 512]
        ]
        lost = [sector for sector in differing if not called[sector]]
        self.result.setdefault("checks", []).append(
            {"what": what, "differing_sectors": len(differing), "dirty_sectors": sum(called), "lost_sectors": len(lost)}
        )
        if lost:
            self.result["problems"].append(f"{what}: {len(lost)} sectors differ and are not dirty, first {lost[:5]}")

    def drain(self) -> None:
        """With the writer stopped: barrier, ship all, barrier; then nothing may differ."""
        with rpc.Client(paths.breqd_socket(), 60.0) as client:
            before = client.call("barrier", workload=self.workload, drain=True)["total_records"]
        while self.session(100000) == 100000:
            pass
        with rpc.Client(paths.breqd_socket(), 60.0) as client:
            after = client.call("barrier", workload=self.workload, drain=True)["total_records"]
        if before != after:
            self.result["problems"].append("a record came in after the writer had stopped")
        if self.device.all() != self.replica:
            self.result["problems"].append("drained, and the replica differs from the device")


def main() -> None:
    """Rounds of kills, then one with the daemon stopped until the log overflows."""
    device, workload, volume, seed, rounds = sys.argv[1:6]
    trial = Trial(device, workload, volume, int(seed))
    wait(trial.status, "the volume to be attached")
    trial.drain()
    first = trial.status() or {}
    written = 0
    for number in range(int(rounds)):
        writer = Writer(trial.device, trial.rng.random())
        writer.start()
        for _ in range(3):
            writer.granted += REQUESTS_A_SESSION
            trial.session(trial.rng.randint(4, 20), writer)
        writer.stopping.set()
        writer.join()
        written += writer.requests
        wait(trial.status, "breqd to be back")
        trial.check(f"round {number}")
        trial.drain()
    writer = Writer(trial.device, trial.rng.random())
    limit = RING_LIMIT.read_text()
    trial.kill(signal.SIGSTOP)
    try:
        RING_LIMIT.write_text("64")
        writer.granted = REQUESTS_OVERFLOW
        writer.start()
        wait(lambda: writer.requests == REQUESTS_OVERFLOW, "the writes while breqd is stopped")
    finally:
        RING_LIMIT.write_text(limit)
        trial.kill(signal.SIGCONT)
    writer.stopping.set()
    writer.join()
    written += writer.requests
    trial.check("after the overflow")
    trial.drain()
    last = wait(trial.status, "the last status")
    trial.result.update(
        requests=written,
        suspect=last["suspect"],
        same_attachment=last["attachment_id"] == first["attachment_id"],
        seeds=last["seed_count"] - first["seed_count"],
        overflow_regions=last["overflow_regions"],
        widened_bytes=last["widened_bytes"],
    )
    print(json.dumps(trial.result))


if __name__ == "__main__":
    main()
