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
from typing import Any

sys.path.insert(0, "/usr/lib/bmigrate/bmigrate.pyz")

from bmigrate.common import paths, rpc
from bmigrate.common.errors import BmigrateError

BLKZEROOUT, BLKDISCARD = 0x127F, 0x1277
MIB = 1 << 20
LIMIT_SECONDS = 120.0


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
    """512 B to 1 MiB, overlapping, with zero-outs and discards; one in two near the start, where the shipper is."""

    def __init__(self, device: Device, seed: float) -> None:
        super().__init__(daemon=True)
        self.device, self.rng = device, random.Random(seed)
        self.stopping = threading.Event()
        self.requests = 0
        self.pattern = mmap.mmap(-1, 2 * MIB)
        self.pattern.write(os.urandom(2 * MIB))

    def run(self) -> None:
        """Write until told to stop."""
        sectors = self.device.size // 512
        while not self.stopping.is_set():
            length = min(self.rng.choice([1, 1, 7, 8, 8, 8, 64, 256, 2048]), sectors)
            start = self.rng.randrange((sectors if self.rng.random() < 0.5 else min(sectors, 16384)) - length + 1)
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
        self.result: dict[str, Any] = {"kills": 0, "redirtied_claimed_blocks": 0, "claims": 0, "problems": []}

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

    def session(self, claims: int, kill_inside: bool = False) -> int:
        """Fence, then claim, read, copy and acknowledge; returns how many claims were made."""
        wait(self.status, "breqd to be back")
        with rpc.Client(paths.breqd_socket(), 60.0) as client:
            highest = (self.status() or {}).get("highest_epoch") or 0
            self.epoch = max(self.epoch, highest) + 1
            client.call("fence", workload=self.workload, epoch=self.epoch, fence_id=str(self.epoch))
            for number in range(claims):
                taken = self.call(
                    client, "claim", epoch=self.epoch, max_bytes=self.rng.choice([4096, MIB, 4 * MIB]),
                    from_offset_bytes=0,
                )  # fmt: skip
                if taken["claim"] is None:
                    return number
                self.result["claims"] += 1
                for offset, length in taken["extents"]:
                    self.replica[offset : offset + length] = self.device.read(offset, length)
                if kill_inside and number == claims // 2:
                    self.result["redirtied_claimed_blocks"] += (self.status() or {})["redirtied_claimed_blocks"]
                    # A claim is outstanding, and the writer fills the log: that is the moment.
                    self.kill(signal.SIGKILL)
                    return number
                self.call(client, "ack", claim=taken["claim"])
        return claims

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
        while self.session(1000) == 1000:
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
            trial.session(trial.rng.randint(4, 20), kill_inside=True)
        writer.stopping.set()
        writer.join()
        written += writer.requests
        wait(trial.status, "breqd to be back")
        trial.check(f"round {number}")
        trial.drain()
    writer = Writer(trial.device, trial.rng.random())
    writer.start()
    trial.kill(signal.SIGSTOP)
    before = writer.requests
    wait(lambda: writer.requests - before > 12000 or None, "enough writes while breqd is stopped")
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
