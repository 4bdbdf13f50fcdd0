# SPDX-License-Identifier: GPL-3.0-or-later
"""HELLO, WELCOME and ERROR: the JSON payloads that open and end a session.

It promises that what it hands out has every field, of the right type and within limits, and that
anything else is a `HelloError` naming the field. Unknown fields are refused, but for those of a peer that is
newer than this host and still speaks a version known here. Pure; it must never look at the host it runs on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bmigrate.wire import hashing
from bmigrate.wire.frames import MIN_VERSION, VERSION, FrameError

MAX_VOLUMES = 16
MAX_STREAMS = 8
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,30}\Z")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}\Z")
_ID = re.compile(r"[0-9a-f]{32}\Z")
_INCARNATION = re.compile(r"[0-9a-f]{8,64}\Z")
_BOOT_ID = re.compile(r"[0-9a-f-]{32,36}\Z")
_COMPRESSION = re.compile(r"[a-z0-9]{0,16}\Z")
_HASH = re.compile(r"[a-z0-9]{1,16}\Z")
_MAX_NUMBER = (1 << 63) - 1
_WELCOME_SINCE = {"compression": 2, "hash": hashing.SINCE_VERSION, "streams": 3}
"""The version that brought a field of WELCOME; older ones are those that every version has."""


class HelloError(FrameError):
    """A JSON payload of the handshake that this version does not understand."""

    reason = "bad_hello"


class VersionError(HelloError):
    """The peer speaks another version of the protocol."""

    reason = "wrong_version"


def agree(lowest: int, highest: int) -> int:
    """The newest version that both a peer of versions ``lowest`` to ``highest`` and this host speak.

    Raises: VersionError.
    """
    version = min(highest, VERSION)
    if version < max(lowest, MIN_VERSION):
        raise VersionError(
            f"the peer speaks protocol versions {lowest} to {highest}, this host {MIN_VERSION} to {VERSION}; "
            "install the same release on both hosts"
        )
    return version


@dataclass(frozen=True)
class Generation:
    """Which promotion the sender's data belongs to."""

    number: int
    id: str


@dataclass(frozen=True)
class LastSession:
    """The last session that one side remembers: `ack` is the number of the last SYNC acknowledged in it."""

    epoch: int
    session_id: str
    ack: int


@dataclass(frozen=True)
class Join:
    """The open session that a further stream wants to belong to; the id is known only to who was granted it."""

    epoch: int
    session_id: str


@dataclass(frozen=True)
class HelloVolume:
    """A volume as the sender has it; sizes in bytes."""

    name: str
    size_bytes: int
    logical_block_size: int
    granule_bytes: int


@dataclass(frozen=True)
class Hello:
    """What the sender says first.

    `incarnation` is that of its breqd. `highest_epoch` is the highest epoch that breqd has ever
    been told of (0: none): the new one will be above it, also when the standby's notes were lost.
    `v_min` to `v` are the versions of the protocol that the sender speaks. `compression` is what it would like to
    use, "" for none; `hash` is what it would like to compare by. `streams` is how many streams it would like the
    session to have, this one included; `join` makes this one a further stream of a session that is open, instead of the
    first of a new one.
    """

    workload: str
    host: str
    generation: Generation
    boot_id: str
    incarnation: str
    volumes: list[HelloVolume]
    last_session: LastSession | None = None
    highest_epoch: int = 0
    v: int = VERSION
    v_min: int = MIN_VERSION
    compression: str = ""
    hash: str = hashing.BLAKE2B
    streams: int = 1
    join: Join | None = None

    @property
    def version(self) -> int:
        """The version of the session. Raises: VersionError."""
        return agree(self.v_min, self.v)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object, as it also travels in hold's `register`."""
        return asdict(self)


@dataclass(frozen=True)
class WelcomeVolume:
    """A volume as the standby has it; `index` is the number that frames carry. `suspect` is a reason or None."""

    name: str
    index: int
    size_bytes: int
    logical_block_size: int
    suspect: str | None = None


@dataclass(frozen=True)
class Welcome:
    """The receiver's answer: the session is open, the fence of `epoch` is durable.

    `v` is the version of the session, `compression` what PACKED frames may be compressed with, "" for none of them,
    `hash` that of HASHES, `streams` how many streams the session may have, this one included.
    """

    epoch: int
    session_id: str
    host: str
    boot_id: str
    silence_seconds: float
    volumes: list[WelcomeVolume] = field(default_factory=list)
    v: int = VERSION
    compression: str = ""
    hash: str = hashing.BLAKE2B
    streams: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The JSON object: what a peer of that version does not know is left out, because it would refuse it."""
        return {name: value for name, value in asdict(self).items() if _WELCOME_SINCE.get(name, 1) <= self.v}


def encode(message: Hello | Welcome | Mapping[str, Any]) -> bytes:
    """Payload of a HELLO, WELCOME or ERROR frame (the latter from BmigrateError.to_dict())."""
    data = message if isinstance(message, Mapping) else message.to_dict()
    return json.dumps(data, separators=(",", ":"), sort_keys=True).encode()


def decode_hello(payload: bytes | memoryview | Mapping[str, Any]) -> Hello:
    """Take a HELLO apart (bytes from the wire, or the object that hold was given).

    Raises: VersionError, HelloError.
    """
    data = _Fields("HELLO", payload)
    low, high = data.versions()
    generation = data.child("generation")
    last = data.child("last_session", optional=True)
    join = data.child("join", optional=True)
    volumes = []
    for item in data.children("volumes"):
        volumes.append(
            HelloVolume(
                item.text("name", _NAME),
                item.number("size_bytes", 1),
                item.number("logical_block_size", 512, 65536),
                item.number("granule_bytes", 512),
            )
        )
        item.done()
    hello = Hello(
        workload=data.text("workload", _NAME),
        host=data.text("host", _HOST),
        generation=Generation(generation.number("number", 1), generation.text("id", _ID)),
        boot_id=data.text("boot_id", _BOOT_ID),
        incarnation=data.text("incarnation", _INCARNATION),
        volumes=volumes,
        last_session=None
        if last is None
        else LastSession(last.number("epoch", 1), last.text("session_id", _ID), last.number("ack", 0)),
        highest_epoch=data.number("highest_epoch", 0, default=0),
        v=high,
        v_min=low,
        compression=data.text("compression", _COMPRESSION, optional=True) or "",
        streams=data.number("streams", 1, MAX_STREAMS, default=1),
        join=None if join is None else Join(join.number("epoch", 1), join.text("session_id", _ID)),
        hash=data.text("hash", _HASH, optional=True) or hashing.BLAKE2B,
    )
    generation.done()
    for part in (last, join):
        if part is not None:
            part.done()
    data.done()
    if hello.join is not None and hello.version < 3:
        raise HelloError(f"HELLO: version {hello.version} has no sessions of several streams to join")
    if len({volume.name for volume in volumes}) != len(volumes):
        raise HelloError("HELLO: a volume is named twice")
    return hello


def decode_welcome(payload: bytes | memoryview | Mapping[str, Any]) -> Welcome:
    """Take a WELCOME apart. Raises: VersionError, HelloError."""
    data = _Fields("WELCOME", payload)
    version = data.version()
    volumes = []
    for item in data.children("volumes"):
        volumes.append(
            WelcomeVolume(
                item.text("name", _NAME),
                item.number("index", 0, MAX_VOLUMES - 1),
                item.number("size_bytes", 1),
                item.number("logical_block_size", 512, 65536),
                item.text("suspect", None, optional=True),
            )
        )
        item.done()
    welcome = Welcome(
        epoch=data.number("epoch", 1),
        session_id=data.text("session_id", _ID),
        host=data.text("host", _HOST),
        boot_id=data.text("boot_id", _BOOT_ID),
        silence_seconds=data.seconds("silence_seconds"),
        volumes=volumes,
        v=agree(version, version),
        compression=data.text("compression", _COMPRESSION, optional=True) or "",
        streams=data.number("streams", 1, MAX_STREAMS, default=1),
        hash=data.text("hash", _HASH, optional=True) or hashing.BLAKE2B,
    )
    data.done()
    if [volume.index for volume in volumes] != list(range(len(volumes))):
        raise HelloError(f"WELCOME: the indexes of the volumes are not 0 to {len(volumes) - 1}")
    return welcome


def decode_error(payload: bytes | memoryview) -> dict[str, Any]:
    """The object of an ERROR frame; `code` and `message` are strings. Raises: HelloError."""
    data = _Fields("ERROR", payload)
    data.text("code", None)
    data.text("message", None)
    return dict(data.all)


class _Fields:
    """One JSON object being taken apart; each getter refuses a wrong type by the field's name."""

    def __init__(self, where: str, payload: bytes | memoryview | Mapping[str, Any]) -> None:
        self._where = where
        if not isinstance(payload, Mapping):
            try:
                payload = json.loads(bytes(payload).decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise HelloError(f"{where} is not JSON: {error}") from None
        if not isinstance(payload, Mapping):
            raise HelloError(f"{where} is a JSON {type(payload).__name__}, expected an object")
        self.all: Mapping[str, Any] = payload
        self._left = set(payload)
        self._newer = False

    def _get(self, name: str, optional: bool = False) -> Any:
        self._left.discard(name)
        value = self.all.get(name)
        if value is None and not optional:
            raise HelloError(f"{self._where}: {name!r} is missing")
        return value

    def version(self, name: str = "v", default: int | None = None) -> int:
        value = self._get(name, default is not None)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 1000:
            raise VersionError(f"{self._where}: {name!r} is {value!r:.80}, which is no protocol version")
        return value

    def versions(self) -> tuple[int, int]:
        """The lowest and the highest version of the peer; from here on a newer peer may say more than is known."""
        high = self.version()
        low = self.version("v_min", high)
        agree(low, high)
        self._newer = high > VERSION
        return low, high

    def text(self, name: str, pattern: re.Pattern[str] | None, *, optional: bool = False) -> Any:
        value = self._get(name, optional)
        if value is None:
            return None
        if not isinstance(value, str) or len(value) > 4096 or (pattern is not None and not pattern.match(value)):
            raise HelloError(f"{self._where}: {name!r} has the value {value!r:.80}, which is not allowed there")
        return value

    def number(self, name: str, low: int, high: int = _MAX_NUMBER, *, default: int | None = None) -> int:
        value = self._get(name, default is not None)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise HelloError(f"{self._where}: {name!r} is {value!r:.80}, expected a whole number from {low} to {high}")
        return value

    def seconds(self, name: str) -> float:
        value = self._get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86400:
            raise HelloError(f"{self._where}: {name!r} is {value!r:.80}, expected seconds above 0")
        return float(value)

    def child(self, name: str, *, optional: bool = False) -> Any:
        value = self._get(name, optional)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise HelloError(f"{self._where}: {name!r} is no object")
        return self._part(f"{self._where}.{name}", value)

    def children(self, name: str) -> list[_Fields]:
        value = self._get(name)
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_VOLUMES:
            raise HelloError(f"{self._where}: {name!r} must be a list of 1 to {MAX_VOLUMES} objects")
        out = []
        for number, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise HelloError(f"{self._where}.{name}[{number}] is no object")
            out.append(self._part(f"{self._where}.{name}[{number}]", item))
        return out

    def _part(self, where: str, value: Mapping[str, Any]) -> _Fields:
        part = _Fields(where, value)
        part._newer = self._newer
        return part

    def done(self) -> None:
        if self._left and not self._newer:
            raise HelloError(f"{self._where}: unknown field {sorted(map(str, self._left))[0]!r}")
