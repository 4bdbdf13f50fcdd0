# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator wants: /etc/bmigrate/WORKLOAD.yml, parsed, validated, as frozen dataclasses.

Validation is a JSON schema (python3-jsonschema on the hosts) plus the few rules that a schema
cannot say. Errors name the file and the key. What is not supported yet is refused by name, never
ignored. Loading changes nothing and touches no device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bmigrate.common import paths
from bmigrate.common.errors import RefusedError, UsageError

NAME_PATTERN = "^[a-z][a-z0-9_-]{0,30}$"
_HOST = {"type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$"}
_NAME = {"type": "string", "pattern": NAME_PATTERN}
_ARGV = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_ABSOLUTE = {"type": "string", "pattern": "^/[^\\x00\\n]*$"}
_SECONDS = {"type": "number", "exclusiveMinimum": 0, "maximum": 86400}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["workload", "host", "hosts", "volumes"],
    "properties": {
        "workload": _NAME,
        "host": _HOST,
        "hosts": {
            "type": "object",
            "minProperties": 2,
            "maxProperties": 2,
            "propertyNames": _HOST,
            "additionalProperties": {
                "type": "object",
                "additionalProperties": False,
                "required": ["address"],
                "properties": {
                    "address": {"type": "string", "minLength": 1, "pattern": "^[A-Za-z0-9][A-Za-z0-9.:%_-]*$"},
                    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
                },
            },
        },
        "volumes": {
            "type": "array",
            "minItems": 1,
            "maxItems": 16,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "devices"],
                "properties": {
                    "name": _NAME,
                    "devices": {
                        "type": "object",
                        "minProperties": 2,
                        "maxProperties": 2,
                        "additionalProperties": {"type": "string", "pattern": "^/dev/[^\\x00\\s]+$"},
                    },
                },
            },
        },
        "mounts": {
            "type": "array",
            "maxItems": 16,
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["volume", "path", "fstype"],
                "properties": {
                    "volume": _NAME,
                    "path": {"type": "string", "pattern": "^/[A-Za-z0-9._/@-]+$"},
                    "fstype": {"type": "string", "pattern": "^[a-z0-9]+$"},
                    "options": {"type": "string", "pattern": "^[^\\s]*$"},
                },
            },
        },
        "services": {
            "type": "array",
            "items": {"type": "string", "pattern": "^[A-Za-z0-9:._@\\\\-]+\\.service$"},
            "uniqueItems": True,
        },
        "health": {
            "type": "object",
            "additionalProperties": False,
            "required": ["command"],
            "properties": {"command": _ARGV, "timeout_seconds": _SECONDS},
        },
        "hooks": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "before_quiesce": {"type": "array", "items": _ARGV},
                "after_start": {"type": "array", "items": _ARGV},
            },
        },
        "on_silent_peer": {"enum": ["start", "wait"]},
        "granule": {"anyOf": [{"const": "auto"}, {"enum": [1 << n for n in range(12, 21)]}]},
        "overflow_region_bytes": {"enum": [1 << n for n in range(12, 27)]},
        "transport": {"enum": ["openssh", "paramiko"]},
        "compression": {"enum": ["none", "zstd"]},
        "streams": {"type": "integer", "minimum": 1, "maximum": 8},
        "bitmap_directory": {"anyOf": [{"type": "null"}, _ABSOLUTE]},
        "limits": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "max_drain_seconds": _SECONDS,
                "max_downtime_seconds": _SECONDS,
                "restart_seconds": _SECONDS,
                "converge_timeout_seconds": _SECONDS,
                "silence_seconds": _SECONDS,
                "bandwidth_bytes_per_second": {"type": "integer", "minimum": 0},
            },
        },
    },
}

NOT_YET = {
    "address": "moving a service address is not supported yet; let clients know both hosts",
    "nodes": "more than two hosts are not supported",
}


@dataclass(frozen=True)
class Limits:
    """Times in seconds, bandwidth in bytes per second (0: no limit).

    ``restart_seconds`` is the part of ``max_downtime_seconds`` that is kept for starting the workload on the
    source again; None: a third.
    """

    max_drain_seconds: float = 2.0
    max_downtime_seconds: float = 120.0
    restart_seconds: float | None = None
    converge_timeout_seconds: float = 900.0
    silence_seconds: float = 20.0
    bandwidth_bytes_per_second: int = 0

    @property
    def dead_man_seconds(self) -> float:
        """How long after the first stop an uncommitted handover is undone, so that the service is back in time."""
        kept = self.max_downtime_seconds / 3 if self.restart_seconds is None else self.restart_seconds
        return self.max_downtime_seconds - kept


@dataclass(frozen=True)
class Peer:
    """A host of the workload as the data path reaches it."""

    name: str
    address: str
    port: int = 22


@dataclass(frozen=True)
class Volume:
    """A volume: its name and its device path on each host."""

    name: str
    devices: dict[str, str]


@dataclass(frozen=True)
class Mount:
    """A file system of the workload, mounted by our own unit."""

    volume: str
    path: str
    fstype: str
    options: str = "defaults"


@dataclass(frozen=True)
class Health:
    """Health check: a local command that must exit 0 within the timeout."""

    command: tuple[str, ...]
    timeout_seconds: float = 60.0


@dataclass(frozen=True)
class Config:
    """One workload as configured on this host."""

    workload: str
    host: str
    hosts: dict[str, Peer]
    volumes: tuple[Volume, ...]
    mounts: tuple[Mount, ...] = ()
    services: tuple[str, ...] = ()
    health: Health | None = None
    before_quiesce: tuple[tuple[str, ...], ...] = ()
    after_start: tuple[tuple[str, ...], ...] = ()
    on_silent_peer: str = "start"
    granule: int | None = None
    overflow_region_bytes: int | None = None
    transport: str = "openssh"
    compression: str = "none"
    streams: int = 1
    bitmap_directory: str | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def peer(self) -> Peer:
        """The other host."""
        return next(peer for name, peer in self.hosts.items() if name != self.host)

    def device(self, volume: str) -> str:
        """Path of a volume's device on this host.

        Raises:
            UsageError: no such volume.
        """
        return self.volume(volume).devices[self.host]

    def volume(self, name: str) -> Volume:
        """The volume of that name.

        Raises:
            UsageError: no such volume, reason ``unknown_volume``.
        """
        for item in self.volumes:
            if item.name == name:
                return item
        raise UsageError(
            f"workload {self.workload} has no volume {name}",
            volume=name,
            hint="known volumes: " + ", ".join(item.name for item in self.volumes),
            reason="unknown_volume",
        )


def _wrong(source: str, key: str, text: str, hint: str | None = None) -> UsageError:
    return UsageError(f"{source}: {key}: {text}", hint=hint or f"correct '{key}' in {source}", reason="bad_config")


def validate(data: Any, source: str) -> None:
    """Check a parsed configuration against the schema and the cross rules.

    Args:
        data: what the YAML file holds.
        source: the file's name, for messages.

    Raises:
        UsageError: reason ``bad_config``, naming the key.
        RefusedError: reason ``not_supported``, naming the key.
    """
    import jsonschema  # slow to import, and only needed here

    if not isinstance(data, dict):
        raise _wrong(source, "(top level)", "must be a mapping")
    for key, why in NOT_YET.items():
        if key in data:
            raise RefusedError(f"{source}: {key}: {why}", hint=f"remove '{key}'", reason="not_supported")
    problems = sorted(jsonschema.Draft7Validator(SCHEMA).iter_errors(data), key=lambda item: list(map(str, item.path)))
    if problems:
        first = jsonschema.exceptions.best_match(problems)
        raise _wrong(source, ".".join(map(str, first.absolute_path)) or "(top level)", first.message)
    hosts = set(data["hosts"])
    if data["host"] not in hosts:
        raise _wrong(source, "host", f"{data['host']!r} is not one of hosts {sorted(hosts)}")
    names = [item["name"] for item in data["volumes"]]
    if len(set(names)) != len(names):
        raise _wrong(source, "volumes", "two volumes have the same name")
    devices: list[tuple[str, str]] = []
    for index, item in enumerate(data["volumes"]):
        if set(item["devices"]) != hosts:
            raise _wrong(source, f"volumes.{index}.devices", f"must name a device for each of {sorted(hosts)}")
        devices += list(item["devices"].items())
    if len(set(devices)) != len(devices):
        raise _wrong(source, "volumes", "one device is named twice")
    for index, mount in enumerate(data.get("mounts", [])):
        if mount["volume"] not in names:
            raise _wrong(source, f"mounts.{index}.volume", f"{mount['volume']!r} is not one of the volumes {names}")
    if data.get("services") and not data.get("mounts"):
        raise _wrong(source, "services", "services without a mount have nothing to fail over with")
    limits = Limits(**data.get("limits", {}))
    if limits.dead_man_seconds <= 0:
        raise _wrong(source, "limits.restart_seconds", "must be less than max_downtime_seconds")
    if data.get("on_silent_peer", "start") != "start":
        # Only a promotion without the source could make waiting necessary, and that is refused as well.
        raise RefusedError(
            f"{source}: on_silent_peer: {data['on_silent_peer']!r} is not supported yet",
            hint="use 'start'",
            reason="not_supported",
        )


def parse(data: dict[str, Any]) -> Config:
    """Build the Config from validated data."""
    health = data.get("health")
    hooks = data.get("hooks", {})
    granule = data.get("granule", "auto")
    return Config(
        workload=data["workload"],
        host=data["host"],
        hosts={name: Peer(name, item["address"], item.get("port", 22)) for name, item in data["hosts"].items()},
        volumes=tuple(Volume(item["name"], dict(item["devices"])) for item in data["volumes"]),
        mounts=tuple(
            Mount(item["volume"], item["path"].rstrip("/"), item["fstype"], item.get("options") or "defaults")
            for item in data.get("mounts", [])
        ),
        services=tuple(data.get("services", [])),
        health=Health(tuple(health["command"]), float(health.get("timeout_seconds", 60.0))) if health else None,
        before_quiesce=tuple(tuple(argv) for argv in hooks.get("before_quiesce", [])),
        after_start=tuple(tuple(argv) for argv in hooks.get("after_start", [])),
        on_silent_peer=data.get("on_silent_peer", "start"),
        granule=None if granule == "auto" else int(granule),
        overflow_region_bytes=data.get("overflow_region_bytes"),
        transport=data.get("transport", "openssh"),
        compression=data.get("compression", "none"),
        streams=data.get("streams", 1),
        bitmap_directory=data.get("bitmap_directory"),
        limits=Limits(**data.get("limits", {})),
    )


def read_yaml(path: Path) -> Any:
    """Parse a YAML file.

    Raises:
        UsageError: missing, unreadable or not YAML; names the file, line and column.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        with open(path, encoding="utf-8") as stream:
            return yaml.load(stream, Loader=loader)
    except FileNotFoundError as exc:
        known = ", ".join(sorted(item.stem for item in paths.etc().glob("*.yml"))) or "none"
        raise UsageError(
            f"workload {path.stem} is not configured on this host: {path} does not exist",
            hint=f"configured workloads: {known}; run install.yml",
            reason="unknown_workload",
        ) from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"{path} cannot be read: {exc}", reason="bad_config") from exc
    except yaml.YAMLError as exc:
        raise UsageError(f"{path} is not YAML: {exc}", hint=f"correct {path}", reason="bad_config") from exc


def load(workload: str, validated: bool = True) -> Config:
    """The configuration of one workload on this host.

    Args:
        workload: its name.
        validated: False skips the schema (for commands in the downtime window, whose
            configuration was validated when it was installed and at preflight).

    Raises:
        UsageError: missing or wrong; names file and key.
    """
    path = paths.config_file(workload)
    data = read_yaml(path)
    if validated:
        validate(data, str(path))
        if data["workload"] != workload:
            raise _wrong(str(path), "workload", f"is {data['workload']!r}, the file's name says {workload!r}")
    return parse(data)


def load_all(validated: bool = False) -> list[Config]:
    """The configurations of all workloads on this host, by name."""
    return [load(path.stem, validated) for path in sorted(paths.etc().glob("*.yml"))]
