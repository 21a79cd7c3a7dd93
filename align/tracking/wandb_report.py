"""One W&B Report of a run, or of several compared: made the first time, updated after that.

Needs wandb-workspaces (`pip install 'align-train[reports]'`). What would be sent is always written beside the page, as
JSON; without a login or a network that is all, and the same command sends it later.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from align import artifacts
from align.config.errors import UserError
from align.config.schema import LogConfig
from align.tracking.lineage import lineage, tree_text
from align.tracking.ranking import labels, ranking, settings_that_differ
from align.tracking.report_figures import (
    CURVES,
    ORACLE,
    changes,
    headline_figures,
    model_figures,
    oracle_figures,
    points,
    shown,
    verdict,
)
from align.tracking.run_folder import RunFolder, StageFolder
from align.tracking.wandb_run import ID_FILE, quiet_wandb, wandb_mode

AXIS = "train/global_step"
MOST_TITLE = 128
COLUMNS_OF_GRID, PLOT_WIDTH, PLOT_HEIGHT = 24, 12, 7
MOST_ROWS = 40
"""Of a table in a report; the page has all."""


def send_report(log: LogConfig, runs: Sequence[RunFolder], page: Path) -> list[str]:
    """Write the spec beside the page and, online, make or update the report. Returns lines for a person.

    Raises: UserError without wandb-workspaces.
    """
    wr = _reports()
    spec_file, sent_file = page.with_suffix(".wandb_spec.json"), page.with_suffix(".wandb_report.json")
    artifacts.write_json(spec_file, spec_of(build_report(wr, log, runs, entity="")))
    lines = [f"spec     {spec_file}"]
    logged = any(run_ids(stage) for run in runs for stage in run.stages)
    if not logged:
        lines.append("         no stage here was logged with log=wandb: the report has tables, but no curves")
    if wandb_mode(replace(log, wandb=True)) != "online":
        return [*lines, "         log.mode=offline: not sent; the same command with log.mode=online sends it"]
    try:
        sent = _send(wr, log, runs, artifacts.read_json(sent_file))
    except Exception as error:  # wandb and its transports raise bare Exception, among others
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return [*lines, f"         not sent: {reason}", "         after `wandb login` the same command sends it"]
    artifacts.write_json(sent_file, sent)
    return [*lines, f"report   {sent['url']}"]


def _send(wr: ModuleType, log: LogConfig, runs: Sequence[RunFolder], before: dict[str, str] | None) -> dict[str, str]:
    """Make the report, or update the one that was made before in this project."""
    wandb = quiet_wandb()
    if not wandb.login(prompt=False):
        raise RuntimeError("no API key for wandb on this machine")
    entity = log.entity or wandb.Api().default_entity
    report = build_report(wr, log, runs, entity=entity)
    if before and (before["entity"], before["project"]) == (entity, log.project):
        report.id = before["id"]
    report.save()
    return {"id": report.id, "entity": entity, "project": log.project, "url": report.url}


def _reports() -> ModuleType:
    try:
        import wandb_workspaces.reports.v2 as wr
    except ImportError as error:
        raise UserError(
            "report.to=wandb, but wandb-workspaces is not installed; pip install 'wandb-workspaces>=0.4,<0.5'"
        ) from error
    return wr


def spec_of(report: Any) -> dict[str, Any]:
    """The report as `save` sends it."""
    model = report._to_model()
    return {
        "displayName": model.display_name,
        "description": model.description,
        "spec": json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def build_report(wr: ModuleType, log: LogConfig, runs: Sequence[RunFolder], *, entity: str) -> Any:
    """A wandb_workspaces Report. With an entity its run sets ask the server for the project; without one, nothing."""
    names = labels(runs) if len(runs) > 1 else [runs[0].name]
    title = f"{names[0]} report" if len(runs) == 1 else f"{len(runs)} runs compared"
    blocks = [wr.TableOfContents(), wr.H1("Verdict")]
    blocks += [wr.P(f"{name}: {verdict(run)}") for name, run in zip(names, runs, strict=True)]
    blocks += _comparison(wr, log, runs, entity)
    blocks += [wr.H1("Figures"), wr.MarkdownBlock(_figures(runs, names))]
    if len(runs) > 1:
        blocks += _ranked(wr, runs, names)
        blocks += [wr.H1("Settings that differ"), wr.MarkdownBlock(_settings(runs, names))]
    for name in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        blocks += _stage_blocks(wr, log, [s for run in runs for s in run.stages if s.name == name], entity)
    blocks += [wr.H1("Rows"), wr.MarkdownBlock(_rows(runs, names)), wr.H1("Lineage")]
    blocks += [
        wr.CodeBlock(code=f"{name}\n{tree_text(lineage(run))}", language="markdown")
        for name, run in zip(names, runs, strict=True)
    ]
    commands = list(dict.fromkeys(stage.command for run in runs for stage in run.stages if stage.command))
    blocks += [wr.H1("Commands"), wr.CodeBlock(code="\n".join(commands), language="markdown")] if commands else []
    said = verdict(runs[0]) if len(runs) == 1 else ", ".join(names)
    return wr.Report(
        project=log.project, entity=entity, title=title[:MOST_TITLE], description=said, blocks=blocks, width="fluid"
    )


def _ranked(wr: ModuleType, runs: Sequence[RunFolder], names: Sequence[str]) -> list[Any]:
    """The runs in order, the best first, each with its settings that differ."""
    found = ranking(runs)
    if found is None:
        return []
    rows = [
        [names[at], shown(found.values[at], "{:.4g}"), *(f"`{values[at]}`" for values in found.settings.values())]
        for at in found.places[:MOST_ROWS]
    ]
    header = ["run", found.figure, *(f"`{key}`" for key in found.settings)]
    return [wr.H1("Ranking"), wr.MarkdownBlock(_table(header, rows))]


def run_ids(stage: StageFolder) -> list[str]:
    """The wandb run of a stage, if it was logged."""
    file = stage.folder / ID_FILE
    text = file.read_text().strip() if file.is_file() else ""
    return [text] if text else []


def _run_set(wr: ModuleType, log: LogConfig, stages: Sequence[StageFolder], entity: str) -> Any | None:
    """The wandb runs of these stages, and no other run of the project."""
    ids = [one for stage in stages for one in run_ids(stage)]
    if not ids:
        return None
    name = ", ".join(dict.fromkeys(stage.name for stage in stages))
    return wr.Runset(entity=entity, project=log.project, name=name, filters=f"ID in {ids!r}")


def _comparison(wr: ModuleType, log: LogConfig, runs: Sequence[RunFolder], entity: str) -> list[Any]:
    """The run comparer; of several runs also their settings and figures as parallel coordinates."""
    found = _run_set(wr, log, [stage for run in runs for stage in run.stages], entity)
    if found is None:
        return []
    panels = [wr.RunComparer(diff_only="split", layout=wr.Layout(x=0, y=0, w=COLUMNS_OF_GRID, h=12))]
    columns = _coordinates(wr, runs)
    if len(runs) > 1 and len(columns) > 1:
        layout = wr.Layout(x=0, y=12, w=COLUMNS_OF_GRID, h=10)
        panels.append(wr.ParallelCoordinatesPlot(columns=columns, title="settings and figures", layout=layout))
    return [wr.H1("Runs"), wr.PanelGrid(runsets=[found], panels=panels)]


def _coordinates(wr: ModuleType, runs: Sequence[RunFolder]) -> list[Any]:
    """A column for each setting in which the runs differ, then one for each figure after their last stage."""
    settings = [key for key in settings_that_differ(runs) if key not in ("name", "run")]
    last = runs[0].trained[-1:] or runs[0].stages[-1:]
    figures = [f"after/{name}" for name in ("loss", "rewards/accuracies", "accuracy", "samples/score")]
    known = [name for name in figures if any(name in stage.manifest.metrics for stage in last)]
    column = wr.ParallelCoordinatesPlotColumn
    return [*(column(metric=f"c::{key}") for key in settings), *(column(metric=name) for name in known)]


def _stage_blocks(wr: ModuleType, log: LogConfig, stages: Sequence[StageFolder], entity: str) -> list[Any]:
    """Curves of a stage over each other for all runs, and the tables of samples that it logged."""
    found = _run_set(wr, log, stages, entity)
    panels = [] if found is None else _panels(wr, stages)
    return [wr.H1(stages[0].name), wr.PanelGrid(runsets=[found], panels=panels)] if panels else []


def _panels(wr: ModuleType, stages: Sequence[StageFolder]) -> list[Any]:
    panels: list[Any] = []
    lines = [line for stage in stages for line in stage.lines]
    for curve in CURVES:
        figures = [next((n for n in names if any(n in line for line in lines)), "") for names in curve.names.values()]
        logged = [name for name in figures if name and points(lines, [name])]
        if logged:
            layout = _layout(wr, len(panels))
            panels.append(wr.LinePlot(title=curve.title, x=AXIS, y=logged, title_y=curve.unit, layout=layout))
    for name in _tables(stages):
        panels.append(wr.WeavePanelSummaryTable(table_name=name, layout=_layout(wr, len(panels))))
    return panels


def _tables(stages: Sequence[StageFolder]) -> list[str]:
    """Keys under which `WandbRun.table` has logged samples: of PPO the first and the last, of an evaluation its one."""
    steps = sorted({line["step"] for stage in stages for line in stage.samples if "step" in line})
    ends = [steps[0], steps[-1]] if len(steps) > 1 else steps
    replied = [stage.manifest.steps for stage in stages if any("replies" in line for line in stage.samples)]
    return [f"samples/step_{step:05d}" for step in ends] + [f"replies/step_{step:05d}" for step in sorted(set(replied))]


def _layout(wr: ModuleType, place: int) -> Any:
    """Two plots a row."""
    across = COLUMNS_OF_GRID // PLOT_WIDTH
    return wr.Layout(x=place % across * PLOT_WIDTH, y=place // across * PLOT_HEIGHT, w=PLOT_WIDTH, h=PLOT_HEIGHT)


def _figures(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """Of one run before and after, and its models side by side; of several the last figures of each."""
    if len(runs) > 1:
        found = [headline_figures(run) for run in runs]
        keys = list(dict.fromkeys(key for figures in found for key in figures))[:MOST_ROWS]
        rows = [[key, *(shown(f[key], "{:.4g}") if key in f else "" for f in found)] for key in keys]
        return _table(["figure", *names], rows)
    (run,) = runs
    told = [change for stage in run.stages for change in changes(stage.manifest)]
    rows = [[c.stage, c.figure, shown(c.before, c.form), shown(c.after, c.form)] for c in told]
    parts = [_table(["stage", "figure", "before", "after"], rows)] if rows else []
    if run.evaluated is not None:
        oracles = oracle_figures(run.evaluated)
        rows = [[m, *(shown(row[k], "{:.1%}") for k in ORACLE if k in row)] for m, row in oracles.items()]
        parts += [_table(["model", *ORACLE.values()], rows)] if rows else []
        figures = dict(list(model_figures(run.evaluated).items())[:MOST_ROWS])
        models = list(dict.fromkeys(model for row in figures.values() for model in row))
        rows = [[key, *(str(row.get(model, "")) for model in models)] for key, row in figures.items()]
        parts += [_table(["figure", *models], rows)] if rows else []
    return "\n\n".join(parts) or "Nothing was measured."


def _settings(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    rows = [[f"`{key}`", *(f"`{value}`" for value in values)] for key, values in settings_that_differ(runs).items()]
    return _table(["key", *names], rows[:MOST_ROWS]) if rows else "None."


def _rows(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The data report: what each stage read, used and left out, and why."""
    rows = []
    for name, run in zip(names, runs, strict=True):
        for stage in run.stages:
            counts = stage.manifest.rows
            dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts.get("dropped", {}).items())
            numbers = (f"{counts.get(key, 0):,}" for key in ("read", "kept", "held_out"))
            rows.append([f"{name}/{stage.name}" if len(runs) > 1 else stage.name, *numbers, dropped or "none"])
    return _table(["stage", "read", "used", "held out", "dropped"], rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
