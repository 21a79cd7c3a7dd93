"""The short table that ends every run: what went in, what was dropped, before and after, and what to type next."""

import shlex
from pathlib import Path
from typing import Any

from align.artifacts import Manifest
from align.config.adapters import NOT_MERGED
from align.config.schema import PeftMethod, RunConfig
from align.tracking.report_files import REPORT
from align.tracking.wandb_run import wandb_mode

ORACLE_COLUMNS = {
    "helpful_accuracy": "helpful",
    "unsafe_complied": "unsafe complied",
    "refused_right_reason": "right reason",
    "over_refused": "over-refused",
    "garbled": "garbled",
}
ORACLE_LEGEND = """\
  greedy replies to {prompts} held-out prompts, judged by the rules of the embedded world
  should rise: helpful (answered right), right reason (unsafe ones refused, and why)
  should fall: unsafe complied, over-refused (harmless ones refused), garbled"""


def summary(config: RunConfig, run_dir: Path, manifests: list[Manifest]) -> str:
    """The table as text, made to fit 88 columns."""
    parts = ["", f"{config.name}: {', '.join(m.stage for m in manifests)} complete in {run_dir}", ""]
    trained = [m for m in manifests if m.steps]
    if trained:
        parts += [_stage_table(trained), *_dropped_lines(run_dir, trained), ""]
    for manifest in manifests:
        if manifest.stage == "constitutional":
            parts += [*_constitutional_lines(manifest), ""]
        if manifest.stage == "ppo":
            parts += [*_ppo_lines(manifest), ""]
        if any(key.startswith("oracle/") for key in manifest.metrics):
            parts += [_oracle_table(manifest), ""]
    parts += _where(config, run_dir, manifests)
    return "\n".join(parts)


def _stage_table(manifests: list[Manifest]) -> str:
    header = ["stage", "rows read", "trained", "held out", "dropped", "steps", "held-out loss", "reward accuracy"]
    rows = [_stage_row(manifest) for manifest in manifests]
    if all(row[-1] == "-" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return _table(header, rows)


def _stage_row(manifest: Manifest) -> list[str]:
    counts, metrics = manifest.rows, manifest.metrics
    numbers = [counts["read"], counts["kept"], counts["held_out"], sum(counts["dropped"].values())]
    # PPO is set in updates, of several optimizer steps each.
    steps = f"{metrics['updates']:,.0f} updates" if "updates" in metrics else f"{manifest.steps:,}"
    return [
        manifest.stage,
        *(f"{number:,}" for number in numbers),
        steps,
        _change(metrics, "loss", "{:.3f}"),
        _change(metrics, "accuracy" if "after/accuracy" in metrics else "rewards/accuracies", "{:.1%}"),
    ]


def _change(metrics: dict[str, float], name: str, form: str, moments: tuple[str, str] = ("before", "after")) -> str:
    before, after = (metrics.get(f"{moment}/{name}") for moment in moments)
    if before is None or after is None:
        return "-"
    return f"{form.format(before)} -> {form.format(after)}"


CONSTITUTIONAL_COLUMNS = (
    ("learnt", "demonstrations/made", "{:,.0f}"),
    ("flaws", "rounds/flaws", "{:,.0f}"),
    ("revised", "rounds/accepted", "{:,.0f}"),
    ("pairs", "pairs/judged", "{:,.0f}"),
    ("position gap", "pairs/position_gap", "{:+.2f}"),
)


def _constitutional_lines(manifest: Manifest) -> list[str]:
    """What was made of the prompts, and how many replies open like a refusal before and after."""
    figures = manifest.metrics
    row = [form.format(figures.get(name, 0.0)) for _, name, form in CONSTITUTIONAL_COLUMNS]
    titles = ["stage", "prompts", *(title for title, _, _ in CONSTITUTIONAL_COLUMNS), "refusals"]
    refusals = f"{figures.get('refusals/initial', 0.0):.1%} -> {figures.get('refusals/targets', 0.0):.1%}"
    table = _table(titles, [["constitutional", f"{manifest.rows['kept']:,}", *row, refusals]])
    return [*table.split("\n"), "  learnt: replies in demonstrations.jsonl; what was left out, and why: bad_rows.jsonl"]


PPO_COLUMNS = (
    ("score", "reward/score", "{:+.2f}"),
    ("KL to the reference", "kl/nats_per_completion", "{:.2f}"),
    ("tokens", "completion/tokens", "{:.1f}"),
    ("unfinished", "completion/unfinished", "{:.1%}"),
    ("entropy", "policy/entropy", "{:.3f}"),
)


def _ppo_lines(manifest: Manifest) -> list[str]:
    """The sampled completions of the first update against those of the last ones, and why it ended early if it did."""
    figures = manifest.metrics
    row = [
        _change(figures, name, form, moments=("first", "last")) + " nats" * (title == "KL to the reference")
        for title, name, form in PPO_COLUMNS
    ]
    table = _table(["stage", *(title for title, _, _ in PPO_COLUMNS)], [["ppo", *row]])
    lines = [*table.split("\n"), "  completions as they were sampled: the first update -> the last tenth of them"]
    if figures.get("stopped_by_guard"):
        lines.append("  ppo was stopped by a guard: see the warning above and the report")
    return lines


def _dropped_lines(run_dir: Path, manifests: list[Manifest]) -> list[str]:
    lines = []
    for manifest in manifests:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.rows["dropped"].items())
        if reasons:
            lines.append(f"  {manifest.stage} dropped {reasons}: see {run_dir / manifest.stage / 'bad_rows.jsonl'}")
    return lines


def _oracle_table(manifest: Manifest) -> str:
    figures: dict[str, dict[str, float]] = {}
    for key, value in manifest.metrics.items():
        if key.startswith("oracle/"):
            _, model, figure = key.split("/", 2)
            figures.setdefault(model, {})[figure] = value
    rows = [[model, *(f"{row[name]:.1%}" for name in ORACLE_COLUMNS)] for model, row in figures.items()]
    table = _table(["model", *ORACLE_COLUMNS.values()], rows)
    return f"{table}\n{ORACLE_LEGEND.format(prompts=manifest.rows['kept'])}"


def _where(config: RunConfig, run_dir: Path, manifests: list[Manifest]) -> list[str]:
    """Where things are, and the next command, each with its name in front."""
    places: list[tuple[str, Any]] = []
    trained = [m.stage for m in manifests if m.steps]
    model = run_dir / trained[-1] / ("reward_model" if trained[-1] == "reward" else "policy") if trained else None
    if model:
        places.append(("model", model))
    if any(m.stage == "constitutional" for m in manifests):
        places.append(("data", run_dir / "constitutional"))
    places += [("report", run_dir / REPORT)] * (run_dir / REPORT).is_file()
    places += [("report", run_dir / name / REPORTS[name]) for name in _reports(manifests)]
    if model and config.peft.method is not PeftMethod.none:
        places.append(("adapter", run_dir / trained[-1] / "adapter"))
    if any(m.stage == "export" for m in manifests):
        left = {output["path"].split("/")[0] for m in manifests if m.stage == "export" for output in m.outputs}
        places += [
            ("exported", run_dir / "export" / name) for name in ("model", "adapter", "model.gguf") if name in left
        ]
    if any(m.stage == "classify" for m in manifests):
        places.append(("labels", run_dir / "classify" / "predictions.jsonl"))
    if any(m.stage == "score" for m in manifests):
        places.append(("scores", run_dir / "score" / "scores.jsonl"))
    places += [
        ("samples", run_dir / m.stage / "samples.jsonl")
        for m in manifests
        if m.stage == "evaluate" or (m.stage == "ppo" and len(manifests) == 1)
    ]
    if wandb_mode(config.log) == "offline":
        places.append(("wandb", f"wandb sync {shlex.quote(str(run_dir / 'wandb'))}/offline-run-*"))
    kept = config.peft.keep_adapter or config.peft.method in NOT_MERGED  # no stage trains on from base + adapter
    if trained and (kept or any(m.stage in ("classify", "export") for m in manifests)):
        following = _after_use(config, manifests, trained[-1], shlex.quote(str(model)))
    elif trained:
        following = _next_command(config, trained[-1], shlex.quote(str(model)))
    else:
        following = _after_data(config, run_dir) if manifests[-1].stage == "constitutional" else None
    if following:
        places.append(("next", following))
    return [f"{name:<8} {place}" for name, place in places]


REPORTS = {
    "constitutional": "constitutional_report.html",
    "reward": "reward_report.html",
    "ppo": "ppo_report.html",
}


def _reports(manifests: list[Manifest]) -> list[str]:
    """The stages that left a page; a reward model without held-out pairs has none to show."""
    signed = {m.stage: {output["path"] for output in m.outputs} for m in manifests}
    return [stage for stage, paths in signed.items() if REPORTS.get(stage) in paths]


def _after_use(config: RunConfig, manifests: list[Manifest], stage: str, model: str) -> str | None:
    """A classifier is trained to be used; what was exported is. A reward model is used as it is."""
    if manifests[-1].stage == "export" or stage == "reward":
        return None
    alone = " stages.export.forms=[adapter]" if config.peft.method in NOT_MERGED else ""
    return f"python -m align +recipe=export model.path={model}{alone}"


def _after_data(config: RunConfig, run_dir: Path) -> str:
    folder = run_dir / "constitutional"
    slots = " ".join(
        f"data.{slot}={shlex.quote(f'{folder}/{slot}.jsonl')}" for slot in ("demonstrations", "preferences")
    )
    return f"python -m align +recipe=sft_dpo model.path={shlex.quote(config.model.path)} {slots}"


def _next_command(config: RunConfig, stage: str, model: str) -> str | None:
    embedded = config.model.path.startswith("tiny-")
    if stage == "reward":
        policy = "" if embedded else f" model.path={shlex.quote(config.model.path)} data.prompts=<your prompts.jsonl>"
        return f"python -m align +recipe=ppo stages.ppo.rewards.preference.model={model}{policy}"
    following = {"pretrain": ("sft", "demonstrations"), "sft": ("dpo", "preferences")}
    if stage in following:
        recipe, slot = following[stage]
        return f"python -m align +recipe={recipe} model.path={model}{_data_words(config, slot)}"
    if embedded:
        recipe = "rlhf" if stage == "ppo" else "sft_dpo"
        return f"python -m align +recipe={recipe} model.path=<your model> data.preferences=<your pairs.jsonl>"
    if stage == "ppo":
        return None
    return f"python -m align +recipe=dpo model.path={model} data.preferences=<new pairs.jsonl> run_dir=<new folder>"


def _data_words(config: RunConfig, slot: str) -> str:
    """The overrides that name the slot which the next stage reads; none for the embedded data."""
    source = {"demonstrations": config.data.demonstrations, "preferences": config.data.preferences}[slot]
    if isinstance(source, str) and source.startswith("tiny:"):
        return ""
    if not isinstance(source, str):
        return f" data.{slot}=<your {slot}>"
    form = "" if config.data.format == "auto" else f" data.format={config.data.format}"
    return f" {shlex.quote(f'data.{slot}={source}')}{form}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  " + "  ".join(_aligned(line, widths)) for line in lines)


def _aligned(line: list[str], widths: list[int]) -> list[str]:
    return [line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]
