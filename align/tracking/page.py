"""The frame and parts of every HTML page that is written: no network, light and dark, for a phone and for paper."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import zip_longest

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #5f6670; --paper: #ffffff; --line: #d9dde3; --fill: #f4f6f8;
  --accent: #2b6cb0; --warn: #b45309; --good: #2f7d4f; --bad: #b3261e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ad; --paper: #16181b; --line: #34383e; --fill: #1f2226;
    --accent: #7ab0ea; --warn: #e0a458; --good: #7cc79a; --bad: #f28b82; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p.soft, .soft { color: var(--soft); } .warn { color: var(--warn); } .good { color: var(--good); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
tr > :last-child { padding-right: 0; } td.number, th.number { text-align: right; }
code, pre { font: 13px/1.5 ui-monospace, monospace; } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  padding: .75rem; background: var(--fill); border: 1px solid var(--line); border-radius: 6px; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); } svg line { stroke: var(--line); }
svg .limit { stroke: var(--bad); stroke-dasharray: 4 3; } svg text.limit { fill: var(--bad); stroke: none; }
.series-0 { fill: var(--accent); stroke: var(--accent); color: var(--accent); }
.series-1 { fill: var(--warn); stroke: var(--warn); color: var(--warn); } path { fill-opacity: .25; stroke-width: 1.5; }
figure { margin: 1rem 0; } figcaption { color: var(--soft); font-size: .875rem; } svg { max-width: 100%; height: auto; }
@media print { :root { color-scheme: light; } body { max-width: none; } h2 { break-after: avoid; }
  tr { break-inside: avoid; } }
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole document. `title` is text; `body` and `style` are HTML and CSS that the caller has escaped."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into a page."""


class Figure(Html):
    """A number already written out: it stands to the right in a table."""


def html(text: object) -> str:
    """Text as HTML; numbers with their thousands apart."""
    if isinstance(text, Html):
        return text
    return escape(f"{text:,}" if isinstance(text, int | float) else str(text))


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table that scrolls by itself on a narrow screen. Numbers stand to the right, under a header that does too."""
    numeric = [
        bool(rows) and all(isinstance(row[n], int | float | Figure) for row in rows) for n in range(len(headers))
    ]

    def line(cells: Sequence[object], tag: str) -> str:
        classes = [' class="number"' if number else "" for number in numeric]
        return "".join(f"<{tag}{c}>{html(cell)}</{tag}>" for c, cell in zip(classes, cells, strict=True))

    body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows)
    head = f"<thead><tr>{line(headers, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>'


WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 220, 48, 40, 24


def histogram(
    series: Mapping[str, Sequence[int]], bin_width: int, *, unit: str, open_end: bool = False, limit: int | None = None
) -> str:
    """Counts of several series over bins that start at 0, laid over each other, as one SVG.

    `open_end`: the last bin holds all that is longer. `limit`: a line at this value, if it is on the scale.
    """
    bins = max(map(len, series.values()))
    highest = max(max(counts) for counts in series.values())
    across, up = (WIDTH - LEFT - 8) / bins, (HEIGHT - TOP - BOTTOM) / max(highest, 1)
    label = escape(f"{' and '.join(series)}: rows by {unit}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{label}">']
    parts += [_level(value, up) for value in (0, highest // 2, highest) if value or highest]
    parts += [_area(counts, bins, across, up, place) for place, counts in enumerate(series.values())]
    parts += _ticks(bins, bin_width, across, open_end)
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{escape(unit)}</text>')
    if limit is not None and limit <= (bins - open_end) * bin_width:
        x = LEFT + limit / bin_width * across
        parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        side = "middle" if x < WIDTH - 50 else "end"
        parts.append(f'<text class="limit" x="{x:.1f}" y="{TOP - 8}" text-anchor="{side}">limit {limit:,}</text>')
    return "".join([*parts, "</svg>"])


def legend(names: Sequence[str]) -> str:
    """What the colours of a histogram stand for."""
    return " ".join(f'<span class="series-{n}">&#9632;</span>&nbsp;{html(name)}' for n, name in enumerate(names))


def _area(counts: Sequence[int], bins: int, across: float, up: float, place: int) -> str:
    """A stepped area: flat over each bin."""
    ground = HEIGHT - BOTTOM
    path = [f"M{LEFT} {ground}"]
    for index, (count, _) in enumerate(zip_longest(counts, range(bins), fillvalue=0)):
        path.append(f"V{ground - count * up:.1f}H{LEFT + (index + 1) * across:.1f}")
    return f'<path class="series-{place}" d="{"".join(path)}V{ground}Z"/>'


def _level(value: int, up: float) -> str:
    y = HEIGHT - BOTTOM - value * up
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,}</text>'
    )


def _ticks(bins: int, bin_width: int, across: float, open_end: bool) -> list[str]:
    """About six labelled places on the lower axis."""
    step = max(round(bins / 6), 1)
    places = [place for place in range(0, bins + 1, step) if not (open_end and place == bins)]
    return [
        f'<text x="{LEFT + place * across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
        f"{place * bin_width:,}{'+' if open_end and place == bins - 1 else ''}</text>"
        for place in places
    ]
