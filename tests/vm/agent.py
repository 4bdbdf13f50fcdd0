# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs in a guest: does what a VM test asks for, a JSON line in and a JSON line out, over one open ssh connection.

Promises: what would cost a second by an ssh login of its own takes milliseconds: calls of the daemons' sockets, a look
at processes, and the end of one of them at a moment that counts, which is found and used without a trip to the host
in between. Uses nothing of the software under test, so that it cannot share its mistakes. Must never do anything that
it was not asked for.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any, Callable

SOCKETS = "/run/bmigrate"

# module_src/uapi/reqlog.h: LIST and STATS of /dev/reqlog.
_LIST, _STATS = 0xC010BE03, 0xC080BE04
_ENTRY = struct.Struct("<5Q6I32s")
_STATS_FORM = struct.Struct("<QII14Q")
_COUNTERS = (
    *("records", "sectors", "writes", "discards", "secure_erases", "write_zeroes", "write_sames", "failed"),
    *("passthrough", "beyond", "overflowed", "regions_set", "regions_harvested", "regions"),
)


def rpc(sock: str, op: str, fields: dict[str, Any] | None = None, timeout_seconds: float = 60) -> dict[str, Any]:
    """Call one of the daemons' sockets; returns its whole answer, also when it is an error."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as conn:
        conn.settimeout(timeout_seconds)
        conn.connect(f"{SOCKETS}/{sock}.sock")
        body = json.dumps({"v": 1, "id": 1, "op": op, **(fields or {})}).encode()
        conn.sendall(struct.pack("<I", len(body)) + body)
        (length,) = struct.unpack("<I", _exactly(conn, 4))
        answer: dict[str, Any] = json.loads(_exactly(conn, length))
        return answer


def _exactly(conn: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = conn.recv(count - len(data))
        if not part:
            raise ConnectionError("the daemon closed the connection")
        data += part
    return data


def run(argv: list[str], timeout_seconds: float = 120, input_text: str | None = None) -> dict[str, Any]:
    """A command: its exit status and what it printed."""
    done = subprocess.run(
        argv, input=input_text, capture_output=True, text=True, errors="replace", timeout=timeout_seconds, check=False
    )
    return {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def read(path: str) -> str:
    """A whole file, in base64."""
    with open(path, "rb") as file:
        return base64.b64encode(file.read()).decode()


def write(device: str, offset: int, content: str) -> int:
    """Write base64 `content` at `offset` (bytes) of a device, through the page cache, and make it durable."""
    data = base64.b64decode(content)
    fd = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)
    if done != len(data):
        raise OSError(f"wrote {done} of {len(data)} bytes")
    return done


def processes() -> list[dict[str, Any]]:
    """All processes that have a command line: pid, parent, state, start time in clock ticks, name, arguments."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as stat, open(f"/proc/{name}/cmdline", "rb") as command:
                text, argv = stat.read(), [part.decode(errors="replace") for part in command.read().split(b"\0")]
        except (FileNotFoundError, ProcessLookupError):
            continue
        fields = text[text.rindex(")") + 2 :].split()
        if any(argv) and fields[0] not in "ZX":
            found.append(
                {
                    "pid": int(name),
                    "parent": int(fields[1]),
                    "state": fields[0],
                    "ticks": int(fields[19]),
                    "name": text[text.index("(") + 1 : text.rindex(")")],
                    "argv": [part for part in argv if part],
                }
            )
    return found


def send_signal(pid: int, ticks: int, number: int) -> None:
    """Signal a process, and only the very one that was looked at before."""
    handle = os.pidfd_open(pid)
    try:
        with open(f"/proc/{pid}/stat") as file:
            text = file.read()
        if int(text[text.rindex(")") + 2 :].split()[19]) != ticks:
            raise ProcessLookupError(f"process {pid} is another one now")
        signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def tracked(workload: str, volume: str) -> dict[str, Any]:
    """What breqd says of one volume."""
    answer = rpc("breqd", "status", {"workload": workload})
    if not answer.get("ok"):
        raise RuntimeError(f"breqd: {answer.get('error')}")
    for item in answer["volumes"]:
        if item["volume"] == volume:
            return {"incarnation": answer.get("incarnation"), **item}
    raise RuntimeError(f"breqd knows no volume {volume} of {workload}")


def kill_when_outstanding(
    pid: int, ticks: int, number: int, workload: str, volume: str, limit_seconds: float
) -> dict[str, Any] | None:
    """Signal a process at a moment when claims are outstanding; returns what breqd said right before.

    None: no such moment came, or the process had ended by itself.
    """
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        seen = tracked(workload, volume)
        if seen["claimed_bytes"] > 0:
            try:
                send_signal(pid, ticks, number)
            except ProcessLookupError:
                return None
            return seen
        time.sleep(0.002)
    return None


def reqlog() -> list[dict[str, int]]:
    """The kernel's counters of every attachment."""
    fd = os.open("/dev/reqlog", os.O_RDWR | os.O_CLOEXEC)
    try:
        entries = bytearray(_ENTRY.size * 64)
        pinned = (ctypes.c_char * len(entries)).from_buffer(entries)
        request = bytearray(struct.pack("<QII", ctypes.addressof(pinned), 64, 0))
        fcntl.ioctl(fd, _LIST, request)
        _, filled, _ = struct.unpack("<QII", request)
        found = []
        for index in range(filled):
            entry = _ENTRY.unpack_from(entries, index * _ENTRY.size)
            stats = bytearray(_STATS_FORM.pack(entry[0], entry[7], 0, *([0] * len(_COUNTERS))))
            fcntl.ioctl(fd, _STATS, stats)
            values = dict(zip(_COUNTERS, _STATS_FORM.unpack(stats)[3:]))
            found.append({"id": entry[0], "major": entry[5], "minor": entry[6], "slot": entry[7], **values})
        return found
    finally:
        os.close(fd)


ACTIONS: dict[str, Callable[..., Any]] = {
    "rpc": rpc,
    "run": run,
    "read": read,
    "write": write,
    "processes": processes,
    "signal": send_signal,
    "tracked": tracked,
    "kill_when_outstanding": kill_when_outstanding,
    "reqlog": reqlog,
}


def main() -> None:
    """Answer until the connection ends."""
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        action = request.pop("do")
        try:
            answer = {"result": ACTIONS[action](**request)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
