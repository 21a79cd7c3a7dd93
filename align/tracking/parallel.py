"""Runs as lines over upright axes, one for each setting in which they differ and one for the figure they are ranked by.

Inselberg 1985, doi:10.1007/BF01898350. Inline SVG, for a page of `align.tracking.page`.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from align.tracking.curves import tick_label

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 640, 260, 70, 40, 24
MOST_LABELS = 6
"""Of the values of an axis that are written beside it."""
LOGARITHMIC_FROM = 20.0
"""Largest over smallest value of an axis from which its scale is logarithmic, as for learning rates."""
STYLE = """
svg .axis { stroke: var(--soft); } svg .way { fill: none; stroke: var(--soft); stroke-opacity: .45; stroke-width: 1.5; }
svg .way.first { stroke: var(--accent); stroke-opacity: 1; stroke-width: 3; }
figure.scroll svg { max-width: none; }
svg text.value { paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
"""


def parallel_plot(axes: Mapping[str, Sequence[Any]], best: int) -> str:
    """axes: name -> the value of each run, None where a run has none. best: the run whose line is strong."""
    gap = (WIDTH - 2 * LEFT) / max(len(axes) - 1, 1)
    places = [_places(values) for values in axes.values()]
    parts = []
    for run in sorted(range(len(places[0])), key=lambda run: run == best):
        points = [
            f"{LEFT + gap * n:.1f} {at:.1f}" for n, column in enumerate(places) if (at := column[run]) is not None
        ]
        kind = "way first" if run == best else "way"
        parts.append(f'<path class="{kind}" d="M{"L".join(points)}"/>' if len(points) > 1 else "")
    for n, (name, values) in enumerate(axes.items()):
        parts += _axis(LEFT + gap * n, name, values, places[n], last=n == len(axes) - 1)
    says = escape(f"runs by {', '.join(axes)}", quote=True)
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{says}">'
    return "".join([opening, *parts, "</svg>"])


def _axis(x: float, name: str, values: Sequence[Any], places: Sequence[float | None], *, last: bool) -> list[str]:
    """last: its values are written on the outer side, where no line runs."""
    parts = [f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>']
    # The end of a dotted key says most, and its beginning is the same in most of them.
    short = name.rsplit(".", 1)[-1].rsplit(": ", 1)[-1]
    parts.append(f'<text x="{x:.1f}" y="16" text-anchor="middle">{escape(short)}<title>{escape(name)}</title></text>')
    known = {at: value for value, at in zip(values, places, strict=True) if at is not None}
    shown = sorted(known)
    if len(shown) > MOST_LABELS:
        shown = [shown[round(n * (len(shown) - 1) / (MOST_LABELS - 1))] for n in range(MOST_LABELS)]
    side, anchor = (6, "start") if last else (-6, "end")
    for at in shown:
        where = f'x="{x + side:.1f}" y="{at + 4:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text class="value" {where}>{escape(_words(known[at]))}</text>')
    return parts


def _places(values: Sequence[Any]) -> list[float | None]:
    """The pixel of each value: numbers by size, the largest on top; anything else evenly, in the order it comes in."""
    known = [value for value in values if value is not None]
    if known and all(_is_number(value) for value in known):
        numbers = [None if value is None else float(value) for value in values]
        lows = [number for number in numbers if number is not None]
        if min(lows) > 0 and max(lows) / min(lows) >= LOGARITHMIC_FROM:
            numbers = [None if number is None else math.log(number) for number in numbers]
        return _spread(numbers)
    kinds = list(dict.fromkeys(map(str, known)))
    return _spread([None if value is None else -float(kinds.index(str(value))) for value in values])


def _spread(numbers: Sequence[float | None]) -> list[float | None]:
    known = [number for number in numbers if number is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    ground, room = HEIGHT - BOTTOM - 10, HEIGHT - BOTTOM - TOP - 20
    # Where all are the same the line goes through the middle.
    return [
        None if number is None else ground - room * ((number - low) / (high - low) if high > low else 0.5)
        for number in numbers
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _words(value: Any) -> str:
    if _is_number(value):
        return tick_label(float(f"{value:.3g}"), _digits(float(f"{value:.3g}")))
    text = str(value).lower() if isinstance(value, bool) else str(value).rsplit("/", 1)[-1]
    return text if len(text) <= 12 else f"{text[:11]}\N{HORIZONTAL ELLIPSIS}"


def _digits(value: float) -> float:
    """The step between ticks that shows a value of three digits as it is."""
    text = f"{value:.3g}"
    if "e" in text:
        return abs(value) / 100 or 1.0
    return 10.0 ** -len(text.partition(".")[2])
