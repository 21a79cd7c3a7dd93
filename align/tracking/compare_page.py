"""Several runs as one HTML page: ranked by a figure, the settings in which they differ, curves over each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from align.tracking.curves import Point
from align.tracking.lineage import lineage
from align.tracking.page import Html, html, table
from align.tracking.report_figures import CURVES, Curve, headline_figures, points, verdict
from align.tracking.report_page import figure, framed, number_cell, tree_item
from align.tracking.run_folder import RunFolder

MOST_OVERLAID = 8
"""Lines that can still be told apart in one plot."""
MOST_RANKED_SETTINGS = 6
"""Beside a ranking; more of them make no table that can be read."""
RANKED_BY = (
    ("evaluated: win.rate", 1),
    ("evaluated: helpful", 1),
    ("score of held-out prompts", 1),
    ("held-out loss", -1),
)
"""How figures end by which runs are ranked, the first that all have; 1: more is better."""
NOT_A_SETTING = ("run_dir", "cache_dir", "do", "out", "report", "plan", "launch", "log")


def compare_page(runs: Sequence[RunFolder]) -> str:
    """The whole page; each run under the shortest end of its path that is its own."""
    names = labels(runs)
    top = [f"<h1>{len(runs)} runs compared</h1>"]
    top += ["<ul>", *(_verdict_item(name, run) for name, run in zip(names, runs, strict=True)), "</ul>"]
    sections = [
        ("Ranking", _ranking(runs, names)),
        ("Figures", _figures(runs, names)),
        ("Settings that differ", _settings(runs, names)),
        ("Curves", _curves(runs, names)),
        ("Lineage", _lineages(runs, names)),
    ]
    return framed("Runs compared", top, sections)


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """The last folder of each path, with as many above it as it takes to tell them apart."""
    paths = [run.folder.absolute().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        found = ["/".join(parts[-count:]) for parts in paths]
        if len(set(found)) == len(found):
            break
    return found


def _verdict_item(name: str, run: RunFolder) -> str:
    return f"<li><strong>{html(name)}</strong>: {html(verdict(run))}</li>"


def ranked(runs: Sequence[RunFolder]) -> tuple[str, list[int]] | None:
    """The figure that all runs have, of the same rows, by which they are ranked, and their places in `runs`, the best
    first."""
    found = [headline_figures(run) for run in runs]
    for name, better in RANKED_BY:
        keys = [key for key in found[0] if key.endswith(name) and all(key in figures for figures in found)]
        keys = [key for key in keys if _same_rows(runs, key.split(":")[0].replace("evaluated", "evaluate"))]
        if keys:
            # Of stages that all ran the last one counts.
            of_runs = [figures[keys[-1]] for figures in found]
            return keys[-1], sorted(range(len(runs)), key=lambda place: better * of_runs[place], reverse=True)
    return None


def _same_rows(runs: Sequence[RunFolder], stage: str) -> bool:
    """Whether a stage read the same rows in all runs: losses on other rows say nothing about each other."""
    read = [
        {
            entry["digest"]
            for s in run.stages
            if s.name == stage
            for entry in s.manifest.inputs
            if "data." in entry["name"]
        }
        for run in runs
    ]
    return all(digests == read[0] for digests in read)


def _ranking(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    """A row a run with its settings that differ, as after a sweep."""
    order = ranked(runs)
    if order is None:
        return []
    figure, places = order
    differing = {key: values for key, values in settings_that_differ(runs).items() if key not in ("name", "run")}
    if len(differing) > MOST_RANKED_SETTINGS:
        differing = {}
    rows = [
        [
            Html(f'<span class="run">{html(names[place])}</span>'),
            number_cell(headline_figures(runs[place])[figure], "{:.4g}"),
            *(_setting(values[place]) for values in differing.values()),
        ]
        for place in places
    ]
    says = f"The best first, by {figure}; the figure of one run, without an interval."
    return [f'<p class="soft">{html(says)}</p>', table(["run", figure, *differing], rows)]


def _figures(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    """A row a figure, a column a run: of many figures and few runs the narrower table."""
    found = [headline_figures(run) for run in runs]
    keys = list(dict.fromkeys(key for figures in found for key in figures))
    rows = [[key, *(number_cell(figures.get(key), "{:.4g}") for figures in found)] for key in keys]
    return [table(["figure", *names], rows)] if rows else []


def settings_that_differ(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Dotted key -> its value in each run, for those not the same in all that have the key; None in those without it,
    such as a setting of a stage that they did not run."""
    flat = [_flat(_settings_of(run)) for run in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    had = {key: [settings[key] for settings in flat if key in settings] for key in keys}
    differing = [key for key, values in had.items() if any(value != values[0] for value in values)]
    return {key: [settings.get(key) for settings in flat] for key in differing}


def _settings_of(run: RunFolder) -> dict[str, Any]:
    """The config of the run without what makes no other model, its own folder's place taken out; stages from their
    own launches."""
    last = run.stages[-1].config
    kept = {key: value for key, value in last.items() if key not in NOT_A_SETTING}
    kept["stages"] = {
        stage.name: (stage.config.get("stages") or {}).get(stage.name)
        or stage.manifest.config.get("stages", {}).get(stage.name)
        for stage in run.stages
    }
    read: dict[str, Any] = {}
    for stage in run.stages:
        # Of the slots a manifest has only those that its stage read.
        read |= stage.manifest.config.get("data") or {}
    kept["data"] = read
    return _without(kept, str(last.get("run_dir", "")))


def _without(value: Any, run_dir: str) -> Any:
    if isinstance(value, dict):
        return {key: _without(inner, run_dir) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without(inner, run_dir) for inner in value]
    return value.replace(run_dir, "<run_dir>") if isinstance(value, str) and run_dir else value


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, inner in value.items():
        items |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) and inner else {f"{prefix}{key}": inner}
    return items


def _settings(runs: Sequence[RunFolder], names: Sequence[str]) -> list[str]:
    differing = settings_that_differ(runs)
    if not differing:
        return ['<p class="soft">None: their configs are the same, but for where they lie and log.</p>']
    rows = [[Html(f"<code>{html(key)}</code>"), *map(_setting, values)] for key, values in differing.items()]
    return [table(["key", *names], rows)]


def _setting(value: Any) -> Html:
    text = "\N{EN DASH}" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
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
