# SPDX-License-Identifier: GPL-3.0-or-later
"""A standby host in a temporary directory, for tests: real hold and breceive processes, file-backed volumes.

`ServiceManager` keeps the descriptors that hold leaves in the store and passes them on at the next
start, by the same protocol as systemd. `Sender` speaks the wire protocol over pipes.
"""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bmigrate.common import rpc
from bmigrate.wire import hello as greeting
from bmigrate.wire.frames import FROM_RECEIVER, Buffer, Frame, FrameReader, FrameType, FrameWriter

SRC = Path(__file__).resolve().parents[2] / "src"
# What the service manager does between fork and exec: the descriptors become 3, 4, ... and LISTEN_PID is set.
LAUNCHER = """
import fcntl, os, sys
low = [int(fd) for fd in sys.argv[1].split(",") if fd]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 200) for fd in low]
for fd in low:
    os.close(fd)
for index, fd in enumerate(high):
    os.dup2(fd, 3 + index)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
EDGE = Path(__file__).with_name("standby_edge.py")
MIB = 1 << 20
GENERATION = greeting.Generation(1, "a" * 32)
CONFIG = """\
workload: wl
host: beta
hosts: {{alpha: {{address: 10.77.0.1}}, beta: {{address: 10.77.0.2}}}}
volumes:
{volumes}
limits: {{silence_seconds: {silence}}}
"""


def wait(condition: Callable[[], Any], what: str, limit_seconds: float = 120.0) -> Any:
    """Poll until the condition is true; returns its value."""
    deadline = time.monotonic() + limit_seconds
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {limit_seconds} s for {what}"
        time.sleep(0.01)


class ServiceManager:
    """The part of systemd that hold relies on: readiness and the descriptor store."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(self.path))
        self.sock.setblocking(False)
        self.stored: dict[str, int] = {}
        self.said: list[str] = []
        self.remove_delay_seconds = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            if select.select([self.sock], [], [], 0.05)[0]:
                self.pump()

    def close(self) -> None:
        """End; nothing is stored any more."""
        self._stop.set()
        self._thread.join()
        self.forget()
        self.sock.close()

    def pump(self) -> None:
        """Take in what was sent."""
        with self._lock:
            self._pump()

    def _pump(self) -> None:
        while True:
            try:
                data, ancillary, _flags, _address = self.sock.recvmsg(4096, socket.CMSG_SPACE(64))
            except BlockingIOError:
                return
            lines = dict(line.partition("=")[::2] for line in data.decode().splitlines())
            self.said += [line for line in data.decode().splitlines() if not line.startswith("WATCHDOG")]
            fds = array.array("i")
            for _level, _type, content in ancillary:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            if "FDSTORE" in lines:
                self.stored[lines["FDNAME"]] = fds[0]
            elif "FDSTOREREMOVE" in lines and lines["FDNAME"] in self.stored:
                time.sleep(self.remove_delay_seconds)
                os.close(self.stored.pop(lines["FDNAME"]))

    def forget(self) -> None:
        """Lose the store, as after `systemctl stop`."""
        self.pump()
        for fd in self.stored.values():
            os.close(fd)
        self.stored.clear()


class Sender:
    """The source's end of one connection: a breceive process and its pipes."""

    def __init__(self, host: StandbyHost, arguments: tuple[str, ...] = ("--workload", "wl")) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(EDGE), "breceive", *arguments],
            env=host.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self.writer = FrameWriter()
        self.reader = FrameReader(FROM_RECEIVER)
        self.welcome: greeting.Welcome | None = None

    def raw(self, data: Buffer) -> None:
        """Write bytes as they are; a receiver that has gone is no error here."""
        assert self.process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.process.stdin.fileno(), view) :]
        except BrokenPipeError:
            pass

    def send(self, type_: FrameType, **fields: Any) -> None:
        """Send one frame."""
        header, payload = self.writer.encode(type_, **fields)
        self.raw(header + bytes(payload))

    def receive(self, limit_seconds: float = 120.0, skip_pings: bool = True) -> Frame | None:
        """The next frame, or None at the end of the stream."""
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + limit_seconds
        while True:
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"no frame within {limit_seconds} s"
            count = os.readv(fd, [self.reader.space()])
            frame = self.reader.filled(count)
            if frame is not None and not (skip_pings and frame.type is FrameType.PING):
                return frame
            if count == 0:
                return None

    def readable(self, limit_seconds: float) -> bool:
        """Whether anything comes within the time."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout.fileno()], [], [], limit_seconds)[0])

    def send_hello(self, host: StandbyHost, **changes: Any) -> None:
        """Send HELLO."""
        fields: dict[str, Any] = {
            "workload": "wl",
            "host": "alpha",
            "generation": GENERATION,
            "boot_id": "b" * 32,
            "incarnation": "c" * 32,
            "volumes": [greeting.HelloVolume(name, size, 512, 4096) for name, size in host.volumes.items()],
        }
        self.send(FrameType.HELLO, payload=greeting.encode(greeting.Hello(**{**fields, **changes})))

    def hello(self, host: StandbyHost, **changes: Any) -> Frame:
        """Shake hands; returns WELCOME or ERROR."""
        self.send_hello(host, **changes)
        frame = self.receive()
        assert frame is not None, self.process.stderr and self.process.stderr.read()
        if frame.type is FrameType.WELCOME:
            self.welcome = greeting.decode_welcome(frame.payload)
            self.writer.epoch = self.reader.epoch = self.welcome.epoch
        return frame

    def last_session(self, ack: int) -> greeting.LastSession:
        """What the source remembers of this session."""
        assert self.welcome is not None
        return greeting.LastSession(self.welcome.epoch, self.welcome.session_id, ack)

    def error(self) -> dict[str, Any]:
        """Read up to the ERROR frame; returns its content."""
        while True:
            frame = self.receive()
            assert frame is not None, "the stream ended without an ERROR frame"
            if frame.type is FrameType.ERROR:
                return greeting.decode_error(frame.payload)

    def ended(self, limit_seconds: float = 120.0) -> int:
        """Wait for the receiver's end; returns its exit code (negative: the signal)."""
        return self.process.wait(limit_seconds)

    def close(self) -> None:
        """End whatever is left."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class StandbyHost:
    """Configuration, state, volumes and a hold service, all under one directory.

    Args:
        directory: for everything. volumes: name -> size in bytes. silence_seconds: of the configuration.
    """

    def __init__(self, directory: Path, volumes: dict[str, int] | None = None, silence_seconds: float = 20.0) -> None:
        self.directory = directory
        self.volumes = volumes or {"data": 8 * MIB}
        for name in ("etc", "state", "run"):
            (directory / name).mkdir()
        self.environment = dict(
            os.environ,
            PYTHONPATH=str(SRC),
            BMIGRATE_ETC=str(directory / "etc"),
            BMIGRATE_STATE=str(directory / "state"),
            BMIGRATE_RUN=str(directory / "run"),
        )
        self.manager = ServiceManager(directory)
        self.hold: subprocess.Popen[bytes] | None = None
        self.senders: list[Sender] = []
        self._text = CONFIG.format(
            silence=silence_seconds,
            volumes="\n".join(
                f"  - {{name: {name}, devices: {{alpha: /dev/vd{index}, beta: {self.device(name)}}}}}"
                for index, name in enumerate(self.volumes)
            ),
        )
        for name, size in self.volumes.items():
            self._make(name, size)
        self.config_file.write_text(self._text)
        self.role("standby")

    def device(self, name: str) -> str:
        """Path of a volume's file, in a form that the configuration accepts (it must begin with /dev)."""
        return f"/dev/..{self.directory}/{name}.img"

    @property
    def config_file(self) -> Path:
        """The workload's configuration."""
        return self.directory / "etc" / "wl.yml"

    def _make(self, name: str, size: int) -> None:
        with open(self.device(name), "wb") as stream:
            stream.truncate(size)
        self.sysfs(name, "queue/logical_block_size", "512")
        self.sysfs(name, "queue/iostats", "1")
        self.sysfs(name, "size", str(size // 512))
        self.sysfs(name, "serial", f"serial-{name}")
        self.sysfs(name, "uevent", "DEVTYPE=disk")
        self.count(name, 0)

    def move(self, name: str, other: str) -> None:
        """Configure another device, of the same size, for a volume."""
        self._make(other, self.volumes[name])
        self.configure(self._text.replace(self.device(name), self.device(other)))

    def configure(self, text: str) -> None:
        """Replace the workload's configuration."""
        temporary = self.config_file.with_suffix(".new")
        temporary.write_text(text)
        os.replace(temporary, self.config_file)

    def sysfs(self, name: str, key: str, text: str) -> None:
        """Set what the kernel would say of a volume."""
        path = Path(f"{self.device(name)}.sysfs") / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    def count(self, name: str, writes: int) -> None:
        """Set the kernel's counter of writes."""
        self.sysfs(name, "stat", f"0 0 0 0 {writes} 0 {writes * 8} 0 0 0 0 0 0 0 0 0 0")

    def role(self, role: str, **fields: Any) -> None:
        """Set the durable role, as the handover would."""
        path = self.directory / "state" / "wl" / "state.json"
        path.parent.mkdir(exist_ok=True)
        state = {
            "schema": 1,
            "workload": "wl",
            "host": "beta",
            "role": role,
            "generation": {"number": GENERATION.number, "id": GENERATION.id},
            **fields,
        }
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, path)

    def record(self) -> dict[str, Any]:
        """Content of hold.json."""
        loaded: dict[str, Any] = json.loads((self.directory / "state" / "wl" / "hold.json").read_text())
        return loaded

    def start(self, **environment: str) -> None:
        """Start hold with the descriptors that are in the store, and wait until it is ready."""
        self.manager.pump()
        self.manager.said.clear()
        names = list(self.manager.stored)
        fds = [self.manager.stored[name] for name in names]
        env = dict(
            self.environment,
            NOTIFY_SOCKET=str(self.manager.path),
            LISTEN_FDS=str(len(fds)),
            LISTEN_FDNAMES=":".join(names),
            **environment,
        )

        self.hold = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, ",".join(map(str, fds)), str(EDGE), "bmigrate-hold"],
            env=env,
            pass_fds=fds,
            stderr=open(self.directory / "hold.log", "ab"),
        )

        def ready() -> bool:
            self.manager.pump()
            assert self.hold is not None and self.hold.poll() is None, (self.directory / "hold.log").read_text()
            return "READY=1" in self.manager.said

        wait(ready, "hold to be ready")

    def stored(self) -> list[str]:
        """Names of the descriptors in the service manager's store."""
        self.manager.pump()
        return sorted(self.manager.stored)

    def kill_hold(self) -> None:
        """kill -9."""
        assert self.hold is not None
        self.hold.kill()
        self.hold.wait()
        self.manager.pump()

    def stop_hold(self) -> None:
        """Orderly stop; what is in the store stays there, as in a restart job."""
        assert self.hold is not None
        self.hold.terminate()
        assert self.hold.wait(120) == 0, (self.directory / "hold.log").read_text()
        self.manager.pump()

    def client(self) -> rpc.Client:
        """A connection to hold's socket that stays open."""
        return rpc.Client(self.directory / "run" / "hold.sock", 120.0)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        """One call to hold's socket."""
        return rpc.call(self.directory / "run" / "hold.sock", op, 120.0, **fields)

    def status(self, name: str = "data") -> dict[str, Any]:
        """Hold's status of a volume."""
        found: dict[str, Any] = next(item for item in self.call("status")["volumes"] if item["volume"] == name)
        return found

    def sender(self, *arguments: str) -> Sender:
        """A new connection."""
        sender = Sender(self, arguments or ("--workload", "wl"))
        self.senders.append(sender)
        return sender

    def session(self, **changes: Any) -> Sender:
        """A new connection with a session; fails when it is refused."""
        sender = self.sender()
        frame = sender.hello(self, **changes)
        assert frame.type is FrameType.WELCOME, bytes(frame.payload)
        return sender

    def close(self) -> None:
        """End everything that was started."""
        for sender in self.senders:
            sender.close()
        if self.hold is not None and self.hold.poll() is None:
            self.hold.kill()
            self.hold.wait()
        self.manager.close()
