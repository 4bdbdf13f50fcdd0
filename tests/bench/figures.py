# SPDX-License-Identifier: GPL-3.0-or-later
"""What is made of the runs: medians, intervals, the table, the plot. Pure: values in, values or text out."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

RESAMPLES = 5000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A median and the interval in which it lies with a confidence of 95 %."""

    middle: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """`1.13 (1.10 … 1.17)`."""
        # Adding 0 takes the sign from a zero.
        middle, low, high = (round(value, digits) + 0.0 for value in (self.middle, self.low, self.high))
        return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def estimate(values: Sequence[float], seed: int = 1) -> Estimate:
    """The median of values, and its interval by the percentile bootstrap.

    Nothing is assumed about how the values are distributed: on an emulator a few of them lie far out.
    Raises ValueError: fewer than 2 values.
    """
    if len(values) < 2:
        raise ValueError("an interval needs two values")
    generator = random.Random(seed)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    low, high = medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]
    return Estimate(statistics.median(values), low, high)


def paired(ones: Sequence[float], others: Sequence[float], kind: str) -> list[float]:
    """Each of `ones` against the one of `others` of the same round: `difference`, `ratio`, or `percent` more.

    Raises ValueError: not as many of the one as of the other, or another kind.
    """
    if len(ones) != len(others):
        raise ValueError(f"{len(ones)} values against {len(others)}")
    if kind == "difference":
        return [one - other for one, other in zip(ones, others)]
    if kind == "ratio":
        return [one / other for one, other in zip(ones, others)]
    if kind == "percent":
        return [100 * (one / other - 1) for one, other in zip(ones, others)]
    raise ValueError(kind)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        numbers = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:])]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *numbers]) + " |"

    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


@dataclass(frozen=True)
class Bar:
    """One line of a plot; `estimate` in the units of its panel."""

    label: str
    estimate: Estimate
    text: str


@dataclass(frozen=True)
class Panel:
    """A part of the plot: bars from zero to `top`; `mark` is a value that all are compared with."""

    title: str
    bars: Sequence[Bar]
    top: float
    mark: float
    mark_text: str


_LEFT, _WIDTH, _LINE, _BAR = 250, 380, 24, 13


def plot(title: str, panels: Sequence[Panel]) -> str:
    """An SVG picture: a line for each bar, its interval as a whisker."""
    body: list[str] = []
    y = 40
    for panel in panels:
        scale = _WIDTH / panel.top
        body.append(f'<text x="16" y="{y + 16}" class="head">{escape(panel.title)}</text>')
        top = y + 26
        y = top + 8
        for bar in panel.bars:
            low, middle, high = (
                _LEFT + scale * min(max(value, 0), panel.top)
                for value in (bar.estimate.low, bar.estimate.middle, bar.estimate.high)
            )
            centre = y + _BAR / 2
            body.append(f'<text x="{_LEFT - 8}" y="{centre + 4:.1f}" class="label">{escape(bar.label)}</text>')
            body.append(f'<rect x="{_LEFT}" y="{y}" width="{middle - _LEFT:.1f}" height="{_BAR}" class="bar"/>')
            body.append(f'<path d="M{low:.1f} {centre:.1f}H{high:.1f}" class="whisker"/>')
            body.append(f'<text x="{_LEFT + _WIDTH + 12}" y="{centre + 4:.1f}">{escape(bar.text)}</text>')
            y += _LINE
        at = _LEFT + scale * panel.mark
        body.append(f'<path d="M{_LEFT} {top}V{y}" class="axis"/><path d="M{at:.1f} {top}V{y}" class="mark"/>')
        body.append(f'<text x="{at:.1f}" y="{y + 12}" class="note">{escape(panel.mark_text)}</text>')
        y += 28
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        "<!-- SPDX-License-Identifier: GPL-3.0-or-later -->\n"
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 {y}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>.head { font-weight: bold; font-size: 13px } .label { text-anchor: end } .bar { fill: #6c8ebf } "
        ".whisker { stroke: #1b2a41; stroke-width: 2 } .axis { stroke: #8795a8 } "
        ".mark { stroke: #b85450; stroke-dasharray: 4 3 } .note { fill: #b85450; text-anchor: middle; font-size: 11px }"
        "</style>\n"
        f'<rect width="860" height="{y}" fill="#ffffff"/>\n'
        f'<text x="16" y="24" font-size="15">{escape(title)}</text>\n' + "\n".join(body) + "\n</svg>\n"
    )


@dataclass(frozen=True)
class Curve:
    """A line of points (x, y), ascending in x.

    Attributes:
        model_of: the number of the curve whose model this is: dashed, in its colour, without a line in the legend.
    """

    label: str
    points: Sequence[tuple[float, float]]
    model_of: int | None = None


_COLOURS = ("#6c8ebf", "#b85450", "#82b366", "#9673a6", "#d79b00")


def curves(title: str, across: str, up: str, drawn: Sequence[Curve]) -> str:
    """An SVG picture of lines over common axes that begin at zero.

    Raises ValueError: there is nothing to draw.
    """
    points = [point for curve in drawn for point in curve.points]
    if not points:
        raise ValueError("no points")
    right, high = max(x for x, _ in points) or 1.0, max(y for _, y in points) or 1.0
    left, top, width, height = 70, 50, 560, 260
    body = [
        f'<path d="M{left} {top}V{top + height}H{left + width}" class="axis"/>',
        f'<text x="{left + width / 2}" y="{top + height + 36}" class="mid">{escape(across)}</text>',
        f'<text x="16" y="{top - 10}">{escape(up)}</text>',
    ]
    for part in range(5):
        x, y = left + width * part / 4, top + height * (1 - part / 4)
        body.append(f'<text x="{x:.1f}" y="{top + height + 18}" class="mid">{right * part / 4:.3g}</text>')
        body.append(f'<text x="{left - 8}" y="{y + 4:.1f}" class="end">{high * part / 4:.3g}</text>')
    legend = 0
    for number, curve in enumerate(drawn):
        colour = _COLOURS[(number if curve.model_of is None else curve.model_of) % len(_COLOURS)]
        dashes = "" if curve.model_of is None else ' stroke-dasharray="5 3"'
        path = " ".join(f"{left + width * x / right:.1f},{top + height * (1 - y / high):.1f}" for x, y in curve.points)
        body.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dashes}/>')
        if curve.model_of is not None:
            continue
        y = top + 10 + 18 * legend
        legend += 1
        body.append(f'<path d="M{left + width - 190} {y}h20" stroke="{colour}" stroke-width="3"/>')
        body.append(f'<text x="{left + width - 164}" y="{y + 4}">{escape(curve.label)}</text>')
    if any(curve.model_of is not None for curve in drawn):
        body.append(f'<text x="{left + width - 164}" y="{top + 14 + 18 * legend}">dashed: the model of each</text>')
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        "<!-- SPDX-License-Identifier: GPL-3.0-or-later -->\n"
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 360" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">\n'
        f"<title>{escape(title)}</title>\n"
        "<style>.axis { stroke: #8795a8; fill: none } .mid { text-anchor: middle } .end { text-anchor: end }</style>\n"
        f'<rect width="680" height="360" fill="#ffffff"/>\n<text x="16" y="24" font-size="15">{escape(title)}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def spread(ratios: list[float]) -> str:
    """Median, quartiles and extremes of ratios."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"median {middle:.3f}, quartiles {low:.3f} to {high:.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
