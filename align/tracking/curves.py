"""Curves of a run as inline SVG, for a page of `align.tracking.page`: several series, both axes, light, dark and print.

A series is a list of points; a value that is not finite is a gap. Long series are drawn twice: faintly as they are,
and strongly as a running mean. Beside their colours series differ in their dashes, for paper without colour.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

STYLE = """
.series-2 { fill: var(--good); stroke: var(--good); } .series-3 { fill: var(--soft); stroke: var(--soft); }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .faint { stroke-width: 1; stroke-opacity: .35; } svg circle.faint { fill-opacity: .35; stroke: none; }
svg .curve.series-1:not(.faint) { stroke-dasharray: 6 4; } svg .curve.series-2:not(.faint) { stroke-dasharray: 1 4; }
svg .curve.series-3:not(.faint) { stroke-dasharray: 9 4 1 4; }
.item { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
svg line.zero { stroke: var(--soft); }
svg text.end { fill: var(--ink); stroke: var(--paper); stroke-width: 4px; paint-order: stroke; }
"""

Point = tuple[float, float]

# Narrow, so that the text can still be read where a telephone makes it narrower yet.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 240, 58, 20, 26, 38
# More points than these differ by less than a pixel and only make the page heavy.
MOST_POINTS = 300
# A series of so many points is drawn with its running mean, over this share of it.
SMOOTHED_FROM, SMOOTHED_SHARE = 40, 1 / 20


class Axis(NamedTuple):
    """Values `low` to `high` laid on pixels `start` to `end`, labelled at `ticks`, which are `step` apart."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    step: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def line_plot(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    include: Sequence[float] = (),
    marks: Sequence[float] = (),
) -> str:
    """One line a series, over x that grows. Returns an empty text if no point is finite.

    include: values that the upright axis shows whatever the points are. marks: places on the lower axis where
    something happened, as dashed uprights.
    """
    lines = {name: drawn(points) for name, points in series.items()}
    axes = _axes([point for points in series.values() for point in points], include)
    if axes is None:
        return ""
    parts = [_mark(place, axes) for place in marks if axes[0].low <= place <= axes[0].high]
    for place, (faint, strong) in enumerate(lines.values()):
        parts += [_curve(faint, axes, f"faint series-{place}")] if strong else []
        parts.append(_curve(strong or faint, axes, f"series-{place}"))
    return _frame(axes, parts, x_label, y_label, f"{' and '.join(series)} by {x_label}")


def path_plot(points: Sequence[Point], *, x_label: str, y_label: str, ends: tuple[str, str]) -> str:
    """The way through two figures in the order of the points: a dot each, a line along it, its ends named."""
    axes = _axes(points, ())
    if axes is None:
        return ""
    finite = [point for point in points if all(map(math.isfinite, point))]
    faint, strong = drawn(finite)
    way = strong or faint
    parts = [
        f'<circle class="faint series-0" cx="{axes[0].at(x)}" cy="{axes[1].at(y)}" r="2.5"/>'
        for x, y in thinned(finite)
    ]
    parts.append(_curve(way, axes, "series-0"))
    named = zip(ends, (way[0], way[-1]), strict=True) if len(way) > 1 else [(ends[0], way[0])]
    parts += [_end(name, point, axes) for name, point in named]
    return _frame(axes, parts, x_label, y_label, f"{y_label} against {x_label}")


def key(names: Sequence[str]) -> str:
    """What the lines of a plot stand for, as HTML."""
    sample = '<svg width="26" height="8" aria-hidden="true"><path class="curve series-{}" d="M2 4H24"/></svg>'
    items = (f"{sample.format(place)}&nbsp;{escape(name)}" for place, name in enumerate(names))
    return " &ensp; ".join(f'<span class="item">{item}</span>' for item in items)


def drawn_as(count: int) -> tuple[int, int]:
    """How many of `count` points one point of the faint line stands for, and how many one of the strong line."""
    chunk = math.ceil(count / MOST_POINTS) if count else 1
    kept = math.ceil(count / chunk)
    return chunk, chunk * _smoothing(kept) if kept >= SMOOTHED_FROM else chunk


def drawn(points: Sequence[Point]) -> tuple[list[Point], list[Point]]:
    """The faint and the strong line of a series; no strong one for a short series."""
    faint = thinned(points)
    if len(faint) < SMOOTHED_FROM:
        return faint, []
    half = _smoothing(len(faint)) // 2
    return faint, [_mean(faint[max(i - half, 0) : i + half + 1], faint[i]) for i in range(len(faint))]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means of as many neighbours as that takes."""
    chunk, _ = drawn_as(len(points))
    if chunk == 1:
        return list(points)
    return [_mean(points[i : i + chunk], None) for i in range(0, len(points), chunk)]


def nice_ticks(low: float, high: float, *, most: int, whole: bool = False) -> tuple[list[float], float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low to high, about `most` of them; their distance."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= raw * (1 - 1e-9))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)], step


def _smoothing(count: int) -> int:
    """Width of the running mean: odd, so that it has a middle."""
    return 2 * (int(count * SMOOTHED_SHARE) // 2) + 1


def _mean(points: Sequence[Point], place: Point | None) -> Point:
    """The mean of the finite ones of neighbouring points. At `place` it keeps that x, and that gap."""
    if place is not None and not all(map(math.isfinite, place)):
        return place
    finite = [point for point in points if all(map(math.isfinite, point))]
    if not finite:
        return points[0][0], math.nan
    x, y = (math.fsum(values) / len(finite) for values in zip(*finite, strict=True))
    return x, y


def _axes(points: Sequence[Point], include: Sequence[float]) -> tuple[Axis, Axis] | None:
    """The lower axis ends where the points do, the upright one at ticks."""
    finite = [point for point in points if all(map(math.isfinite, point))]
    if not finite:
        return None
    across, up = [x for x, _ in finite], [*(y for _, y in finite), *include]
    low, high = _spread(min(across), max(across))
    ticks, step = nice_ticks(low, high, most=6, whole=all(float(x).is_integer() for x in across))
    lower = Axis(low, high, LEFT, WIDTH - RIGHT, [tick for tick in ticks if low <= tick <= high], step)
    ticks, step = nice_ticks(*_spread(min(up), max(up)), most=4)
    return lower, Axis(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP, ticks, step)


def _spread(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, nor so narrow that the labels of its ticks would not fit."""
    if high - low > 1e-4 * max(abs(low), abs(high)):
        return low, high
    return (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)


def _frame(axes: tuple[Axis, Axis], parts: Sequence[str], x_label: str, y_label: str, says: str) -> str:
    lower, upright = axes
    levels = [
        f'<line{_zero(tick)} x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{upright.at(tick)}" y2="{upright.at(tick)}"/>'
        f'<text x="{LEFT - 6}" y="{upright.at(tick) + 4:.1f}" text-anchor="end">{tick_label(tick, upright.step)}</text>'
        for tick in upright.ticks
    ]
    ticks = [
        f'<text x="{lower.at(tick)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
        f"{tick_label(tick, lower.step)}</text>"
        for tick in lower.ticks
    ]
    names = [
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="4" y="12">{escape(y_label)}</text>',
    ]
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(says)}">'
    return "".join([opening, *levels, *ticks, *names, *parts, "</svg>"])


def tick_label(value: float, step: float) -> str:
    """A tick with as many digits as it needs to differ from the next one."""
    place = math.floor(math.log10(step) + 1e-9)
    if value and (max(abs(value), step) >= 1e6 or step < 1e-3):
        digits = max(math.floor(math.log10(abs(value)) + 1e-9) - place + 1, 1)
        text = f"{value:.{digits}g}".replace("e+0", "e").replace("e-0", "e-")
    else:
        text = f"{value:,.{max(-place, 0) if value else 0}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _zero(tick: float) -> str:
    return ' class="zero"' if tick == 0 else ""


def _curve(points: Sequence[Point], axes: tuple[Axis, Axis], classes: str) -> str:
    """A line through points, broken at gaps; a point between two gaps is a dot."""
    runs: list[list[str]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            runs[-1].append(f"{axes[0].at(x)} {axes[1].at(y)}")
        elif runs[-1]:
            runs.append([])
    path = "".join(f"M{'L'.join(run)}" for run in runs if len(run) > 1)
    dots = (
        '<circle class="{}" cx="{}" cy="{}" r="2.5"/>'.format(classes, *run[0].split()) for run in runs if len(run) == 1
    )
    return "".join([f'<path class="curve {classes}" d="{path}"/>' if path else "", *dots])


def _mark(place: float, axes: tuple[Axis, Axis]) -> str:
    x = axes[0].at(place)
    return f'<line class="limit" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _end(name: str, point: Point, axes: tuple[Axis, Axis]) -> str:
    """A named dot, its name on the side where there is room."""
    x, y = axes[0].at(point[0]), axes[1].at(point[1])
    anchor, shift = ("start", 7) if x < (LEFT + WIDTH) / 2 else ("end", -7)
    below = 16 if y < (TOP + HEIGHT - BOTTOM) / 2 else -8
    return (
        f'<circle class="series-0" cx="{x}" cy="{y}" r="4"/>'
        f'<text class="end" x="{x + shift:.1f}" y="{y + below:.1f}" text-anchor="{anchor}">{escape(name)}</text>'
    )
