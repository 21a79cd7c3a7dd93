"""Several runs in order: by which figure, which is the best, and in which settings they differ."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.schema import SweepBy
from align.tracking.report_figures import headline_figures, shown
from align.tracking.run_folder import RunFolder

MOST_RANKED_SETTINGS = 6
"""Beside a ranking; more of them make no table that can be read."""
RANKED_BY = {
    SweepBy.win_rate: ("evaluated: win.rate", 1),
    SweepBy.helpful: ("evaluated: helpful", 1),
    SweepBy.label_accuracy: ("classified: accuracy", 1),
    SweepBy.score: ("score of held-out prompts", 1),
    SweepBy.accuracy: ("reward accuracy", 1),
    SweepBy.loss: ("held-out loss", -1),
}
"""How figures end by which runs are ranked, the first that all have; 1: more is better. A loss comes last: with another
beta or another objective it is another loss."""
JUDGED = {"evaluated": "evaluate", "classified": "classify"}
"""How a figure of a stage that trains nothing begins -> that stage."""
NOT_A_SETTING = ("run_dir", "cache_dir", "do", "out", "report", "plan", "launch", "log", "sweep")


class Cost(NamedTuple):
    """What a run took, over its stages."""

    trained: int
    """Parameters trained, of the stage that trained most; 0: not known."""
    peak_bytes: float
    """Of a rank, of the stage that took most."""
    seconds: float
    """Of all stages, each of the launch that completed it."""

    HEADER = ("trained", "memory", "time")  # type: ignore[misc]

    def words(self) -> list[str]:
        """As people read them; a dash for what was not recorded."""
        return [
            f"{self.trained:,}" if self.trained else "-",
            f"{self.peak_bytes / 2**20:,.0f} MiB" if self.peak_bytes else "-",
            _time(self.seconds) if self.seconds else "-",
        ]


def _time(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {left:02} s" if minutes else f"{left} s"


def cost(manifests: Sequence[Manifest]) -> Cost:
    """Of the stages of a run."""
    return Cost(
        max((m.parameters.get("trained", 0) for m in manifests), default=0),
        max((m.memory.get("peak_bytes", 0.0) for m in manifests), default=0.0),
        sum(m.seconds for m in manifests),
    )


class Ranking(NamedTuple):
    """Runs by the figure that all of them have."""

    figure: str
    places: list[int]
    """In `runs`, the best first."""
    values: list[float]
    """Of the figure, in the order of `runs`."""
    settings: dict[str, list[Any]]
    """In which the runs differ, in their order; none where there are too many for a table."""
    costs: list["Cost"]
    """In the order of `runs`."""

    def lines(self, names: Sequence[str]) -> list[str]:
        """As a table of text, for the end of a sweep."""
        header = [self.figure, *self.settings, *Cost.HEADER, "run"]
        rows = [
            [
                shown(self.values[at], "{:.4g}"),
                *("" if values[at] is None else setting_text(values[at]) for values in self.settings.values()),
                *self.costs[at].words(),
                names[at],
            ]
            for at in self.places
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, *rows)]


def ranking(runs: Sequence[RunFolder], by: SweepBy = SweepBy.auto) -> Ranking | None:
    """None if no figure of the same rows is there in all runs."""
    order = ranked(runs, by)
    if order is None:
        return None
    figure, places = order
    differing = {key: values for key, values in settings_that_differ(runs).items() if key not in ("name", "run")}
    if len(differing) > MOST_RANKED_SETTINGS:
        differing = {}
    values = [headline_figures(run)[figure] for run in runs]
    return Ranking(figure, places, values, differing, [cost([s.manifest for s in run.stages]) for run in runs])


def figure_of(run: RunFolder, by: SweepBy) -> float:
    """The figure that a search makes better. Raises: UserError if the run has none such."""
    figures, (ending, _) = headline_figures(run), RANKED_BY[by]
    found = [value for name, value in figures.items() if name.endswith(ending)]
    if not found:
        raise UserError(f"sweep.by={by.value}: the run has no such figure, only {', '.join(figures) or 'none at all'}")
    return found[-1]


def setting_text(value: Any) -> str:
    """A value as it is shown beside a figure: a fraction with four digits."""
    return str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)


def _rounded(text: str) -> str:
    return re.sub(r"\d+\.\d{5,}(e-?\d+)?", lambda found: f"{float(found[0]):.4g}", text)


def short_labels(runs: Sequence[RunFolder]) -> list[str]:
    """As `labels`, with four digits of long fractions as far as that tells them apart: no paths any more."""
    exact = labels(runs)
    short = list(map(_rounded, exact))
    return short if len(set(short)) == len(short) else exact


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """The last folder of each path, with as many above it as it takes to tell them apart."""
    paths = [run.folder.absolute().parts for run in runs]
    for count in range(1, max(map(len, paths)) + 1):
        found = ["/".join(parts[-count:]) for parts in paths]
        if len(set(found)) == len(found):
            break
    return found


def ranked(runs: Sequence[RunFolder], by: SweepBy = SweepBy.auto) -> tuple[str, list[int]] | None:
    """The figure that all runs have, of the same rows, by which they are ranked, and their places in `runs`, the best
    first."""
    found = [headline_figures(run) for run in runs]
    for name, better in RANKED_BY.values() if by is SweepBy.auto else [RANKED_BY[by]]:
        keys = [key for key in found[0] if key.endswith(name) and all(key in figures for figures in found)]
        keys = [key for key in keys if _same_rows(runs, JUDGED.get(key.split(":")[0], key.split(":")[0]))]
        if keys:
            # Of stages that all ran the last one counts.
            of_runs = [figures[keys[-1]] for figures in found]
            trained = [cost([s.manifest for s in run.stages]).trained for run in runs]
            # Of two that are as good, the one that trained less.
            order = sorted(range(len(runs)), key=lambda place: (-better * of_runs[place], trained[place]))
            return keys[-1], order
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
