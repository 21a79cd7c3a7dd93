"""The short table that ends every run: what went in, what was dropped, before and after, and what to type next."""

import shlex
from pathlib import Path
from typing import Any

from align.artifacts import Manifest
from align.config.schema import PeftMethod, RunConfig
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
    numbers = [counts["read"], counts["kept"], counts["held_out"], sum(counts["dropped"].values()), manifest.steps]
    return [
        manifest.stage,
        *(f"{number:,}" for number in numbers),
        _change(metrics, "loss", "{:.3f}"),
        _change(metrics, "accuracy" if "after/accuracy" in metrics else "rewards/accuracies", "{:.1%}"),
    ]


def _change(metrics: dict[str, float], name: str, form: str) -> str:
    before, after = metrics.get(f"before/{name}"), metrics.get(f"after/{name}")
    if before is None or after is None:
        return "-"
    return f"{form.format(before)} -> {form.format(after)}"


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
    places: dict[str, Any] = {}
    trained = [m.stage for m in manifests if m.steps]
    if trained:
        places["model"] = run_dir / trained[-1] / ("reward_model" if trained[-1] == "reward" else "policy")
        if trained[-1] == "reward":
            places["report"] = run_dir / "reward" / "reward_report.html"
        if config.peft.method is not PeftMethod.none:
            places["adapter"] = run_dir / trained[-1] / "adapter"
    if any(m.stage == "score" for m in manifests):
        places["scores"] = run_dir / "score" / "scores.jsonl"
    if any(m.stage == "evaluate" for m in manifests):
        places["samples"] = run_dir / "evaluate" / "samples.jsonl"
    if wandb_mode(config.log) == "offline":
        places["wandb"] = f"wandb sync {shlex.quote(str(run_dir / 'wandb'))}/offline-run-*"
    if trained and trained[-1] != "reward":
        places["next"] = _next_command(config, trained[-1], shlex.quote(str(places["model"])))
    return [f"{name:<8} {place}" for name, place in places.items()]


def _next_command(config: RunConfig, stage: str, policy: str) -> str:
    following = {"pretrain": ("sft", "demonstrations"), "sft": ("dpo", "preferences")}
    if stage in following:
        recipe, slot = following[stage]
        return f"python -m align +recipe={recipe} model.path={policy}{_data_words(config, slot)}"
    if config.model.path.startswith("tiny-"):
        return "python -m align +recipe=sft_dpo model.path=<your model> data.preferences=<your pairs.jsonl>"
    return f"python -m align +recipe=dpo model.path={policy} data.preferences=<new pairs.jsonl> run_dir=<new folder>"


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
