"""Drawings for a report, as SVG text: lines with intervals, and grids of shaded fields.

Written by hand so that a page holds them without a script or a font from outside. Drawn small
(440 units wide) and scaled up, so that their letters can be read on a telephone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from longwing.evals.table import Spot

WIDTH = 440
_LEFT, _RIGHT, _TOP, _PLOT = 46, 22, 14, 190
_LEGEND_ROW = 18
_SHIFT, _MOST_SHIFT = 2.4, 9.0  # between neighbouring lines, and of the outermost

OURS = ("#1f5fbf", "#d9480f", "#2b8a3e", "#862e9c", "#c2255c", "#0c8599", "#a16207", "#343a40")
_THEIRS = ("#9aa1a9", "#7b838c", "#5f666d", "#b4bac1")
_OUR_DASH = "5 2.5"
_SHORT_NAME = 24  # characters of a legend's entry that fit half the width
_DASHES = ("6 3", "2 3", "9 3 2 3", "4 2")

# Of a score: 0, a half, 1. Told apart by lightness too, and each field has its number.
_SHADES = ((194, 65, 12), (253, 230, 138), (21, 101, 92))


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart.

    Attributes:
        name: for the legend.
        points: (x, y, low, high); low and high are equal to y where there is no interval.
        colour: a number; lines of one number have one colour.
        dashed: drawn so, to stand beside another of its colour.
        published: drawn in grey and dashed, as somebody else's.
    """

    name: str
    points: Sequence[tuple[float, float, float, float]]
    colour: int = 0
    dashed: bool = False
    published: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_ticks: Sequence[tuple[float, str]],
    y_ticks: Sequence[tuple[float, str]],
    log_x: bool = False,
    x_name: str = "",
) -> str:
    """Lines over ticks; the ticks' ends are the chart's. Intervals are upright strokes.

    Lines with intervals stand a little beside each other, so that equal ones do not hide.
    """
    shifts = _shifts(lines)
    room = max(map(abs, shifts), default=0.0)
    x_low, x_high = x_ticks[0][0], x_ticks[-1][0]
    y_low, y_high = y_ticks[0][0], y_ticks[-1][0]

    def across(x: float) -> float:
        x, low, high = (math.log2(at) if log_x else at for at in (x, x_low, x_high))
        width = WIDTH - _LEFT - _RIGHT - 2 * room
        return _LEFT + room + width * (x - low) / ((high - low) or 1)

    def down(y: float) -> float:
        return _TOP + _PLOT * (1 - (min(max(y, y_low), y_high) - y_low) / ((y_high - y_low) or 1))

    bottom = _TOP + _PLOT
    parts = []
    for y, label in y_ticks:
        at = down(y)
        parts.append(_stroke(_LEFT, at, WIDTH - _RIGHT, at, "#e3e6ea"))
        parts.append(_text(_LEFT - 6, at + 4, label, "end"))
    for x, label in x_ticks:
        at = across(x)
        parts.append(_stroke(at, bottom, at, bottom + 4, "#9aa1a9"))
        parts.append(_text(at, bottom + 17, label, "middle"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, bottom + 34, x_name, "middle", "#5f666d"))
    legend = []
    for (line, colour, dash), shift in zip(_styled(lines), shifts, strict=True):
        places = [
            (across(x) + shift, down(y), down(low), down(high)) for x, y, low, high in line.points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in places)
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"'
            f' stroke-linejoin="round"{dashed}/>'
        )
        for x, y, low, high in places:
            if abs(high - low) > 0.5:
                parts.append(_stroke(x, low, x, high, colour, 'stroke-width="1" opacity="0.55"'))
            if len(places) <= 16:
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.8" fill="{colour}"/>')
        legend.append((line.name, colour, dashed))
    top = bottom + (52 if x_name else 32)
    named, height = _legend(legend, top)
    return _svg(title, top + height, [*parts, named])


def heat_map(title: str, spots: Sequence[Spot], columns: Sequence[tuple[str, int]]) -> str:
    """A grid of scores: lengths across, depth downwards from the start of the document.

    Args:
        title: read out, and shown when pointed at.
        spots: the fields; missing ones stay empty.
        columns: the spots' columns in order.
    """
    depths = sorted({spot.depth for spot in spots})
    width = (WIDTH - _LEFT - _RIGHT) / max(1, len(columns))
    height = 30
    parts = []
    for spot in spots:
        x = _LEFT + columns.index(spot.column) * width
        y = _TOP + depths.index(spot.depth) * height
        box = (
            f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{width - 2:.1f}" height="{height - 2}" rx="3"'
        )
        place = f"{column_name(spot.column)}, depth {spot.depth:.0%}"
        if spot.score is None:
            parts.append(f'<rect {box} fill="#eceff2"><title>{place}: too long</title></rect>')
            parts.append(_text(x + width / 2, y + 20, "too long" if width > 50 else "–", "middle"))
            continue
        note = f"{place}: {spot.score:.0%} of {spot.num_cases}"
        parts.append(f'<rect {box} fill="{_shade(spot.score)}"><title>{note}</title></rect>')
        ink = "#1b1f24" if 0.2 < spot.score < 0.85 else "#ffffff"
        parts.append(_text(x + width / 2, y + 20, f"{100 * spot.score:.0f}", "middle", ink))
    for number, depth in enumerate(depths):
        parts.append(_text(_LEFT - 6, _TOP + number * height + 19, f"{depth:.0%}", "end"))
    bottom = _TOP + height * len(depths)
    for number, column in enumerate(columns):
        middle = _LEFT + (number + 0.5) * width
        parts.append(_text(middle, bottom + 16, column_name(column, short=True), "middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    note = "length across, depth of what was asked for downwards; score in %"
    parts.append(_text(middle, bottom + 34, note, "middle", "#5f666d"))
    return _svg(title, bottom + 44, parts)


def column_name(column: tuple[str, int], *, short: bool = False) -> str:
    """A cell's size for a heading: "4k", "3,000", "5 topics", "12,000 characters"."""
    unit, size = column
    if unit == "tokens":
        return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"
    if unit == "":
        return "all"
    return f"{size:,}" if short else f"{size:,} {unit}"


def percent_ticks() -> list[tuple[float, str]]:
    """0 to 100 %."""
    return [(share / 100, f"{share} %") for share in (0, 25, 50, 75, 100)]


def even_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Round numbers around a range, about five."""
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-3)))
    for part in (0.2, 0.5, 1, 2, 5):
        if (high - low) / (step * part) <= 6:
            step *= part
            break
    first, last = math.floor(low / step), math.ceil(high / step)
    return [(at * step, f"{at * step:.3g}") for at in range(first, max(last, first + 1) + 1)]


def length_ticks(lengths: Sequence[float]) -> list[tuple[float, str]]:
    """Powers of two that hold the lengths between them."""
    low = int(2 ** math.floor(math.log2(min(lengths))))
    high = int(2 ** math.ceil(math.log2(max(*lengths, low + 1))))
    ticks = []
    while low <= high:
        ticks.append((float(low), column_name(("tokens", low))))
        low *= 2
    return ticks


def _shifts(lines: Sequence[Line]) -> list[float]:
    """How far to the right each line is drawn, in units; 0 for those without intervals."""
    marked = [any(low < high for _, _, low, high in line.points) for line in lines]
    count = sum(marked)
    step = min(_SHIFT, 2 * _MOST_SHIFT / max(1, count - 1))
    ranks = accumulate(marked)
    return [
        step * (rank - (count + 1) / 2) if own else 0.0
        for own, rank in zip(marked, ranks, strict=True)
    ]


def _styled(lines: Sequence[Line]) -> list[tuple[Line, str, str]]:
    """Each line with its colour and dashes."""
    styled = []
    theirs = 0
    for line in lines:
        if line.published:
            at = theirs % len(_THEIRS)
            styled.append((line, _THEIRS[at], _DASHES[at]))
            theirs += 1
        else:
            dash = _OUR_DASH if line.dashed else ""
            styled.append((line, OURS[line.colour % len(OURS)], dash))
    return styled


def _legend(entries: Sequence[tuple[str, str, str]], top: float) -> tuple[str, float]:
    """Names beside strokes, and the height they take; in two columns where they are short."""
    longest = max((len(name) for name, *_ in entries), default=0)
    columns = 2 if len(entries) > 3 and longest <= _SHORT_NAME else 1
    per_column = -(-len(entries) // columns)
    parts = []
    for number, (name, colour, dashed) in enumerate(entries):
        x = _LEFT + number // per_column * (WIDTH - _LEFT) / 2
        y = top + number % per_column * _LEGEND_ROW
        more = f'stroke-width="2.4"{dashed}'
        parts.append(_stroke(x, y, x + 26, y, colour, more))
        parts.append(_text(x + 34, y + 4, name, "start"))
    return "".join(parts), _LEGEND_ROW * per_column


def _shade(score: float) -> str:
    low, middle, high = _SHADES
    a, b, part = (low, middle, score * 2) if score < 0.5 else (middle, high, score * 2 - 1)
    mixed = (round(x + (y - x) * part) for x, y in zip(a, b, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _stroke(
    x1: float, y1: float, x2: float, y2: float, colour: str, more: str = 'stroke-width="1"'
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{colour}" {more}/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#343a40") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}"'
    return f"<text {place}>{escape(text)}</text>"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        f' font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>{"".join(parts)}</svg>'
    )
