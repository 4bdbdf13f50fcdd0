# SPDX-License-Identifier: GPL-3.0-or-later
"""Text for people: bars, sizes, tables. Pure; it knows no socket and prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bmigrate.ship.verdict import human_bytes


def bar(done: float, total: float, width: int = 20) -> str:
    """``[#####-----]  50 %``; empty text when there is no total."""
    if total <= 0:
        return ""
    share = min(1.0, max(0.0, done / total))
    filled = int(share * width)
    return f"[{'#' * filled}{'-' * (width - filled)}] {share * 100:3.0f} %"


def size(count: float | None) -> str:
    """Bytes for people, ``-`` when unknown."""
    return "-" if count is None else human_bytes(count)


def rate(count: float | None) -> str:
    """Bytes per second for people, ``-`` when unknown."""
    return "-" if count is None else f"{human_bytes(count)}/s"


def seconds(count: float | None) -> str:
    """Seconds, minutes or hours for people, ``-`` when unknown."""
    if count is None:
        return "-"
    if count < 120:
        return f"{count:.1f} s"
    return f"{count / 60:.0f} min" if count < 7200 else f"{count / 3600:.1f} h"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns, the first as heading."""
    if not rows:
        return ""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def progress_of(entry: dict[str, Any]) -> str:
    """The bar of a shipper's status entry: the activity's own, else how much of the workload is durable."""
    own = entry.get("progress")
    if own:
        return bar(own["done_bytes"], own["total_bytes"])
    total, left = entry.get("total_bytes"), entry.get("bytes_left")
    if not total or left is None:
        return ""
    return bar(max(0, total - left), total)


def line_of(entry: dict[str, Any]) -> str:
    """One line of progress of a shipper's status entry."""
    parts = [entry["state"], progress_of(entry), f"left {size(entry.get('bytes_left'))}"]
    parts.append(f"dirty {rate(entry.get('dirty_rate_bytes_per_second'))}")
    parts.append(f"ships {rate(entry.get('ship_rate_bytes_per_second'))}")
    parts.append(f"lag {seconds(entry.get('lag_seconds'))}")
    if entry.get("reason"):
        parts.append(str(entry["reason"]))
    return "  ".join(part for part in parts if part)
