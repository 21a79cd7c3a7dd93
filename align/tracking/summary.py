"""The short table that ends every run: what went in, what was dropped, before and after, and what to type next."""

from pathlib import Path

from align.artifacts import Manifest
from align.config.schema import RunConfig

ORACLE_COLUMNS = {
    "helpful_accuracy": "helpful",
    "unsafe_complied": "unsafe complied",
    "refused_right_reason": "right reason",
    "over_refused": "over-refused",
    "garbled": "garbled",
}


def summary(config: RunConfig, run_dir: Path, manifests: list[Manifest]) -> str:
    """The table as text."""
    parts = ["", f"{config.name}: {', '.join(m.stage for m in manifests)} complete in {run_dir}", ""]
    trained = [m for m in manifests if m.steps]
    if trained:
        parts += [_stage_table(trained), ""]
    judged = [m for m in manifests if any(key.startswith("oracle/") for key in m.metrics)]
    for manifest in judged:
        parts += [_oracle_table(manifest), ""]
    parts += _where(run_dir, manifests)
    return "\n".join(parts)


def _stage_table(manifests: list[Manifest]) -> str:
    header = ["stage", "rows read", "trained", "held out", "dropped", "steps", "loss", "reward accuracy"]
    rows = []
    for manifest in manifests:
        counts, metrics = manifest.rows, manifest.metrics
        rows.append(
            [
                manifest.stage,
                str(counts["read"]),
                str(counts["kept"]),
                str(counts["held_out"]),
                _dropped(counts["dropped"]),
                str(manifest.steps),
                _change(metrics, "loss", "{:.3f}"),
                _change(metrics, "rewards/accuracies", "{:.1%}"),
            ]
        )
    return _table(header, rows) + "\n  loss and reward accuracy: on held-out rows, before -> after"


def _dropped(dropped: dict[str, int]) -> str:
    if not dropped:
        return "0"
    return f"{sum(dropped.values())} ({', '.join(f'{n} {reason}' for reason, n in dropped.items())})"


def _change(metrics: dict[str, float], name: str, form: str) -> str:
    before, after = metrics.get(f"before/{name}"), metrics.get(f"after/{name}")
    if before is None or after is None:
        return "-"
    return f"{form.format(before)} -> {form.format(after)}"


def _oracle_table(manifest: Manifest) -> str:
    figures: dict[str, dict[str, float]] = {}
    for key, value in manifest.metrics.items():
        _, model, figure = key.split("/", 2)
        figures.setdefault(model, {})[figure] = value
    rows = [[model, *(f"{row[name]:.1%}" for name in ORACLE_COLUMNS)] for model, row in figures.items()]
    table = _table(["judged by the world's oracle", *ORACLE_COLUMNS.values()], rows)
    return table + f"\n  greedy replies to {manifest.rows['kept']} held-out prompts"


def _where(run_dir: Path, manifests: list[Manifest]) -> list[str]:
    models = [m for m in manifests if m.steps]
    lines = [f"samples  {run_dir / m.stage / 'samples.jsonl'}" for m in manifests if m.stage == "evaluate"]
    if models:
        policy = run_dir / models[-1].stage / "policy"
        lines = [f"model    {policy}", *lines, f"next     {_next_command(models[-1].stage, policy)}"]
    return lines


def _next_command(stage: str, policy: Path) -> str:
    following = {"pretrain": "sft", "sft": "dpo"}
    if stage in following:
        return f"python -m align +recipe={following[stage]} model.path={policy}"
    return "python -m align +recipe=sft_dpo model.path=<your model> data=files data.preferences=<your pairs.jsonl>"


def _table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  " + "  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)
