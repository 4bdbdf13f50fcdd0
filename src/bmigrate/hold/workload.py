# SPDX-License-Identifier: GPL-3.0-or-later
"""One workload as hold serves it: its devices, its receivers, its epochs.

A session has one receiver that opened it and perhaps further ones that joined it; they live and die together.

The order that matters, in `_grant` and `fence`: all older receivers are gone (pidfd), then the write
counters are sampled, then the new epoch and every suspicion are on disk, and only then somebody is
told. A grant before that would let bytes of an old connection land after newer ones, or let an
epoch be given twice. Work that needs the receivers gone is queued (`when_quiet`), one at a time:
nothing here blocks on a dying process.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import time
from collections.abc import Callable
from typing import Any

from bmigrate.common import blockdev, faults, state
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, RefusedError
from bmigrate.common.rpc import Connection
from bmigrate.hold import admission, devices, record, suspicion, udev
from bmigrate.hold.answer import Answer, Request
from bmigrate.hold.devices import HeldDevice
from bmigrate.hold.receivers import Receiver, Receivers, identify
from bmigrate.hold.record import VolumeRecord
from bmigrate.receive import ackfile
from bmigrate.wire.hello import MAX_STREAMS, Hello, Join

RETRY_FIRST_SECONDS = 1.0
RETRY_LAST_SECONDS = 30.0
log = logging.getLogger("bmigrate-hold")


class Workload:
    """The state of one workload in this process.

    Args:
        config: its configuration. selector: the loop's. boot_id: of this boot.
    """

    def __init__(self, config: Config, selector: Any, boot_id: str) -> None:
        self.config = config
        self.name = config.workload
        self.record = record.load(self.name)
        self.held: dict[str, HeldDevice] = {}
        self.errors: dict[str, BmigrateError] = {}
        self.receivers = Receivers(self.name, selector, self._receiver_gone)
        self._boot_id = boot_id
        self._waiting: list[Callable[[], None]] = []
        self._retry_at = 0.0
        self._retry_seconds = RETRY_FIRST_SECONDS
        self._session: tuple[Receiver, Connection] | None = None
        self._fencing: list[Connection] = []
        self._udev = udev.Teller(self.name)

    # -- taking and letting go ---------------------------------------------------------------------

    def recover(self, stored: dict[str, int]) -> None:
        """Go on where an earlier incarnation stopped: its descriptors and its receivers.

        Args:
            stored: descriptors of this workload from the service manager's store, by full name; what is let go is
                taken out of it.

        Raises:
            BmigrateError, OSError: try again with another object, after ``receivers.forget()``.
        """
        self.receivers.recover()
        self._distrust_unconfigured()
        keep = self._must_be_held()
        given = bool(stored)
        for name, fd in list(stored.items()):
            _, volume, hold_id = name.split(".")
            known = any(item.name == volume for item in self.config.volumes)
            if not keep or not known or volume in self.held:
                log.info("workload %s: volume %s is let go, its role needs no hold", self.name, volume)
                del stored[name]
                HeldDevice(self.name, volume, "", fd, 0, hold_id).release()
                continue
            device = devices.recover(self.name, volume, self.config.device(volume), hold_id, fd)
            if device is None:
                del stored[name]
                log.warning(
                    "workload %s: volume %s: the device held before is not the configured one any more",
                    self.name,
                    volume,
                )
                continue
            old = self.record.volumes.get(volume)
            if old is not None and old.hold_id == hold_id and old.boot_id == self._boot_id:
                old.closed = None
                self.held[volume] = device
                log.info("workload %s: volume %s was held all the time", self.name, volume)
            else:
                self._judge(device)
        if self.record.session_open and not self.receivers.alive:
            self._sample()
            self._note_session_closed()
        if given:
            record.save(self.record)

    def follow_role(self) -> None:
        """Hold what the durable role says is a standby's, and tell udev; a failure is noted and tried again later."""
        role = self._state_role()
        try:
            record.meet_boot(self.record, self._boot_id)
        except OSError as error:  # tried again with every tick; to hold the devices is the better half
            log.error("workload %s: this boot cannot be put on record: %s", self.name, error)
        self._drop_unconfigured()
        if role == "standby":
            now = time.monotonic()
            if len(self.held) < len(self.config.volumes) and now >= self._retry_at:
                self._take_missing()
                self._retry_at = now + self._retry_seconds
                self._retry_seconds = min(self._retry_seconds * 2, RETRY_LAST_SECONDS)
            if len(self.held) == len(self.config.volumes):
                self._retry_seconds = RETRY_FIRST_SECONDS
        for item in self.config.volumes:
            self._udev.tell(item.name, item.devices[self.config.host], role == "standby")

    def take_now(self) -> None:
        """Have the next follow_role() try at once."""
        self._retry_at = 0.0

    def hold_all(self) -> None:
        """Hold all volumes or none more than before (quiesce, adopt, shutdown).

        Raises:
            RefusedError: reason ``device_busy``, naming the holders.
        """
        taken: list[HeldDevice] = []
        try:
            for item in self.config.volumes:
                if item.name not in self.held:
                    path = item.devices[self.config.host]
                    taken.append(devices.take(self.name, item.name, path, os.urandom(16).hex()))
            standby = self._state_role() == "standby"
            for device in taken:
                if not standby:  # a source's volume: what was known of a replica is over
                    self.record.volumes.pop(device.volume, None)
                self._judge(device)
        except BaseException:
            for device in taken:
                if self.held.get(device.volume) is not device:
                    device.release()
            raise
        self._end_seal()
        record.save(self.record)

    def release_all(self, answer: Answer) -> None:
        """Let go of all volumes once no receiver is left (promote, resume, uninstall); then answer.

        Raises:
            RefusedError: reason ``wrong_role`` while the durable role is standby.
        """
        if self._state_role() == "standby":
            raise RefusedError(
                f"workload {self.name} is a standby on this host: its devices stay held",
                hint="only a promotion, or an uninstall, changes the role",
                reason="wrong_role",
            )

        def release() -> None:
            self._note_session_closed()
            before = self.record
            self.record = dataclasses.replace(before, volumes={}, sealed=None)
            try:
                record.save(self.record)
            except BaseException:
                self.record = before  # what is held stays held, and known
                raise
            for device in self.held.values():
                device.release()
            self.held.clear()
            self.follow_role()
            answer.reply({})

        self.when_quiet(answer.guard(release))

    def close_orderly(self) -> None:
        """Write the clean-close record of each held standby volume; call when no receiver is left."""
        if self._state_role() != "standby" or self.receivers.alive:
            return
        self._sample()
        for name, device in self.held.items():
            item = self.record.volumes[name]
            item.closed = {
                "boot_id": self._boot_id,
                "counters": item.counters,
                "superblock_digest": blockdev.superblock_digest(device.path),
            }
        self._note_session_closed()
        record.save(self.record)

    # -- receivers, epochs, fences -----------------------------------------------------------------

    def when_quiet(self, action: Callable[[], None]) -> None:
        """Kill every receiver, and run `action` when the kernel says that all are gone."""
        self._waiting.append(action)
        self.receivers.kill_all()
        self._proceed()

    def register(self, connection: Connection, request: Request, hello: Hello) -> None:
        """Give the connected receiver the next epoch, or refuse it; answers the request later.

        Raises:
            RefusedError: see ``admission.check``; nothing was killed.
        """
        self.follow_role()
        self._admit(hello)
        if hello.join is not None:
            self._check_open(hello.join)
        if any(item.pid == connection.peer_pid for item in self.receivers.alive):
            raise RefusedError(f"process {connection.peer_pid} is registered already", reason="registered")
        receiver = identify(connection.peer_pid)
        poll = select.poll()
        poll.register(connection.sock, select.POLLRDHUP)
        if any(events & (select.POLLRDHUP | select.POLLHUP | select.POLLERR) for _fd, events in poll.poll(0)):
            # The peer has closed: the pid that the socket remembers may be another process by now.
            os.close(receiver.pidfd)
            raise RefusedError("the receiver is gone", reason="sender_gone")
        if hello.join is not None:
            self._let_join(connection, request, receiver)
        else:
            self.when_quiet(lambda: self._grant(connection, request, hello, receiver))

    def fence(self, connection: Connection, answer: Answer) -> None:
        """Let no receiver of any epoch so far write any more, durably, and admit no other; then answer.

        Whoever fences keeps the connection until the handover is noted; dead before that, nobody else would unseal.
        """
        self._fencing.append(connection)

        def closed() -> None:
            self._fencing.remove(connection)
            try:
                self.unseal()
            except (BmigrateError, OSError) as error:  # the next tick tries again
                log.error("workload %s stays sealed: %s", self.name, error)

        connection.on_close.append(closed)

        def seal() -> None:
            if answer.unwanted:
                return
            self._sample()
            before = self.record.sealed
            self.record.epoch += 1
            self.record.sealed = {
                "epoch": self.record.epoch,
                "state": state_mark(self.name),
                "hold_ids": {name: item.hold_id for name, item in self.held.items()},
            }
            self._note_session_closed()
            try:
                record.save(self.record)
            except BaseException:
                self.record.sealed = before
                raise
            answer.reply(
                {"epoch": self.record.epoch, "volumes": {item["volume"]: item for item in self.status_volumes()}}
            )

        self.when_quiet(answer.guard(seal))

    def unseal(self) -> None:
        """End a seal whose handover is over, or was never noted by a step that is dead."""
        if self.record.sealed is not None and self._end_seal():
            record.save(self.record)

    def _end_seal(self) -> bool:
        current = state.load(self.name)
        if self._fencing or (current is not None and current.handover is not None):
            return False
        self.record.sealed = None
        return True

    def writing(self, connection: Connection) -> None:
        """The receiver of this connection is about to write for the first time; durable when this returns.

        The source has noted the session by then: it does so before it sends. See ``suspicion.at_handshake``.

        Raises:
            RefusedError: reason ``not_registered`` for anybody else.
        """
        session = self.record.session
        mine = [item for item in self.receivers.alive if item.pid == connection.peer_pid and not item.killed]
        if session is None or not session["open"] or not any(item.epoch == session["epoch"] for item in mine):
            raise RefusedError("only a receiver of the open session may write", reason="not_registered")
        written = {"epoch": session["epoch"], "generation_id": session["generation"]["id"]}
        if self.record.written == written:
            return
        before, self.record.written = self.record.written, written
        try:
            record.save(self.record)
        except BaseException:
            self.record.written = before
            raise

    def clear_suspect(self, connection: Connection, volume: str) -> None:
        """The session of this connection has compared the volume as a whole: it is no longer suspect.

        Raises:
            RefusedError: reason ``not_registered`` for anybody else.
        """
        if self._session is None or self._session[1] is not connection or self._session[0].killed:
            raise RefusedError("only the receiver of the open session may end a suspicion", reason="not_registered")
        if volume not in self.record.volumes:
            raise RefusedError(f"workload {self.name} has no volume {volume} here", reason="unknown_volume")
        self.record.volumes[volume].suspect = None
        record.save(self.record)
        log.info("workload %s: volume %s was compared and is no longer suspect", self.name, volume)

    def refresh(self) -> None:
        """Drop the caches of all volumes and compare; see HeldDevice.refresh.

        Raises:
            RefusedError: reason ``not_held`` when a volume is not held.
        """
        self.require_held()
        for device in self.held.values():
            device.check_path()
            device.refresh()

    def require_held(self) -> None:
        """Raises: RefusedError, reason ``not_held``, unless all volumes are held."""
        for item in self.config.volumes:
            if item.name not in self.held:
                raise self.errors.get(item.name) or RefusedError(
                    f"volume {item.name} of workload {self.name} is not held exclusively",
                    volume=item.name,
                    reason="not_held",
                    hint="see: journalctl -u bmigrate-hold",
                )

    def status_volumes(self) -> list[dict[str, Any]]:
        """One dictionary for each volume; see docs/protocol.md."""
        try:
            role = self._state_role()
        except BmigrateError:
            role = "unknown"
        found = []
        for item in self.config.volumes:
            device, known = self.held.get(item.name), self.record.volumes.get(item.name)
            suspect = known.suspect if known is not None else None
            sealed_ids = (self.record.sealed or {}).get("hold_ids")
            same = sealed_ids is None or (device is not None and sealed_ids.get(item.name) == device.hold_id)
            error = self.errors.get(item.name)
            found.append(
                {
                    "workload": self.name,
                    "volume": item.name,
                    "device": item.devices[self.config.host],
                    "role": role,
                    "held": device is not None,
                    "hold_id": device.hold_id if device else None,
                    "continuous": device is not None and suspect is None and same,
                    "suspect": suspect,
                    "sealed": self.record.sealed is not None,
                    "epoch": self.record.epoch,
                    "session_open": self.record.session_open,
                    "receivers": [receiver.pid for receiver in self.receivers.alive],
                    "waiting": len(self._waiting),
                    "error": error.to_dict() if error is not None and device is None else None,
                }
            )
        return found

    # -- inner workings ----------------------------------------------------------------------------

    def _state_role(self) -> str:
        current = state.load(self.name)
        return current.role if current is not None else "none"

    def _must_be_held(self) -> bool:
        current = state.load(self.name)
        return current is not None and (current.role == "standby" or current.handover is not None)

    def _drop_unconfigured(self) -> None:
        """Let go of devices that the configuration no longer names, when nobody can be writing to them."""

        def unwanted() -> list[tuple[str, HeldDevice]]:
            wanted = {item.name: item.devices[self.config.host] for item in self.config.volumes}
            return [(name, device) for name, device in self.held.items() if wanted.get(name) != device.path]

        if not unwanted():
            return
        self._distrust_unconfigured()

        def drop() -> None:
            for name, device in unwanted():  # by now: it may be configured again
                log.info(
                    "workload %s: volume %s: %s is let go, it is no longer configured", self.name, name, device.path
                )
                device.release()
                del self.held[name]
                self._udev.tell(name, device.path, False)

        if not self._waiting:
            self.when_quiet(drop)

    def _distrust_unconfigured(self) -> None:
        """What was known of a replica stays known when the configuration does not name it any more, and is suspect.

        The source may still believe it, and anybody may write to it from then on.

        Raises:
            OSError: it is not durable, and nothing has changed: the device stays held.
        """
        names = {item.name for item in self.config.volumes}
        new = [item for name, item in self.record.volumes.items() if name not in names and item.suspect is None]
        for item in new:
            item.suspect = "it was not held for some time: the configuration did not name it"
        try:
            if new:
                record.save(self.record)
        except BaseException:
            for item in new:
                item.suspect = None
            raise

    def _take_missing(self) -> None:
        before = len(self.held)
        for item in self.config.volumes:
            if item.name in self.held:
                continue
            try:
                device = devices.take(self.name, item.name, item.devices[self.config.host], os.urandom(16).hex())
            except BmigrateError as error:
                log.error(
                    "workload %s: volume %s cannot be held, the next try is in %g s: %s",
                    self.name,
                    item.name,
                    self._retry_seconds,
                    error,
                )
                self.errors[item.name] = error
                continue
            try:
                self._judge(device)
            except BaseException as error:
                device.release()  # not held by halves: the next try would find it in use, by this very process
                if not isinstance(error, (BmigrateError, OSError)):
                    raise
                log.error("workload %s: volume %s cannot be judged: %s", self.name, item.name, error)
                self.errors[item.name] = (
                    error
                    if isinstance(error, BmigrateError)
                    else RefusedError(
                        f"{device.path} cannot be examined: {error}",
                        volume=item.name,
                        reason="io_error",
                        hint="look at the kernel log of this host (dmesg)",
                    )
                )
        if len(self.held) > before:  # after the last one: a full disk keeps none from being held
            record.save(self.record)

    def _judge(self, device: HeldDevice) -> None:
        """Put a device that was just taken on record, with what can be said of the time before.

        Raises:
            BmigrateError, OSError: it cannot be examined; nothing has changed, and the caller lets go of it.
        """
        old = self.record.volumes.get(device.volume)
        identity, counters = blockdev.identity(device.path), device.counters()
        reason = suspicion.at_take(
            old,
            boot_id=self._boot_id,
            identity=identity,
            counters=counters,
            superblock_digest=lambda: blockdev.superblock_digest(device.path),
        )
        self.record.volumes[device.volume] = VolumeRecord(
            device.path, identity, self._boot_id, device.hold_id, counters.to_dict(), reason
        )
        self.held[device.volume] = device
        self.errors.pop(device.volume, None)
        if reason is not None:
            log.warning("workload %s: volume %s is suspect: %s", self.name, device.volume, reason)
        log.info("workload %s: volume %s is held: %s", self.name, device.volume, device.path)

    def _sample(self) -> None:
        """Compare the write counters with the last sample, and note them; no receiver may be alive."""
        for name, device in self.held.items():
            item = self.record.volumes[name]
            try:
                counters = device.counters()
                reason = suspicion.outside_session(item, self.record.session_open, counters)
                item.counters = counters.to_dict()
            except (BmigrateError, OSError) as error:
                reason = item.suspect or f"its write counters cannot be read: {error}"
            if reason is not None and item.suspect is None:
                log.warning("workload %s: volume %s is suspect: %s", self.name, name, reason)
            item.suspect = reason

    def _note_session_closed(self) -> None:
        if self.record.session is not None:
            self.record.session["open"] = False

    def _receiver_gone(self) -> None:
        if self._session is not None and self._session[0] not in self.receivers.alive:
            self._session = None
        if not self.receivers.alive and self.record.session_open:
            self._sample()
            self._note_session_closed()
            try:
                record.save(self.record)
            except OSError as error:  # on disk the session stays open, which is the careful reading
                log.error("workload %s: the end of the session cannot be noted: %s", self.name, error)
        self._proceed()

    def _proceed(self) -> None:
        while self._waiting and not self.receivers.alive:
            self._waiting.pop(0)()
            if self._waiting:
                self.receivers.kill_all()

    def _admit(self, hello: Hello) -> None:
        geometry = {
            item.name: self.held[item.name].geometry if item.name in self.held else None for item in self.config.volumes
        }
        admission.check(hello, state.load(self.name), self.record, geometry, state_mark(self.name))
        for device in self.held.values():
            device.check_path()

    def _grant(self, connection: Connection, request: Request, hello: Hello, receiver: Receiver) -> None:
        if connection.closed:
            os.close(receiver.pidfd)
            return
        before = self.record.session
        try:
            self._admit(hello)  # the role may have changed while older receivers died
            self._sample()
            reason = suspicion.at_handshake(self.record, ackfile.read(self.name), hello)
            for item in self.record.volumes.values():
                if reason is not None and item.suspect is None:
                    item.suspect = reason
            if reason is not None:
                log.warning("workload %s: all volumes are suspect: %s", self.name, reason)
            last = hello.last_session.epoch if hello.last_session is not None else 0
            self.record.epoch = receiver.epoch = max(self.record.epoch, last, hello.highest_epoch) + 1
            self.record.sealed = None
            # On file first: while nobody can have been granted anything, this host writes as before.
            self.receivers.admit(receiver)
            faults.point("hold.admitted")
            self.record.session = {
                "epoch": self.record.epoch,
                "session_id": os.urandom(16).hex(),
                "host": hello.host,
                "open": True,
                "generation": {"number": hello.generation.number, "id": hello.generation.id},
            }
            record.save(self.record)
            faults.point("hold.granted")
        except (BmigrateError, OSError) as error:
            self.record.session = before  # nobody may write in this one
            if receiver in self.receivers.alive:
                self.receivers.kill(receiver)
            else:
                os.close(receiver.pidfd)
            connection.fail(
                request,
                error
                if isinstance(error, BmigrateError)
                else RefusedError(
                    f"the fence of workload {self.name} cannot be made durable: {error}", reason="os_error"
                ),
            )
            return
        self._session = (receiver, connection)
        connection.on_close.append(lambda: self._end_of(receiver.epoch))
        log.info(
            "workload %s: epoch %d, session %s is granted to process %d for %s",
            self.name,
            self.record.epoch,
            self.record.session["session_id"],
            receiver.pid,
            hello.host,
        )
        self._answer_grant(connection, request)

    def _check_open(self, join: Join) -> None:
        """Refuse to let a further stream into a session that is not this one, or not open any more."""
        known = self.record.session or {}
        mine = (known.get("epoch"), known.get("session_id")) == (join.epoch, join.session_id)
        first = self._session[0] if self._session is not None else None
        alive = first is not None and first in self.receivers.alive and not first.killed and first.epoch == join.epoch
        # Whoever waits for the receivers to be gone (a newer session, a fence) must not find one more.
        if not mine or not alive or self._waiting or self.record.sealed is not None or not self.record.session_open:
            raise RefusedError(
                f"the session of epoch {join.epoch} is not open here",
                hint="it has ended, or another one has begun; shipping resumes by itself",
                reason="session_over",
            )
        if sum(item.epoch == join.epoch for item in self.receivers.alive) >= MAX_STREAMS:
            raise RefusedError(f"a session has at most {MAX_STREAMS} streams", reason="too_many_streams")

    def _let_join(self, connection: Connection, request: Request, receiver: Receiver) -> None:
        """Make a receiver one of the open session; it was checked, and nothing has happened since."""
        receiver.epoch = self.record.epoch
        try:
            self.receivers.admit(receiver)
        except OSError as error:
            os.close(receiver.pidfd)
            raise RefusedError(f"the receiver cannot be put on file: {error}", reason="os_error") from error
        faults.point("hold.joined")
        connection.on_close.append(lambda: self._end_of(receiver.epoch))
        log.info("workload %s: process %d joins epoch %d", self.name, receiver.pid, receiver.epoch)
        self._answer_grant(connection, request)

    def _end_of(self, epoch: int) -> None:
        """The end of one receiver is the end of its session: what others still have on its way must not land later."""
        for receiver in self.receivers.alive:
            if receiver.epoch == epoch:
                self.receivers.kill(receiver)

    def _answer_grant(self, connection: Connection, request: Request) -> None:
        assert self.record.session is not None
        connection.reply(
            request,
            {
                "epoch": self.record.epoch,
                "session_id": self.record.session["session_id"],
                "host": self.config.host,
                "boot_id": self._boot_id,
                "silence_seconds": self.config.limits.silence_seconds,
                "volumes": {
                    name: {
                        "device": device.path,
                        "number": device.number,
                        "size_bytes": device.geometry.size_bytes,
                        "logical_block_size": device.geometry.logical_block_size,
                        "suspect": self.record.volumes[name].suspect,
                    }
                    for name, device in self.held.items()
                },
            },
        )


def state_mark(workload: str) -> list[int] | None:
    """Something that changes whenever state.json is replaced (inode and modification time), None without one."""
    try:
        status = os.stat(state.state_file(workload))
    except FileNotFoundError:
        return None
    return [status.st_ino, status.st_mtime_ns]
