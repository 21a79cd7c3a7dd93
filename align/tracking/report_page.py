"""A run as one HTML page: verdict, chain, where the model comes from, figures, curves, samples, rows, versions."""

from collections.abc import Mapping, Sequence
from html import escape

import yaml

from align.distributed.memory import size_words
from align.tracking import curves
from align.tracking.lineage import SHOWN_DIGITS, Node, lineage
from align.tracking.page import Figure, Html, html, page, table
from align.tracking.report_figures import (
    CURVES,
    MEASURED,
    ORACLE,
    Curve,
    Estimated,
    changes,
    model_figures,
    oracle_figures,
    oracle_words,
    other_figures,
    points,
    shown,
    speed,
    verdict,
    verdicts,
)
from align.tracking.report_labels import label_tables
from align.tracking.report_samples import reply_samples, update_samples
from align.tracking.run_folder import RunFolder, StageFolder

STYLE = (
    curves.STYLE
    + """
.series-2 { color: var(--good); } .series-3 { color: var(--soft); }
.series-4 { fill: var(--bad); stroke: var(--bad); } .series-5 { fill: #8e5bb5; stroke: #8e5bb5; }
.series-6 { fill: #0d8a8a; stroke: #0d8a8a; } .series-7 { fill: #a3722c; stroke: #a3722c; }
svg .curve.series-5:not(.faint) { stroke-dasharray: 6 4; } svg .curve.series-6:not(.faint) { stroke-dasharray: 1 4; }
svg .curve.series-7:not(.faint) { stroke-dasharray: 9 4 1 4; }
.verdict { font-size: 1.25rem; font-weight: 600; margin: .5rem 0 .75rem; overflow-wrap: anywhere; }
.run { white-space: nowrap; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: 1rem 0; font-size: .875rem; }
a { color: var(--accent); overflow-wrap: anywhere; }
.curves, .replies { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.curves figure { margin: 0 0 1.25rem; } .curves h4 { margin: .5rem 0 0; font-size: .9375rem; }
.curves figure > svg { width: 100%; max-width: 30rem; } .curves .key { color: var(--ink); }
.replies { grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)); gap: .25rem .75rem; }
.sample { border-top: 1px solid var(--line); padding: .5rem 0 1rem; }
.sample h4 { margin: .5rem 0 .25rem; font-size: .8125rem; color: var(--soft); font-weight: 600; }
.same pre { color: var(--soft); }
.settings { columns: 2 20rem; column-gap: 1.5rem; } .settings > div { break-inside: avoid; }
.settings h4 { margin: .75rem 0 .25rem; font-size: .9375rem; }
.tree, .tree ul { list-style: none; margin: 0; padding: 0; }
.tree ul { margin-left: .45rem; padding-left: .9rem; border-left: 1px solid var(--line); }
.tree li { padding: .2rem 0; overflow-wrap: anywhere; } .tree code { color: var(--soft); }
.chain { display: flex; flex-wrap: wrap; gap: .5rem; padding: 0; margin: .5rem 0 1rem; list-style: none; }
.chain li { background: var(--fill); border: 1px solid var(--line); border-radius: 6px; padding: .35rem .7rem; }
.chain li + li::before { content: "\\2192"; color: var(--soft); margin-right: .5rem; }
.chain .soft { display: block; font-size: .8125rem; }
td { overflow-wrap: break-word; } td code { overflow-wrap: break-word; }
@media screen { .sample pre { max-height: 18rem; overflow-y: auto; } }
@media print { body { font-size: 11px; } nav { display: none; } figure, .sample, .tree li li { break-inside: avoid; }
  h3, h4, p.soft { break-after: avoid; } .curves { grid-template-columns: 1fr 1fr; } a { color: inherit; }
  .scroll { overflow: visible; } }
"""
)


def report_page(run: RunFolder) -> str:
    """The whole page. Sections without anything to show are left out."""
    sections = [
        ("Chain", _chain(run)),
        ("Lineage", _lineage(run)),
        ("Before and after", _changes(run)),
        ("Models on the same prompts", _models(run)),
        ("Labels", label_tables(run.classified)),
        ("Curves", _curves(run)),
        ("Samples", [*reply_samples(run.evaluated), *(part for s in run.stages for part in update_samples(s))]),
        ("Rows", _rows(run)),
        ("Other figures", _others(run)),
        ("Memory and speed", _speed(run)),
        ("Commands", _commands(run)),
        ("Settings", _settings(run)),
        ("Versions", _versions(run)),
    ]
    top = [f"<h1>{html(run.name)}</h1>", f'<p class="soft"><code>{html(run.folder)}</code></p>']
    top.append(f'<p class="verdict">{html(verdict(run))}</p>')
    if run.evaluated is not None and verdicts(run.evaluated):
        top += [f"<p>By the rules of the embedded world: {html(line)}</p>" for line in oracle_words(run.evaluated)]
    return framed(f"{run.name}: report", top, sections)


def framed(title: str, top: Sequence[str], sections: Sequence[tuple[str, Sequence[str]]], style: str = "") -> str:
    """A page of titled sections with links to each; those without content are left out. style: rules of its own."""
    filled = [(name, parts) for name, parts in sections if parts]
    links = "".join(f'<a href="#{_anchor(name)}">{html(name)}</a>' for name, _ in filled)
    body = [*top, f"<nav>{links}</nav>"]
    for name, parts in filled:
        body += [f'<h2 id="{_anchor(name)}">{html(name)}</h2>', *parts]
    return page(title, "\n".join(body), STYLE + style)


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _chain(run: RunFolder) -> list[str]:
    items = []
    for stage in run.stages:
        kept, steps = stage.manifest.rows.get("kept", 0), stage.manifest.steps
        told = f"{kept:,} rows" + (f", {steps:,} steps" if steps else "")
        items.append(f'<li><strong>{html(stage.name)}</strong><span class="soft">{html(told)}</span></li>')
    pages = [(stage, name) for stage in run.stages for name in stage.pages]
    links = ", ".join(
        f'<a href="{escape(f"{s.name}/{name}", quote=True)}">{html(f"{s.name}/{name}")}</a>' for s, name in pages
    )
    beside = [f"<p>Pages of single stages, beside this one: {links}.</p>"] if links else []
    return [f'<ol class="chain">{"".join(items)}</ol>', *beside]


def _lineage(run: RunFolder) -> list[str]:
    says = "From the last model back to rows and base. Beside each: the beginning of its sha256."
    return [f'<p class="soft">{says}</p>', f'<ul class="tree">{"".join(map(tree_item, lineage(run)))}</ul>']


def tree_item(node: Node) -> str:
    """A node of the lineage with all below it, as a list item."""
    words = [html(node.label), f"<code>{html(node.short)}</code>"]
    words += [f'<span class="soft">{html(node.note)}</span>'] if node.note else []
    words += ['<span class="soft">(above)</span>'] if node.above else []
    words += [f'<span class="warn">{html(node.warning)}</span>'] if node.warning else []
    below = f"<ul>{''.join(map(tree_item, node.children))}</ul>" if node.children else ""
    return f"<li>{' '.join(words)}{below}</li>"


def _changes(run: RunFolder) -> list[str]:
    rows = [
        [change.stage, change.figure, number_cell(change.before, change.form), number_cell(change.after, change.form)]
        for stage in run.stages
        for change in changes(stage.manifest)
    ]
    if not rows:
        return []
    return [
        '<p class="soft">On held-out rows, before the first step and after the last; of PPO the first update and the '
        "last tenth of them.</p>",
        table(["stage", "figure", "before", "after"], rows),
    ]


def _others(run: RunFolder) -> list[str]:
    rows = [
        [stage.name, key, number_cell(value, "{:.4g}")]
        for stage in run.stages
        for key, value in other_figures(stage).items()
    ]
    parts = [table(["stage", "figure", "value"], rows)] if rows else []
    if run.evaluated is not None and (found := model_figures(run.evaluated)):
        parts += ["<h3>All that evaluate measured</h3>", *_side_by_side("figure in scores.json", found)]
    return parts


def number_cell(value: float | None, form: str) -> Figure:
    """A figure as a cell of a table; a dash where there is none."""
    return Figure("\N{EN DASH}" if value is None else html(shown(value, form)))


def _models(run: RunFolder) -> list[str]:
    """What was found out about each model, side by side."""
    if run.evaluated is None:
        return []
    count = run.evaluated.manifest.rows.get("kept", 0)
    parts = [f'<p class="soft">{count:,} prompts, the same for every model.</p>']
    parts += [f"<p>{html(line)}</p>" for line in verdicts(run.evaluated)[1:]]
    oracles = oracle_figures(run.evaluated)
    if oracles:
        rows = [[model, *(number_cell(row.get(key), "{:.1%}") for key in ORACLE)] for model, row in oracles.items()]
        says = (
            "By the rules of the embedded world. Helpful and right reason (unsafe ones refused, and why) should rise."
        )
        parts += [table(["model", *ORACLE.values()], rows), f'<p class="soft">{says}</p>']
    found = model_figures(run.evaluated)
    measured = {label: found[name] for label, name in MEASURED.items() if name in found}
    return [*parts, *_side_by_side("figure", measured)]


def _side_by_side(header: str, figures: Mapping[str, Mapping[str, Estimated]]) -> list[str]:
    """A row a figure, a column a model."""
    models = list(dict.fromkeys(model for row in figures.values() for model in row))
    rows = [[name, *(_estimate(row.get(model)) for model in models)] for name, row in figures.items()]
    return [table([header, *models], rows)] if rows else []


def _estimate(value: Estimated | None) -> Figure:
    return Figure("\N{EN DASH}" if value is None else html(str(value)))


def _curves(run: RunFolder) -> list[str]:
    parts = []
    for stage in run.stages:
        plots = [plot for curve in CURVES if (plot := _plot(stage, curve))]
        if plots:
            parts += [f"<h3>{html(stage.name)}</h3>", f'<div class="curves">{"".join(plots)}</div>']
    return parts


def _plot(stage: StageFolder, curve: Curve) -> str:
    series = {label: points(stage.lines, names) for label, names in curve.names.items()}
    series = {label: found for label, found in series.items() if found}
    return figure(curve, series, "update" if "updates" in stage.manifest.metrics else "step")


def figure(curve: Curve, series: dict[str, list[curves.Point]], x_label: str) -> str:
    """A plot with its title, its key where there are several lines, and what to make of it."""
    plot = curves.line_plot(series, x_label=x_label, y_label=curve.unit, include=(0.0,) if curve.zero else ())
    if not plot:
        return ""
    names = f'<span class="key">{curves.key(list(series))}</span><br>' if len(series) > 1 else ""
    return f"<figure><h4>{html(curve.title)}</h4>{plot}<figcaption>{names}{html(curve.says)}</figcaption></figure>"


def _rows(run: RunFolder) -> list[str]:
    rows, dropped = [], []
    for stage in run.stages:
        counts = stage.manifest.rows
        reasons = counts.get("dropped", {})
        rows.append(
            [stage.name, counts.get("read", 0), counts.get("kept", 0), counts.get("held_out", 0), sum(reasons.values())]
        )
        dropped += [[stage.name, reason, count] for reason, count in reasons.items()]
    parts = [table(["stage", "read", "used", "held out", "dropped"], rows)]
    if dropped:
        parts += [
            "<h3>Dropped, by reason</h3>",
            '<p class="soft">Each of them is in bad_rows.jsonl of its stage, with file and line.</p>',
            table(["stage", "reason", "rows"], dropped),
        ]
    sources = [
        [stage.name, entry["name"], _code(entry["path"]), _code(entry["digest"][:SHOWN_DIGITS])]
        for stage in run.stages
        for entry in stage.manifest.inputs
    ]
    return [*parts, "<h3>Inputs</h3>", table(["stage", "input", "where", "sha256"], sources)]


def _speed(run: RunFolder) -> list[str]:
    """What each stage took, beside what do=plan counts for it."""
    rows = []
    for stage in run.stages:
        manifest, measured = stage.manifest, speed(stage)
        if measured is None and not manifest.memory:
            continue
        sharding = "none" if manifest.zero_stage is None else f"ZeRO-{manifest.zero_stage}"
        sizes = [_size(manifest.memory.get(key)) for key in ("planned_bytes", "peak_bytes", "host_bytes")]
        rate = Figure("\N{EN DASH}" if measured is None else f"{round(measured):,}")
        rows.append([stage.name, rate, manifest.steps, manifest.world_size, sharding, *sizes])
    if not rows:
        return []
    says = (
        "Memory of the rank that took most. Planned: of its device, by the formulas of do=plan. Taken: on a GPU what "
        "torch had allocated at most; on a CPU what main memory grew by from the start of the stage, libraries that "
        "were loaded meanwhile included, what an earlier stage had left to it not. Speed is measured only: do=plan "
        "foresees none."
    )
    headers = ["stage", "tokens a second, median", "steps", "ranks", "sharding", "planned", "taken", "whole process"]
    return [f'<p class="soft">{says}</p>', table(headers, rows)]


def _size(size: float | None) -> Figure:
    return Figure("\N{EN DASH}" if not size else size_words(size))


def _commands(run: RunFolder) -> list[str]:
    by_command: dict[str, list[str]] = {}
    for stage in run.stages:
        if stage.command:
            by_command.setdefault(stage.command, []).append(stage.name)
    parts = []
    for command, stages in by_command.items():
        parts += [f'<p class="soft">{html(", ".join(stages))}:</p>', f"<pre>{html(command)}</pre>"]
    return parts


def _settings(run: RunFolder) -> list[str]:
    digests = ", ".join(f"{stage.name} {stage.manifest.config_digest[:SHOWN_DIGITS]}" for stage in run.stages)
    parts = []
    for stage in run.stages:
        own = stage.manifest.config.get("stages", {}).get(stage.name, {})
        text = yaml.safe_dump(own, sort_keys=False, allow_unicode=True, width=60)
        parts.append(f"<div><h4>{html(f'stages.{stage.name}')}</h4><pre>{html(text.rstrip())}</pre></div>")
    says = f"Of each stage; the rest is in its config.yaml. sha256 of what decides its result: {digests}."
    return [f'<p class="soft">{html(says)}</p>', f'<div class="settings">{"".join(parts)}</div>']


def _code(text: str) -> Html:
    return Html(f"<code>{html(text)}</code>")


def _versions(run: RunFolder) -> list[str]:
    """A column for all stages, unless they differ."""
    by_versions: dict[str, list[StageFolder]] = {}
    for stage in run.stages:
        known = stage.manifest.packages | ({"commit": stage.manifest.git_commit} if stage.manifest.git_commit else {})
        by_versions.setdefault(str(sorted(known.items())), []).append(stage)
    parts = []
    for stages in by_versions.values():
        first = stages[0].manifest
        rows = [[name, version] for name, version in first.packages.items()]
        rows += [["commit", _code(first.git_commit)]] if first.git_commit else []
        names = ", ".join(stage.name for stage in stages)
        parts += [f'<p class="soft">{html(names)}, seed {first.seed}:</p>', table(["package", "version"], rows)]
    return parts
