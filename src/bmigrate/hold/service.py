# SPDX-License-Identifier: GPL-3.0-or-later
"""The operations of hold.sock, over the workloads of this host.

It promises that a request which needs the receivers gone is answered only after the kernel has said
so. Requests are described in docs/protocol.md.
"""

from __future__ import annotations

import logging
import os
import selectors
from typing import Any

from bmigrate.common import blockdev, config, paths, state, sysd
from bmigrate.common.errors import BmigrateError, RefusedError, UsageError
from bmigrate.common.rpc import LATER, Connection
from bmigrate.hold.answer import Answer, Request
from bmigrate.hold.workload import Workload
from bmigrate.wire.frames import FrameError
from bmigrate.wire.hello import decode_hello

log = logging.getLogger("bmigrate-hold")


class Service:
    """All workloads, and the handler of the socket. `selector` is the loop's."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.workloads: dict[str, Workload] = {}
        self._selector = selector
        self._boot_id = blockdev.boot_id()
        self._stamps: dict[str, tuple[int, int]] = {}
        self._stored: dict[str, int] = {}
        self._operations = {
            "status": self._status,
            "hold": self._hold,
            "release": self._release,
            "register": self._register,
            "fence": self._fence,
            "refresh": self._refresh,
            "clear_suspect": self._clear_suspect,
            "writing": self._writing,
            "reload": self._reload,
        }

    def start(self, stored: dict[str, int]) -> None:
        """Take up all configured workloads. `stored`: descriptors from the service manager, by name.

        A descriptor whose workload has a role but no readable configuration is kept, so that a
        mistake in a configuration file never lets a device go.
        """
        self._stored = dict(stored)
        self.load_configs()
        for workload in self.workloads.values():
            try:
                workload.unseal()  # the fence of a step that died with us
            except (BmigrateError, OSError) as error:
                log.error("workload %s stays sealed: %s", workload.name, error)
        for name, fd in list(self._stored.items()):
            owner = name.split(".")[0]
            if name.count(".") == 2 and _has_role(owner):
                log.error("workload %s cannot be served now; its device stays held until it can", owner)
                continue
            log.warning("a stored descriptor %s belongs to no workload of this host; it is let go", name)
            sysd.remove_fd(name)
            os.close(fd)
            del self._stored[name]
        self.tick()

    def load_configs(self) -> list[BmigrateError]:
        """Read the configurations that are new or changed; a broken one is reported and keeps its old form."""
        problems: list[BmigrateError] = []
        for path in sorted(paths.etc().glob("*.yml")):
            status = path.stat()
            stamp = (status.st_ino, status.st_mtime_ns)
            if self._stamps.get(path.stem) == stamp:
                continue
            try:
                loaded = _load(path.stem)
                if path.stem in self.workloads:
                    self.workloads[path.stem].config = loaded
                else:
                    self.workloads[path.stem] = self._take_up(loaded)
            except (BmigrateError, OSError) as problem:
                error = (
                    problem
                    if isinstance(problem, BmigrateError)
                    else RefusedError(
                        f"workload {path.stem} cannot be taken up: {problem}",
                        reason="os_error",
                        hint="see the space left in /var/lib/bmigrate",
                    )
                )
                log.error("workload %s is not served: %s", path.stem, error)
                problems.append(error)
                continue
            self._stamps[path.stem] = stamp
        return problems

    def _take_up(self, loaded: config.Config) -> Workload:
        workload = Workload(loaded, self._selector, self._boot_id)
        prefix = loaded.workload + "."
        mine = {name: fd for name, fd in self._stored.items() if name.startswith(prefix) and name.count(".") == 2}
        others = {name: fd for name, fd in self._stored.items() if name not in mine}
        try:
            workload.recover(mine)
        except BaseException:
            # It is tried again, by another object: only one may watch the receivers and write of them.
            workload.receivers.forget()
            self._stored = {**others, **mine}
            raise
        self._stored = others
        return workload

    def tick(self) -> None:
        """Follow the roles; called now and then and after every change."""
        for workload in self.workloads.values():
            try:
                workload.unseal()
                workload.follow_role()
            except (BmigrateError, OSError) as error:  # a damaged or full disk: what is held stays held
                log.error("workload %s: its role cannot be followed: %s", workload.name, error)

    def handle(self, connection: Connection, request: Request) -> Any:
        """One request of the socket; see rpc.Server."""
        operation = self._operations.get(str(request.get("op")))
        if operation is None:
            raise UsageError(
                f"hold has no operation {request.get('op')!r}",
                reason="bad_request",
                hint="known: " + ", ".join(sorted(self._operations)),
            )
        return operation(connection, request)

    def _workload(self, request: Request) -> Workload:
        name = str(request["workload"])
        if name not in self.workloads:
            self.load_configs()
        if name not in self.workloads:
            raise UsageError(
                f"workload {name} is not configured on this host",
                reason="unknown_workload",
                hint="configured: " + (", ".join(sorted(self.workloads)) or "none"),
            )
        return self.workloads[name]

    def _status(self, connection: Connection, request: Request) -> dict[str, Any]:
        chosen = [self._workload(request)] if request.get("workload") else list(self.workloads.values())
        volumes = [item for workload in chosen for item in workload.status_volumes()]
        return {"boot_id": self._boot_id, "volumes": volumes}

    def _hold(self, connection: Connection, request: Request) -> dict[str, Any]:
        workload = self._workload(request)
        workload.hold_all()
        return {"volumes": workload.status_volumes()}

    def _release(self, connection: Connection, request: Request) -> Any:
        self._workload(request).release_all(Answer(connection, request))
        return LATER

    def _register(self, connection: Connection, request: Request) -> Any:
        workload = self._workload(request)
        try:
            hello = decode_hello(request["hello"])
        except FrameError as error:
            raise RefusedError(
                str(error), reason=error.reason, hint="install the same release on both hosts"
            ) from error
        if hello.workload != workload.name:
            raise RefusedError(
                f"HELLO is for workload {hello.workload}, the receiver for {workload.name}", reason="wrong_workload"
            )
        workload.register(connection, request, hello)
        return LATER

    def _fence(self, connection: Connection, request: Request) -> Any:
        workload = self._workload(request)
        workload.require_held()
        workload.fence(connection, Answer(connection, request))
        return LATER

    def _refresh(self, connection: Connection, request: Request) -> dict[str, Any]:
        self._workload(request).refresh()
        return {}

    def _clear_suspect(self, connection: Connection, request: Request) -> dict[str, Any]:
        self._workload(request).clear_suspect(connection, str(request["volume"]))
        return {}

    def _writing(self, connection: Connection, request: Request) -> dict[str, Any]:
        self._workload(request).writing(connection)
        return {}

    def _reload(self, connection: Connection, request: Request) -> dict[str, Any]:
        problems = self.load_configs()
        for workload in self.workloads.values():
            workload.unseal()
            workload.take_now()
        self.tick()
        return {
            "problems": [error.to_dict() for error in problems],
            "volumes": [item for workload in self.workloads.values() for item in workload.status_volumes()],
        }


def _has_role(workload: str) -> bool:
    """Whether this host has, or may have, a role in the workload."""
    try:
        found = state.load(workload)
    except BmigrateError:
        return True
    return found is not None and found.role != "none"


def _load(workload: str) -> config.Config:
    """A configuration, without the schema while it has the right form: a boot must not wait for its import."""
    try:
        loaded = config.load(workload, validated=False)
        if loaded.workload == workload and loaded.host in loaded.hosts:
            for item in loaded.volumes:
                loaded.device(item.name)
            return loaded
    except (AttributeError, KeyError, TypeError, ValueError):
        pass  # of a wrong form: the schema below says where
    return config.load(workload)
