"""Several models side by side on the same held-out prompts, pairs and texts: which is better, and what it cost."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from align import artifacts
from align.artifacts import Manifest
from align.config.best import EMBEDDED_PROMPTS
from align.config.errors import UserError
from align.config.schema import DataConfig, EvaluateStage
from align.constitutional.work import Work
from align.data.held_out import first_turn, held_out_rows, position
from align.data.prepare import PreparedPrompts, prepare_prompts
from align.data.records import PromptRow
from align.distributed import runtime
from align.generation.harness import check_tasks, is_file
from align.generation.speakers import Failed, Said
from align.stages.context import RunContext, flat, stage_record
from align.stages.evaluate_figures import scores
from align.stages.evaluate_judges import check_judge, judge_inputs, verdicts
from align.stages.evaluate_measure import Measured, measure, questions
from align.stages.evaluate_parts import Parts
from align.stages.rows import BAD_ROWS
from align.stages.session import input_digests, log_manifest
from align.tracking.evaluate_page import evaluate_page
from align.tracking.progress import say

SAMPLES, SCORES, REPORT = "samples.jsonl", "scores.json", "evaluate_report.html"
JOURNAL = "journal"
SHOWN = 24


def run(stage: EvaluateStage, context: RunContext) -> Manifest:
    """Write `samples.jsonl` (a prompt and every model's reply a line), `scores.json` (figures by model) and a page."""
    check_stage(stage, context)
    prompts = prepare_prompts(context.config.data)
    if context.runtime.is_main:
        prompts.report.bad_rows.write(context.stage_dir / BAD_ROWS)
    prompts.rows = chosen_prompts(prompts.rows, stage, context.config.data)
    asked = questions(stage, context, prompts.rows)
    folder = context.stage_dir / JOURNAL
    work, parts = Work(folder, context.runtime, context.stage_name), Parts(folder, context.runtime)
    measured = measure(stage, context, work, parts, asked)
    replies = {name: one.replies for name, one in measured.items()}
    said = verdicts(stage, context, work, parts, prompts.rows, replies)
    embedded = context.config.data.prompts == EMBEDDED_PROMPTS
    numbers = scores(stage, asked, measured, said, embedded=embedded)
    if context.runtime.is_main:
        _write(context, prompts.rows, measured, numbers)
        for line in numbers["verdict"]:
            say(f"{context.stage_name}: {line}")
    runtime.barrier()
    manifest = _manifest(stage, context, prompts, numbers)
    log_manifest(manifest, context)
    return manifest


def check_stage(stage: EvaluateStage, context: RunContext) -> None:
    """Raises: UserError for settings that contradict each other, before any model is loaded."""
    if not stage.models:
        raise UserError("stages.evaluate.models is empty; name a model, such as +stages.evaluate.models.mine=FOLDER")
    if stage.baseline not in stage.models:
        raise UserError(
            f"stages.evaluate.baseline={stage.baseline} is none of stages.evaluate.models ({', '.join(stage.models)})"
        )
    check_judge(stage.judge, context)
    if stage.lm_eval:
        check_tasks(stage.lm_eval)


def chosen_prompts(rows: list[PromptRow], stage: EvaluateStage, data: DataConfig) -> list[PromptRow]:
    """The prompts to answer: the first of each kind of the embedded world; else the first that no stage trained on.

    Every row counts where none is held out (data.held_out_fraction=0, or too few rows).
    """
    if data.prompts == EMBEDDED_PROMPTS:
        by_kind: dict[str, list[PromptRow]] = {}
        for row in rows:
            by_kind.setdefault(row.row["kind"], []).append(row)
        return [row for kind in by_kind.values() for row in kind[: stage.max_prompts]]
    unseen = held_out_rows([position(first_turn(row.messages)) for row in rows], data.held_out_fraction)
    chosen = [row for row, held in zip(rows, unseen, strict=True) if held] or rows
    return list({row.messages: row for row in chosen}.values())[: stage.max_prompts]


def _write(
    context: RunContext, prompts: Sequence[PromptRow], measured: dict[str, Measured], numbers: dict[str, Any]
) -> None:
    folder = context.stage_dir
    samples = [
        {"prompt": prompt.messages, "replies": {name: _text(one.replies[place]) for name, one in measured.items()}}
        for place, prompt in enumerate(prompts)
    ]
    lines = [json.dumps(line, ensure_ascii=False, default=vars) for line in samples]
    artifacts.write_text(folder / SAMPLES, "".join(f"{line}\n" for line in lines))
    artifacts.write_json(folder / SCORES, numbers)
    shown = [json.loads(line) for line in lines[:: max(1, len(lines) // SHOWN)][:SHOWN]]
    title = f"{context.config.name}: {context.stage_name}"
    artifacts.write_text(folder / REPORT, evaluate_page(numbers, shown, title))


def _text(reply: Said | Failed) -> str | None:
    return reply.text if isinstance(reply, Said) else None


def _manifest(stage: EvaluateStage, context: RunContext, prompts: PreparedPrompts, numbers: dict[str, Any]) -> Manifest:
    record = stage_record(context.config, context.stage_name, context.run_dir)
    inputs = [digest for name, path in stage.models.items() for digest in input_digests(path, name)]
    files = [{"name": "task", "path": path, "digest": artifacts.digest_file(Path(path))} for path in stage.tasks]
    files += [
        {"name": "instructions", "path": path, "digest": artifacts.digest_file(Path(path))}
        for path in stage.instructions
    ]
    files += [
        {"name": "lm_eval", "path": task, "digest": artifacts.digest_file(Path(task))}
        for task in stage.lm_eval
        if is_file(task)
    ]
    outputs = [SAMPLES, SCORES, REPORT]
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=inputs + prompts.inputs + files + judge_inputs(stage),
        outputs=artifacts.list_outputs(context.stage_dir, outputs) if context.runtime.is_main else [],
        rows={"read": prompts.read, "kept": len(prompts.rows), "dropped": prompts.report.dropped},
        metrics=_metrics(numbers),
        seed=stage.seed,
        world_size=context.runtime.world_size,
    )


def _metrics(numbers: dict[str, Any]) -> dict[str, float]:
    """Oracle figures by model, and every other number that stands alone, by `model/figure`."""
    found = {f"oracle/{name}/{key}": value for name, row in numbers["oracle"].items() for key, value in row.items()}
    for name, figures in numbers["models"].items():
        for key, value in flat(figures).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found[f"{name}/{key.replace('.', '/')}"] = float(value)
    return found
