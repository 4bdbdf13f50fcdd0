# SPDX-License-Identifier: GPL-3.0-or-later
"""bmigrate metrics: what `bmigrate status` knows, for Prometheus; served over HTTP, or written once.

Promises: a scrape asks the daemons as `status` does and changes nothing; a daemon that is down is a metric
(``bmigrate_daemon_up`` 0), not a failed scrape; a number that is not known is absent, never 0. Names and labels are
those of docs/monitoring.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from bmigrate.cli import arguments as shared
from bmigrate.cli import status
from bmigrate.common import atomic, sysd
from bmigrate.common.errors import RefusedError
from bmigrate.ship.verdict import STATES

DESCRIPTION = """\
Serves the state of every workload of this host for Prometheus on http://ADDRESS:PORT/metrics. It listens on
127.0.0.1 unless told otherwise: the metrics name volumes and devices, and there is no authentication.
The unit is bmigrate-metrics.service; it reads BMIGRATE_METRICS_LISTEN from /etc/default/bmigrate-metrics.
With --once nothing is served: the metrics are printed, or with --textfile replaced atomically in a file for
node_exporter's textfile collector. Alert rules and a dashboard: see docs/monitoring.md.
"""
DEFAULT_LISTEN = "127.0.0.1:9637"
ROLES = ("primary", "standby", "none")


def listen(text: str) -> tuple[str, int]:
    """ADDRESS:PORT.

    Raises:
        argparse.ArgumentTypeError: it is not that.
    """
    address, separator, port = text.rpartition(":")
    if not separator or not address or not port.isdigit() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADDRESS:PORT")
    return address.strip("[]"), int(port)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The sub-command's arguments."""
    parser = shared.add_command(subparsers, "metrics", "serve metrics for Prometheus", DESCRIPTION)
    parser.add_argument("--listen", type=listen, metavar="ADDRESS:PORT", default=None, help=DEFAULT_LISTEN)
    parser.add_argument("--once", action="store_true", help="print the metrics and end")
    parser.add_argument("--textfile", metavar="FILE", help="with --once: replace FILE")
    return parser


def _library() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ImportError as exc:
        raise RefusedError(
            "the Prometheus client library is not installed",
            hint="apt install python3-prometheus-client",
            reason="missing_library",
        ) from exc
    return prometheus_client


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    library = _library()
    registry = library.CollectorRegistry()
    registry.register(Collector())
    if arguments.once or arguments.textfile:
        text = library.generate_latest(registry)
        if arguments.textfile:
            atomic.replace(arguments.textfile, text, 0o644)
        else:
            sys.stdout.write(text.decode())
        return 0
    address, port = arguments.listen or listen(os.environ.get("BMIGRATE_METRICS_LISTEN") or DEFAULT_LISTEN)
    try:
        library.start_http_server(port, addr=address, registry=registry)
    except OSError as exc:
        raise RefusedError(
            f"cannot listen on {address}:{port}: {exc.strerror}",
            hint="another address: --listen, or BMIGRATE_METRICS_LISTEN in /etc/default/bmigrate-metrics",
            reason="listen",
        ) from exc
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    sysd.notify("READY=1")
    over.wait()
    return 0


class Collector:
    """Collects at each scrape."""

    def describe(self) -> list[Any]:
        """Nothing ahead of a scrape: registering must not ask the daemons."""
        return []

    def collect(self) -> Iterator[Any]:
        """All metric families of this moment."""
        return families(status.collect(None))


class _Families:
    """Gauges and counters by name, in the order of their first use."""

    def __init__(self) -> None:
        self._core = _library().core
        self._made: dict[str, Any] = {}

    def gauge(self, name: str, text: str, value: float | bool | None, **labels: str) -> None:
        """One sample of a gauge; none when the value is not known."""
        self._add(self._core.GaugeMetricFamily, name, text, value, labels)

    def counter(self, name: str, text: str, value: float | None, **labels: str) -> None:
        """One sample of a counter; ``_total`` is added to the name."""
        self._add(self._core.CounterMetricFamily, name, text, value, labels)

    def _add(self, kind: Any, name: str, text: str, value: float | bool | None, labels: dict[str, str]) -> None:
        if name not in self._made:
            self._made[name] = kind(name, text, labels=list(labels))
        if value is not None:
            self._made[name].add_metric(list(labels.values()), float(value))

    def all(self) -> Iterator[Any]:
        """The families."""
        yield from self._made.values()


def families(data: dict[str, Any]) -> Iterator[Any]:
    """The metrics of what ``status.collect`` returned."""
    out = _Families()
    for name, daemon in data["daemons"].items():
        out.gauge("bmigrate_daemon_up", "1 when the daemon answers on its socket.", daemon["up"], daemon=name)
    for item in data["workloads"]:
        _workload(out, item)
    return out.all()


def _workload(out: _Families, item: dict[str, Any]) -> None:
    name, ship = item["workload"], item["ship"] or {}
    for role in ROLES:
        out.gauge(
            "bmigrate_role", "1 for the durable role of this host.", item["role"] == role, workload=name, role=role
        )
    generation = item["generation"] or {}
    out.gauge("bmigrate_generation", "Number of the generation.", generation.get("number"), workload=name)
    out.gauge(
        "bmigrate_handover_open", "1 while a handover is open on this host.", item["handover"] is not None,
        workload=name,
    )  # fmt: skip
    out.gauge(
        "bmigrate_state_readable", "0 when state.json cannot be read.", item["state_error"] is None, workload=name
    )
    if ship:
        for state in STATES:
            out.gauge(
                "bmigrate_state", "1 for the state that the shipper is in.", ship["state"] == state,
                workload=name, state=state,
            )  # fmt: skip
        _shipping(out, name, ship)
    for volume in item["tracking"]:
        _tracked(out, name, item["role"], volume)
    for volume in item["hold"]:
        labels = {"workload": name, "volume": volume["volume"]}
        out.gauge("bmigrate_replica_suspect", "1 while the replica is suspect.", bool(volume.get("suspect")), **labels)
        if item["role"] == "standby":
            out.gauge("bmigrate_replica_held", "1 while it is held exclusively.", bool(volume.get("held")), **labels)


def _shipping(out: _Families, name: str, ship: dict[str, Any]) -> None:
    gauges = {
        "bmigrate_left_bytes": ("Bytes that are not durable on the standby.", "bytes_left"),
        "bmigrate_size_bytes": ("Bytes of all volumes.", "total_bytes"),
        "bmigrate_lag_seconds": ("Age of the oldest write that is not durable on the standby.", "lag_seconds"),
        "bmigrate_dirty_rate_bytes_per_second": ("What the workload writes.", "dirty_rate_bytes_per_second"),
        "bmigrate_ship_rate_bytes_per_second": ("What becomes durable.", "ship_rate_bytes_per_second"),
        "bmigrate_predicted_drain_seconds": ("How long a drain would take now.", "predicted_drain_seconds"),
        "bmigrate_bandwidth_limit_bytes_per_second": ("The limit, 0 for none.", "bandwidth_bytes_per_second"),
        "bmigrate_session_epoch": ("Epoch of the open session.", "epoch"),
        "bmigrate_session_streams": ("Connections of the open session.", "streams"),
    }
    for metric, (text, key) in gauges.items():
        out.gauge(metric, text, ship.get(key), workload=name)
    if ship.get("limiter"):
        out.gauge("bmigrate_limiter", "1 for what limits shipping.", 1, workload=name, limiter=ship["limiter"])
    counters = {
        "bmigrate_shipped_bytes": ("Data that became durable on the standby.", "shipped_bytes_total"),
        "bmigrate_zero_bytes": ("Zeroes that became durable on the standby.", "zero_bytes_total"),
        "bmigrate_same_bytes": ("Bytes found equal by checksum.", "same_bytes_total"),
        "bmigrate_hashed_bytes": ("Bytes compared by checksum.", "hashed_bytes_total"),
        "bmigrate_passes": ("Complete passes.", "passes"),
    }
    for metric, (text, key) in counters.items():
        out.counter(metric, text, ship.get(key), workload=name)


def _tracked(out: _Families, name: str, role: str, volume: dict[str, Any]) -> None:
    labels = {"workload": name, "volume": volume["volume"]}
    if role == "primary":
        out.gauge("bmigrate_tracked", "1 while writes to the volume are recorded.", volume["attached"], **labels)
        out.gauge("bmigrate_suspect", "1 while the volume is suspect.", bool(volume.get("suspect")), **labels)
    if not volume["attached"]:
        return
    test = volume.get("self_test") or {}
    out.gauge(
        "bmigrate_tracker_blind", "1 when the device wrote what the kernel module did not record.",
        test.get("state") == "blind", **labels,
    )  # fmt: skip
    out.gauge(
        "bmigrate_tracker_proven_age_seconds", "Since the log was last proved complete by the device's counters.",
        test.get("proven_age_seconds"), **labels,
    )  # fmt: skip
    for key, text in (
        ("size_bytes", "Size."),
        ("granule_bytes", "What one bit stands for."),
        ("dirty_bytes", "Bytes in dirty blocks."),
        ("claimed_bytes", "Bytes under way."),
        ("failed_bytes", "Bytes in blocks of failed writes."),
    ):
        out.gauge(f"bmigrate_volume_{key}", text, volume[key], **labels)
    for key, metric, text in (
        ("total_records", "records", "Records of the kernel's log."),
        ("written_bytes", "written_bytes", "Bytes written by the workload, by the log."),
        ("discarded_bytes", "discarded_bytes", "Bytes discarded by the workload, by the log."),
        ("widened_bytes", "widened_bytes", "Bytes of records that an overflow widened."),
        ("overflow_regions", "overflow_regions", "Regions set in the kernel's overflow map."),
        ("resync_count", "resyncs", "Resyncs of the volume."),
        ("seed_count", "seeds", "Full copies of the volume."),
    ):
        out.counter(f"bmigrate_volume_{metric}", text, volume.get(key), **labels)
