"""Scores of a reward model for the answers in a file, row by row; pairs and rankings are judged, by subset too."""

import json
import math
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.schema import ScoreStage
from align.data.answers import AnsweredRow, answered_rows
from align.data.bad_rows import BadRows, TooManyBadRows, enforce_policy
from align.data.forest import Tree
from align.data.prepare import slot_digests
from align.data.report import CHOSEN_REASONS, RowReport
from align.distributed import runtime
from align.losses.calibration import accuracy
from align.models.reward import check_reward_model
from align.stages.context import RunContext, stage_record
from align.stages.rows import BAD_ROWS, load_template
from align.stages.scoring import answer_scores
from align.stages.session import input_digests
from align.tracking.progress import say

SLOT = "demonstrations"
SCORES, FIGURES = "scores.jsonl", "scores.json"


def run(stage: ScoreStage, context: RunContext) -> Manifest:
    """Write `scores.jsonl` (origin, scores, ranks, subset of each row, in file order) and `scores.json` (figures)."""
    config, machine = context.config, context.runtime
    check_reward_model(stage.reward_model, config.model)
    template = load_template(config, stage.reward_model)
    rows, report = _rows(stage, context, template)
    scores = answer_scores(
        stage.reward_model, [Tree(row.prompt, row.answers) for row in rows], context,
        pad_token_id=template.tokenizer.pad_token_id, micro_batch_size=stage.micro_batch_size,
    )  # fmt: skip
    figures = _figures(rows, scores, stage.subset_field)
    if machine.is_main:
        _write(context.stage_dir / SCORES, rows, scores, stage.subset_field)
        artifacts.write_json(context.stage_dir / FIGURES, figures)
        for line in _read_lines(report) + _lines(figures):
            say(f"{context.stage_name}: {line}")
    runtime.barrier()
    record = stage_record(config, context.stage_name, context.run_dir)
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=input_digests(stage.reward_model, "reward_model") + slot_digests(config.data, SLOT),
        outputs=artifacts.list_outputs(context.stage_dir, [SCORES, FIGURES]) if machine.is_main else [],
        rows=report.counts(),
        metrics={f"score/{name}": value for name, value in figures.items() if isinstance(value, float | int)},
        seed=0,
        world_size=machine.world_size,
        template_digest=template.digest,
    )


def _rows(stage: ScoreStage, context: RunContext, template: Any) -> tuple[list[AnsweredRow], RowReport]:
    file = context.stage_dir / BAD_ROWS
    mine = file if context.runtime.is_main else file.with_name(f".{BAD_ROWS}.{context.runtime.rank}")
    report = RowReport(SLOT, BadRows(mine), max_tokens=stage.max_tokens)
    rows = list(answered_rows(context.config.data, SLOT, template, stage.max_tokens, report))
    report.bad_rows.close()
    if not context.runtime.is_main:
        mine.unlink(missing_ok=True)
    elif not report.bad_rows:
        file.unlink(missing_ok=True)
    try:
        enforce_policy(report.bad_rows, report.made, context.config.data, allowed=CHOSEN_REASONS)
    except TooManyBadRows as error:
        raise UserError(f"{error}; all are listed in {file}") from error
    if not rows:
        raise UserError(f"data.{SLOT}: none of {report.read} rows has an answer to score; see {file}")
    return rows, report


def _figures(rows: Sequence[AnsweredRow], scores: Sequence[Sequence[float]], subset_field: str) -> dict[str, Any]:
    """Mean and spread of finite scores, how many are not finite, and accuracy over pairs, in all and by subset."""
    every = np.array([score for values in scores for score in values])
    finite = every[np.isfinite(every)]
    figures: dict[str, Any] = {"rows": len(rows), "answers": len(every), "not_finite": int(len(every) - len(finite))}
    if len(finite):
        figures |= {"mean": float(finite.mean()), "std": float(finite.std())}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row, values in zip(rows, scores, strict=True):
        pairs.setdefault(_subset(row, subset_field), []).extend(_pairs(row, values))
    whole = [pair for found in pairs.values() for pair in found]
    if whole:
        figures |= _accuracy(whole)
    if len(pairs) > 1:
        figures["subsets"] = {name: _accuracy(found) for name, found in sorted(pairs.items()) if found}
    return figures


def _subset(row: AnsweredRow, field: str) -> str:
    return str(row.row.get(field, "")) if isinstance(row.row, dict) else ""


def _pairs(row: AnsweredRow, values: Sequence[float]) -> list[tuple[float, float]]:
    """(score of the better answer, of the worse) of every two answers that the row does not call equal."""
    if row.ranks is None or not all(map(math.isfinite, values)):
        return []
    ranked = sorted(zip(row.ranks, values, strict=True))
    return [(better, worse) for (rank, better), (other, worse) in combinations(ranked, 2) if rank != other]


def _accuracy(pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    chosen, rejected = np.array(pairs).T
    found = accuracy(chosen, rejected)
    return {"pairs": len(pairs), "accuracy": found.share, "accuracy_low": found.low, "accuracy_high": found.high}


def _read_lines(report: RowReport) -> list[str]:
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in report.dropped.items())
    left_out = f"{len(report.bad_rows):,} left out" + (f" ({reasons})" if reasons else "")
    made = "" if report.made == report.read else f" that make {report.made:,}"
    lines = [f"data.{SLOT}: {path} read as {name}" for path, name in report.formats.items()]
    return [*lines, f"{report.read:,} rows{made}: {report.kept:,} scored, {left_out}"]


def _lines(figures: dict[str, Any]) -> list[str]:
    def words(found: dict[str, float]) -> str:
        interval = f"[{found['accuracy_low']:.1%}, {found['accuracy_high']:.1%}]"
        return f"accuracy {found['accuracy']:.1%} {interval} of {found['pairs']:,} pairs"

    lines = [f"{figures['answers']:,} answers"]
    if "mean" in figures:
        lines[0] += f" score {figures['mean']:.3f} on average, spread {figures['std']:.3f}"
    if figures["not_finite"]:
        lines.append(f"WARN {figures['not_finite']:,} scores are not finite")
    if "accuracy" in figures:
        lines.append(words(figures))
    return lines + [f"  {name or '(none)'}: {words(found)}" for name, found in figures.get("subsets", {}).items()]


def _write(path: Path, rows: Sequence[AnsweredRow], scores: Sequence[Sequence[float]], subset_field: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        for row, values in zip(rows, scores, strict=True):
            found = [value if math.isfinite(value) else None for value in values]
            line: dict[str, Any] = {"origin": str(row.origin), "scores": found}
            line |= {"ranks": list(row.ranks), "p": row.p} if row.ranks is not None else {}
            line |= {subset_field: subset} if (subset := _subset(row, subset_field)) else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, path)
