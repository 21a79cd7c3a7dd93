"""Several runs as one HTML page: ranked by a figure, the settings in which they differ, curves over each other."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from align.config.schema import SweepBy
from align.tracking.curves import Point
from align.tracking.lineage import lineage
from align.tracking.page import Figure, Html, html, table
from align.tracking.parallel import STYLE, parallel_plot
from align.tracking.ranking import Cost, ranking, setting_text, settings_that_differ, short_labels
from align.tracking.report_figures import CURVES, Curve, headline_figures, points, verdict
from align.tracking.report_page import figure, framed, number_cell, tree_item
from align.tracking.run_folder import RunFolder

MOST_OVERLAID = 8
"""Lines that can still be told apart in one plot."""


def compare_page(runs: Sequence[RunFolder], by: SweepBy = SweepBy.auto, others: Sequence[str] = ()) -> str:
    """The whole page; each run under the shortest end of its path that is its own.

    by: what ranks them. others: of members of a sweep that have no place, a line each.
    """
    names = short_labels(runs)
    top = [f"<h1>{len(runs)} runs compared</h1>"]
    top += ["<ul>", *(_verdict_item(name, run) for name, run in zip(names, runs, strict=True)), "</ul>"]
    sections = [
        ("Ranking", _ranking(runs, names, by) + _without_place(others)),
        ("Figures", _figures(runs, names)),
        ("Settings that differ", _settings(runs, names)),
        ("Curves", _curves(runs, names)),
        ("Lineage", _lineages(runs, names)),
    ]
    return framed("Runs compared", top, sections, STYLE)


def _verdict_item(name: str, run: RunFolder) -> str:
    return f"<li><strong>{html(name)}</strong>: {html(verdict(run))}</li>"


def _without_place(others: Sequence[str]) -> list[str]:
    return ["<ul>", *(f"<li>{html(line)}</li>" for line in others), "</ul>"] if others else []


def _ranking(runs: Sequence[RunFolder], names: Sequence[str], by: SweepBy) -> list[str]:
    """A row a run with its settings that differ, as after a sweep, and their lines over these settings."""
    found = ranking(runs, by)
    if found is None:
        return []
    rows = [
        [
            Html(f'<span class="run">{html(names[place])}</span>'),
            number_cell(found.values[place], "{:.4g}"),
            *(_code(values[place], setting_text) for values in found.settings.values()),
            *(Figure(html(words)) for words in found.costs[place].words()),
        ]
        for place in found.places
    ]
    says = f"The best first, by {found.figure}; the figure of one run, without an interval."
    parts = [f'<p class="soft">{html(says)}</p>', table(["run", found.figure, *found.settings, *Cost.HEADER], rows)]
    if found.settings:
        plot = parallel_plot(found.settings | {found.figure: found.values}, found.places[0])
        caption = f"A line a run; the strong one is {names[found.places[0]]}, the first of the table."
        parts.append(f'<figure class="scroll">{plot}<figcaption>{html(caption)}</figcaption></figure>')
    return parts


def _figures(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    """A row a figure, a column a run: of many figures and few runs the narrower table."""
    found = [headline_figures(run) for run in runs]
    keys = list(dict.fromkeys(key for figures in found for key in figures))
    rows = [[key, *(number_cell(figures.get(key), "{:.4g}") for figures in found)] for key in keys]
    return [table(["figure", *names], rows)] if rows else []


def _settings(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    differing = settings_that_differ(runs)
    if not differing:
        return ['<p class="soft">None: their configs are the same, but for where they lie and log.</p>']
    rows = [
        [Html(f"<code>{html(key)}</code>"), *(_code(value, json.dumps) for value in values)]
        for key, values in differing.items()
    ]
    return [table(["key", *names], rows)]


def _code(value: Any, words: Callable[[Any], str]) -> Html:
    text = "\N{EN DASH}" if value is None else value if isinstance(value, str) else words(value)
    return Html(f"<code>{html(text)}</code>")


def _curves(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    overlaid = list(zip(names, runs, strict=True))[:MOST_OVERLAID]
    left_out = f"Of {len(runs)} runs the first {MOST_OVERLAID} are drawn." if len(runs) > MOST_OVERLAID else ""
    parts = [f'<p class="soft">{left_out}</p>'] if left_out else []
    for stage in dict.fromkeys(stage.name for _, run in overlaid for stage in run.stages):
        plots = [plot for curve in CURVES for plot in _plots(curve, stage, overlaid)]
        if plots:
            parts += [f"<h3>{html(stage)}</h3>", f'<div class="curves">{"".join(plots)}</div>']
    return parts


def _plots(curve: Curve, stage: str, overlaid: Sequence[tuple[str, RunFolder]]) -> list[str]:
    """A plot for each line of a curve, with a line a run, where at least two runs have one of two points."""
    plots = []
    for label, figures in curve.names.items():
        series: dict[str, list[Point]] = {}
        for name, run in overlaid:
            lines = next((s.lines for s in run.stages if s.name == stage), [])
            found = points(lines, figures)
            if found:
                series[name] = found
        if len(series) > 1:
            title = curve.title if len(curve.names) == 1 else f"{curve.title}, {label}"
            plots.append(figure(curve._replace(title=title, says=""), series, "step"))
    return plots


def _lineages(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    parts = []
    for name, run in zip(names, runs, strict=True):
        parts += [f"<h3>{html(name)}</h3>", f'<ul class="tree">{"".join(map(tree_item, lineage(run)))}</ul>']
    return parts
