# SPDX-License-Identifier: GPL-3.0-or-later
"""What `bmigrate status --watch` draws: workloads, bars, and a map of each device with its dirty regions.

Pure but for ``Live``: a picture is made of what `collect` and breqd's map operation said. Drawn with rich where it is
installed (Debian: python3-rich); the caller falls back to plain text where it is not.
"""

from __future__ import annotations

import time
from typing import Any, Callable

from bmigrate.cli import bars

#: Share of dirty granules in a cell, from none to all.
SHADES = " .:-=+*%#@"
CLAIMED = "~"
CELLS = 960
STYLES = {
    "in_step": "green",
    "seeding": "cyan",
    "catching_up": "cyan",
    "resyncing": "cyan",
    "draining": "cyan",
    "sealed": "cyan",
    "idle": "dim",
    "paused": "yellow",
    "losing_ground": "bold red",
    "suspect": "bold red",
    "disconnected": "bold red",
}
LEGEND = (
    "map: each cell is a part of the device; the darker, the more of it is dirty; ~ is on its way; blank is durable"
)


def eta_seconds(ship: dict[str, Any]) -> float | None:
    """When nothing would be left at the present rates, in seconds; None when it is not in sight or not known."""
    own = ship.get("progress")
    left = own["total_bytes"] - own["done_bytes"] if own else ship.get("bytes_left")
    rate = (ship.get("ship_rate_bytes_per_second") or 0.0) - (ship.get("dirty_rate_bytes_per_second") or 0.0)
    if left is None:
        return None
    if left <= 0:
        return 0.0
    return left / rate if rate > 0 else None


def shades(picture: dict[str, Any]) -> str:
    """One character per cell of breqd's answer: blank, CLAIMED, or a shade."""
    total = max(1, picture["cell_bytes"] // picture["granule_bytes"])
    text = []
    for dirty, claimed in zip(picture["dirty"], picture["claimed"]):
        if dirty:
            # Any dirty granule at all is seen: a single block of a terabyte must not round to nothing.
            level = max(1, min(len(SHADES) - 1, round(dirty / total * (len(SHADES) - 1))))
            text.append(SHADES[level])
        else:
            text.append(CLAIMED if claimed else SHADES[0])
    return "".join(text)


def rows_of(text: str, width: int) -> list[str]:
    """A map cut into lines."""
    return [text[start : start + width] for start in range(0, len(text), max(1, width))]


class Live:
    """Shows workloads until interrupted.

    Args:
        collect: what `bmigrate status --json` would print as data.
        notes: the notes under the table, of that data.
        picture: (workload, volume, cells) -> breqd's answer, or None when there is none.

    Raises:
        ImportError: rich is not installed.
    """

    def __init__(
        self,
        collect: Callable[[], dict[str, Any]],
        notes: Callable[[dict[str, Any]], list[str]],
        picture: Callable[[str, str, int], dict[str, Any] | None],
    ) -> None:
        import rich.console
        import rich.live

        self._collect, self._notes, self._picture = collect, notes, picture
        self.console = rich.console.Console()

    def run(self, interval_seconds: float = 1.0) -> None:
        """Draw again and again."""
        from rich.live import Live as Screen

        with Screen(console=self.console, screen=self.console.is_terminal, auto_refresh=False) as screen:
            while True:
                screen.update(self.view(self._collect()), refresh=True)
                time.sleep(interval_seconds)

    def view(self, data: dict[str, Any]) -> Any:
        """Everything, as one thing that rich can draw."""
        from rich.console import Group
        from rich.text import Text

        parts: list[Any] = [self._table(data)]
        for item in data["workloads"]:
            parts += self._maps(item)
        notes = self._notes(data)
        if notes:
            parts.append(Text("\n".join(notes), style="yellow"))
        return Group(*parts)

    def _table(self, data: dict[str, Any]) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, expand=False)
        for name in ("workload", "role", "gen", "state", "durable", "", "left", "dirty", "ships", "lag", "eta"):
            table.add_column(name, no_wrap=True)
        for name in ("drain", "limited by"):
            table.add_column(name)
        for item in data["workloads"]:
            ship = item["ship"] or {}
            state = ship.get("state", "-")
            done, total = _progress(ship)
            limit = ship.get("limiter") or "-"
            if ship.get("bandwidth_bytes_per_second"):
                limit += f" (limit {bars.rate(ship['bandwidth_bytes_per_second'])})"
            table.add_row(
                item["workload"],
                item["role"],
                str(item["generation"]["number"]) if item["generation"] else "-",
                Text(state, style=STYLES.get(state, "")),
                ProgressBar(total=max(total, 1), completed=done, width=16),
                f"{done / total * 100:5.1f} %" if total else "-",
                bars.size(ship.get("bytes_left")),
                bars.rate(ship.get("dirty_rate_bytes_per_second")),
                bars.rate(ship.get("ship_rate_bytes_per_second")),
                bars.seconds(ship.get("lag_seconds")),
                bars.seconds(eta_seconds(ship)),
                bars.seconds(ship.get("predicted_drain_seconds")),
                limit,
            )
        return table

    def _maps(self, item: dict[str, Any]) -> list[Any]:
        from rich.panel import Panel
        from rich.text import Text

        parts: list[Any] = []
        width = max(16, self.console.width - 4)
        for volume in item["tracking"]:
            picture = self._picture(item["workload"], volume["volume"], CELLS)
            if picture is None:
                continue
            text = shades(picture)
            # Cells beyond the map of a small volume: the same map, drawn wider.
            if len(text) < width:
                text = "".join(letter * (width // len(text)) for letter in text)
            title = f"{item['workload']}/{volume['volume']}  {bars.size(volume['size_bytes'])}"
            title += f"  dirty {bars.size(volume['dirty_bytes'])}  under way {bars.size(volume['claimed_bytes'])}"
            style = "red" if volume.get("suspect") else "cyan"
            body = Text("\n".join(rows_of(text, width)), style=style)
            parts.append(Panel(body, title=title, title_align="left", subtitle=LEGEND, subtitle_align="left"))
        return parts


def _progress(ship: dict[str, Any]) -> tuple[int, int]:
    own = ship.get("progress")
    if own:
        return int(own["done_bytes"]), int(own["total_bytes"])
    total, left = ship.get("total_bytes"), ship.get("bytes_left")
    return (0, 0) if not total or left is None else (max(0, int(total) - int(left)), int(total))
