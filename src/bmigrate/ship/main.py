# SPDX-License-Identifier: GPL-3.0-or-later
"""The shipping daemon: one process per host, one thread per workload, one socket.

The main thread serves ship.sock, samples breqd, follows configuration and state, and feeds the
watchdog; it never touches a stream or a device. Promises: a request is answered even when a
workload's thread is busy; a workload whose configuration is broken does not stop the others.
"""

from __future__ import annotations

import logging
import os
import queue
import selectors
import signal
import threading
import time
from typing import Any, Callable

from bmigrate.common import config as configs
from bmigrate.common import log, paths, rpc, sysd
from bmigrate.common.errors import BmigrateError, RefusedError, UsageError
from bmigrate.common.rpc import LATER
from bmigrate.ship import tracker, transport
from bmigrate.ship.engine import Engine
from bmigrate.ship.jobs import Job

SAMPLE_SECONDS = 1.0
STOP_SECONDS = 10.0
_log = logging.getLogger("ship")
Open = Callable[[configs.Config], transport.Transport]


def _transport_of(config: configs.Config) -> transport.Transport:
    return transport.create(config.transport)


class Daemon:
    """All workloads of this host.

    Args:
        transport_of: gives the transport of a configuration.
    """

    def __init__(self, transport_of: Open = _transport_of) -> None:
        self.engines: dict[str, Engine] = {}
        self.broken: dict[str, BmigrateError] = {}
        self.failed = False
        self._transport_of = transport_of
        self._selector = selectors.DefaultSelector()
        self._answers: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._woken)
        self.server = rpc.Server(paths.ship_socket(), self.handle, self._selector)
        self._sampler = threading.Thread(target=self._sample, name="sampler", daemon=True)
        self._operations: dict[str, Callable[[rpc.Connection, dict[str, Any]], Any]] = {
            "status": self._status,
            "converge": self._later,
            "drain": self._later,
            "verify": self._later,
            "unseal": lambda _, request: {"changed": self._engine(request).unseal()},
            "pause": lambda _, request: {"changed": self._engine(request).pause(True)},
            "resume": lambda _, request: {"changed": self._engine(request).pause(False)},
            "limit": self._limit,
            "reconnect": lambda _, request: {"changed": self._engine(request).reconnect()},
            "reload": self._reload,
        }

    # -- the loop ----------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit code."""
        self.follow()
        self._sampler.start()
        interval = sysd.watchdog_interval() or 3600.0
        fed = time.monotonic()
        sysd.notify("READY=1")
        while not self._stopping.is_set() and not self.failed:
            for key, mask in self._selector.select(min(interval, 1.0)):
                key.data(mask)
            self._check_engines()
            if time.monotonic() - fed >= interval / 2:
                sysd.notify("WATCHDOG=1")
                fed = time.monotonic()
        sysd.notify("STOPPING=1")
        self.close()
        return 70 if self.failed else 0

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler and from other threads."""
        self._stopping.set()
        self._poke()

    def close(self) -> None:
        """Stop all threads and the socket."""
        self._stopping.set()
        for engine in self.engines.values():
            engine.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for engine in self.engines.values():
            engine.join(max(0.1, deadline - time.monotonic()))
        if self._sampler.is_alive():
            self._sampler.join(5.0)
        self._run_answers()
        self.server.close()
        self._selector.unregister(self._wake_read)
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._selector.close()

    def _poke(self) -> None:
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            return  # the loop is going to wake up anyway

    def _woken(self, _mask: int) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            return
        finally:
            self._run_answers()

    def _run_answers(self) -> None:
        while True:
            try:
                answer = self._answers.get_nowait()
            except queue.Empty:
                return
            answer()

    def _check_engines(self) -> None:
        for name, engine in self.engines.items():
            if engine.defect is not None:
                _log.error("the thread of workload %s is dead; the daemon ends to be started again", name)
                self.failed = True

    # -- configuration and samples -------------------------------------------------------------------

    def follow(self) -> None:
        """Start, restart and end engines so that they match the configuration; reread every state."""
        found: dict[str, configs.Config] = {}
        self.broken = {}
        for path in sorted(paths.etc().glob("*.yml")):
            try:
                found[path.stem] = configs.load(path.stem, validated=False)
            except BmigrateError as error:
                self._give_up(path.stem, error)
            except (KeyError, TypeError, ValueError, AttributeError) as exc:
                self._give_up(path.stem, UsageError(f"{path}: {exc!r}", hint=f"correct {path}", reason="bad_config"))
        for name in list(self.engines):
            if found.get(name) != self.engines[name].config:
                self._end(name)
        for name, config in found.items():
            if name in self.engines:
                self.engines[name].reload()
                continue
            try:
                engine = Engine(config, self._transport_of(config))
            except BmigrateError as error:
                self._give_up(name, error)
                continue
            self.engines[name] = engine
            engine.start()

    def _give_up(self, name: str, error: BmigrateError) -> None:
        _log.error("workload %s: %s", name, error)
        self.broken[name] = error

    def _end(self, name: str) -> None:
        engine = self.engines.pop(name)
        engine.stop()
        engine.join(STOP_SECONDS)

    def _sample(self) -> None:
        """The sampler's thread: breqd's view of everything about once a second, and changed states."""
        client: rpc.Client | None = None
        while not self._stopping.wait(SAMPLE_SECONDS):
            views: dict[str, tracker.Snapshot] = {}
            try:
                if client is None:
                    client = rpc.Client(paths.breqd_socket(), 10.0)
                views = tracker.snapshots(client.call("status"))
            except BmigrateError as error:
                _log.debug("sample: %s", error)
                if client is not None:
                    client.close()
                client = None
            for name, engine in list(self.engines.items()):
                engine.observe(views.get(name))
                try:
                    engine.refresh_state()
                except (BmigrateError, OSError) as error:
                    _log.error("workload %s: %s", name, error)
        if client is not None:
            client.close()

    # -- operations ----------------------------------------------------------------------------------

    def handle(self, connection: rpc.Connection, request: dict[str, Any]) -> Any:
        """One request on ship.sock."""
        operation = self._operations.get(str(request.get("op")))
        if operation is None:
            raise UsageError(f"unknown operation {request.get('op')!r}", reason="bad_request")
        return operation(connection, request)

    def _engine(self, request: dict[str, Any]) -> Engine:
        name = str(request["workload"])
        if name in self.broken:
            raise self.broken[name]
        if name not in self.engines:
            raise UsageError(
                f"workload {name} is not known to the shipper",
                hint=f"known workloads: {', '.join(sorted(self.engines)) or 'none'}",
                reason="unknown_workload",
            )
        return self.engines[name]

    def _status(self, _connection: rpc.Connection, request: dict[str, Any]) -> dict[str, Any]:
        wanted = request.get("workload")
        if wanted is not None:
            return {"workloads": [self._engine(request).report()], "broken": []}
        entries: list[dict[str, Any]] = [engine.report() for _, engine in sorted(self.engines.items())]
        broken = [{"workload": name, "error": error.to_dict()} for name, error in sorted(self.broken.items())]
        return {"workloads": entries, "broken": broken}

    def _limit(self, _connection: rpc.Connection, request: dict[str, Any]) -> dict[str, Any]:
        engine = self._engine(request)
        changed = engine.limit(request.get("bandwidth_bytes_per_second"))
        entry = engine.report()
        return {"changed": changed, **{key: entry[key] for key in ("bandwidth_bytes_per_second", "bandwidth_source")}}

    def _reload(self, _connection: rpc.Connection, _request: dict[str, Any]) -> dict[str, Any]:
        self.follow()
        return {"workloads": sorted(self.engines)}

    def _later(self, connection: rpc.Connection, request: dict[str, Any]) -> Any:
        engine = self._engine(request)
        kind = str(request["op"])
        limits = engine.config.limits
        limit = {"converge": limits.converge_timeout_seconds, "drain": limits.dead_man_seconds}
        default = limit.get(kind, 864000.0)
        fields = dict(request)
        if kind in ("converge", "drain") and not isinstance(fields.get("run_id"), str):
            raise UsageError(f"{kind} needs a run_id", reason="bad_request")
        if kind == "converge":
            fields["max_drain_seconds"] = float(fields.get("max_drain_seconds") or limits.max_drain_seconds)

        def answer(result: dict[str, Any] | None, error: BmigrateError | None) -> None:
            def reply() -> None:
                if error is not None:
                    connection.fail(request, error)
                else:
                    connection.reply(request, result)

            self._answers.put(reply)
            self._poke()

        job = Job(kind, fields, answer, float(fields.get("timeout_seconds") or default))

        def gone() -> None:
            job.cancelled = True
            engine.wake()

        connection.on_close.append(gone)
        engine.post(job)
        return LATER


def main(verbose: bool = False) -> int:
    """Run the daemon; returns its exit code.

    Raises:
        RefusedError: not run as root.
    """
    log.setup("bmigrate-ship", verbose)
    if os.geteuid() != 0:
        raise RefusedError("the shipper must run as root", hint="systemctl start bmigrate-ship", reason="not_root")
    daemon = Daemon()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    return daemon.run()
