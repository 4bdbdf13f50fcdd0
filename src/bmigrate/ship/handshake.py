# SPDX-License-Identifier: GPL-3.0-or-later
"""The opening of a session: the source's devices against breqd's view, HELLO, WELCOME.

It changes nothing on this side. What the other side refuses arrives here as its own error, word for
word; what it answers is checked before anything is believed.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from bmigrate.common import blockdev, errors
from bmigrate.common.config import Config
from bmigrate.common.errors import BmigrateError, RefusedError, UnreachableError
from bmigrate.ship.link import Link, StreamEnded
from bmigrate.ship.record import Record
from bmigrate.ship.source import SourceVolume
from bmigrate.ship.tracker import Snapshot
from bmigrate.wire import frames, hashing, hello, packing
from bmigrate.wire.frames import FrameType
from bmigrate.wire.hello import Welcome

WELCOME_SECONDS = 60.0
"""hold may have to wait for older receivers to die, and for its own notes to be durable."""


def open_source(config: Config, name: str, snapshot: Snapshot) -> SourceVolume:
    """Open a volume's device for reading, if breqd tracks just this device.

    Raises:
        RefusedError: reason ``not_attached``, ``device_missing``, ``device_changed``, ``size_changed`` or
            ``logical_block_size``.
    """
    tracked = snapshot.volumes.get(name)
    if tracked is None or not tracked.attached:
        raise RefusedError(
            f"breqd does not track volume {name}",
            volume=name,
            hint="see: systemctl status breqd, and bmigrate status",
            reason="not_attached",
        )
    source = SourceVolume(name, config.device(name), tracked.granule_bytes)
    if source.number and tracked.number and source.number != tracked.number:
        source.close()
        raise RefusedError(
            f"{source.path} leads to device {_name(source.number)}, breqd tracks {_name(tracked.number)}",
            volume=name,
            hint="breqd notices by itself, and has the volume compared; what is behind the path is shown by: ls -lL",
            reason="device_changed",
        )
    if source.size_bytes != tracked.size_bytes:
        source.close()
        raise RefusedError(
            f"{source.path} has {source.size_bytes} bytes, breqd tracks {tracked.size_bytes}",
            volume=name,
            hint="a device that was resized must be attached anew: systemctl restart breqd",
            reason="size_changed",
        )
    if source.logical_block_size > blockdev.LARGEST_BLOCK_BYTES:
        size = source.logical_block_size
        source.close()
        raise RefusedError(
            f"{source.path} has logical blocks of {size} bytes",
            volume=name,
            hint=f"devices with blocks of up to {blockdev.LARGEST_BLOCK_BYTES} bytes are supported",
            reason="logical_block_size",
        )
    source.attachment_id = tracked.attachment_id
    return source


def _name(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def greeting(
    config: Config, generation: dict[str, Any], record: Record, snapshot: Snapshot, volumes: list[SourceVolume]
) -> hello.Hello:
    """What this side says of itself.

    Args:
        generation: {number, id} of the data here. record: what is remembered of the last session.
        snapshot: breqd's view. volumes: open.
    """
    last = record.last_session()
    return hello.Hello(
        workload=config.workload,
        host=config.host,
        generation=hello.Generation(int(generation["number"]), str(generation["id"])),
        boot_id=blockdev.boot_id(),
        incarnation=snapshot.incarnation,
        highest_epoch=snapshot.highest_epoch,
        compression=packing.NAME if config.compression == packing.NAME and packing.available() else "",
        streams=config.streams,
        hash=hashing.preferred(),
        volumes=[
            hello.HelloVolume(item.name, item.size_bytes, item.logical_block_size, item.granule_bytes)
            for item in volumes
        ],
        last_session=None if last is None else hello.LastSession(last["epoch"], last["session_id"], last["ack"]),
    )


def shake_hands(link: Link, greet: hello.Hello, volumes: list[SourceVolume]) -> Welcome:
    """Say HELLO and take WELCOME; sets the index of each volume, and the link's epoch.

    Raises:
        BmigrateError: the receiver's refusal, or why there is none.
    """
    peer = link.host
    welcome = _ask(link, greet)
    offered = {item.name: item for item in welcome.volumes}
    for source in volumes:
        item = offered.get(source.name)
        if item is None or item.size_bytes < source.size_bytes:
            raise RefusedError(
                f"{peer} has no volume {source.name} of at least {source.size_bytes} bytes",
                volume=source.name,
                host=peer,
                hint="use a device at least as large as the source's",
                reason="too_small",
            )
        source.index = item.index
    if welcome.compression not in ("", greet.compression):
        raise RefusedError(
            f"{peer} wants the compression {welcome.compression!r}, which was not offered",
            host=peer,
            reason="bad_hello",
        )
    if welcome.streams > max(greet.streams, 1):
        raise RefusedError(
            f"{peer} wants {welcome.streams} streams, {greet.streams} were offered", host=peer, reason="bad_hello"
        )
    if welcome.hash not in (hashing.BLAKE2B, greet.hash):
        raise RefusedError(
            f"{peer} wants to compare by the hash {welcome.hash!r}, which was not offered",
            host=peer,
            reason="bad_hello",
        )
    link.set_epoch(welcome.epoch)
    return welcome


def join(link: Link, greet: hello.Hello, first: Welcome) -> Welcome:
    """Make a connection a further stream of the session that ``first`` opened; sets the link's epoch.

    Args:
        greet: what was said on the first stream.

    Raises:
        BmigrateError: the receiver's refusal, or why there is none.
    """
    wish = dataclasses.replace(greet, join=hello.Join(first.epoch, first.session_id), streams=1)
    welcome = _ask(link, wish)
    same = (welcome.epoch, welcome.session_id, welcome.v) == (first.epoch, first.session_id, first.v)
    places = [[(item.name, item.index) for item in answer.volumes] for answer in (welcome, first)]
    if not same or places[0] != places[1] or welcome.compression not in ("", greet.compression):
        raise RefusedError(
            f"{link.host} let a further stream join another session than the open one",
            host=link.host,
            hint="see: journalctl -u bmigrate-hold on that host",
            reason="bad_hello",
        )
    link.set_epoch(welcome.epoch)
    return welcome


def _ask(link: Link, greet: hello.Hello) -> Welcome:
    """Say HELLO and take what is answered.

    Raises:
        BmigrateError: the receiver's refusal, or why there is none.
    """
    peer = link.host
    try:
        link.send(FrameType.HELLO, payload=hello.encode(greet))
        frame = link.receive(WELCOME_SECONDS)
    except StreamEnded as exc:
        raise _last_words(link) or link.stream.failure() from exc
    if frame is None:
        raise UnreachableError(f"{peer} did not answer within {WELCOME_SECONDS:.0f} s", host=peer, reason="silent")
    try:
        if frame.type is FrameType.ERROR:
            raise errors.from_dict(hello.decode_error(frame.payload))
        if frame.type is not FrameType.WELCOME:
            raise RefusedError(f"{peer} answered HELLO with {frame.type.name}", host=peer, reason="bad_type")
        return hello.decode_welcome(frame.payload)
    except frames.FrameError as exc:
        raise RefusedError(f"{peer}: {exc}", host=peer, reason=exc.reason) from exc


def _last_words(link: Link) -> BmigrateError | None:
    """An ERROR frame that the receiver managed to send before it closed."""
    try:
        frame = link.receive(1.0)
        if frame is not None and frame.type is FrameType.ERROR:
            return errors.from_dict(hello.decode_error(frame.payload))
    except (StreamEnded, RefusedError, frames.FrameError):
        return None
    return None
