"""Everything that an evaluation asks of its models, one model in memory at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.config.errors import UserError
from align.config.schema import EvaluateStage
from align.constitutional.work import Work
from align.data.files import read_file
from align.data.prepare import few_shot_examples
from align.data.records import Message, PromptRow
from align.evaluation.text_loss import word_counts
from align.generation.speakers import Failed, Said
from align.stages.context import RunContext
from align.stages.evaluate_models import Answer, Subject
from align.stages.evaluate_parts import Parts

FEW_SHOT = "few-shot"


@dataclass
class Measured:
    """What a model did. Lists of one prompt, pair or piece are in the order of the data."""

    replies: list[Said | Failed]
    samples: list[Answer] = field(default_factory=list)
    """Prompt and completion at temperature 1, as token ids; with `logps` of the model and of the baseline."""
    logps: list[list[float]] = field(default_factory=list)
    baseline_logps: list[list[float]] = field(default_factory=list)
    no_kl: str = ""
    """Why there is no KL."""
    chosen: list[float] = field(default_factory=list)
    """Log-probability of the chosen answer of each held-out pair; `rejected` likewise."""
    rejected: list[float] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """`p`, `margin`, `chosen_tokens`, `rejected_tokens` of each."""
    pairs_digest: str = ""
    """Of the rows as this model's tokens: models are compared on pairs where it is the same."""
    text_logps: list[float] = field(default_factory=list)
    """Log-probability of each held-out piece of text; `text_words` its words."""
    text_words: list[float] = field(default_factory=list)
    text_digest: str = ""
    """As `pairs_digest`."""
    tasks: dict[str, list[Said | Failed]] = field(default_factory=dict)
    """Answers to the rows of each file of `tasks` and `instructions`."""
    lm_eval: dict[str, Any] = field(default_factory=dict)
    """What `align.generation.harness.task_figures` found, by task."""


@dataclass(frozen=True)
class Questions:
    """What all models are asked."""

    prompts: list[PromptRow]
    shots: list[Message]
    tasks: dict[str, list[dict[str, Any]]]
    """Rows of each file of `tasks` and `instructions`."""


def questions(stage: EvaluateStage, context: RunContext, prompts: list[PromptRow]) -> Questions:
    """Raises: UserError for a file that is not there or has rows of another form."""
    shots = few_shot_examples(context.config.data, stage.few_shot) if stage.few_shot else []
    tasks = {path: _task_rows(path, ("question", "answer")) for path in stage.tasks}
    tasks |= {path: _task_rows(path, ("prompt", "instruction_id_list", "kwargs")) for path in stage.instructions}
    return Questions(prompts, [turn for row in shots for turn in row.messages], tasks)


def measure(
    stage: EvaluateStage, context: RunContext, work: Work, parts: Parts, asked: Questions
) -> dict[str, Measured]:
    """Label -> what was measured, in the order of `stage.models`, the few-shot column after the baseline.

    Call it on every rank. The baseline comes last: it reads what the others have sampled.
    """
    found: dict[str, Measured] = {}
    others = [name for name in stage.models if name != stage.baseline]
    for name in [*others, stage.baseline]:
        subject = Subject(name, stage.models[name], stage, context, parts)
        found[name] = measured_of(subject, work, asked)
        if name == stage.baseline:
            for other in others:
                baseline_reads(subject, Subject(other, stage.models[other], stage, context, parts), found[other])
            if asked.shots:
                label = f"{name} {FEW_SHOT}"
                found[label] = Measured(subject.replies(work, asked.prompts, asked.shots))
        subject.close()
    order = [label for name in stage.models for label in (name, f"{name} {FEW_SHOT}") if label in found]
    return {label: found[label] for label in order}


def measured_of(subject: Subject, work: Work, asked: Questions) -> Measured:
    """All that the settings ask of one model, but for what the baseline has to read. On every rank."""
    stage, measured = subject.stage, Measured(subject.replies(work, asked.prompts))
    for path, rows in asked.tasks.items():
        prompts = [PromptRow((Message("user", str(row.get("question", row.get("prompt")))),), row) for row in rows]
        measured.tasks[path] = subject.replies(work, prompts)
    for task in stage.lm_eval:
        measured.lm_eval |= subject.lm_eval(task)
    if stage.kl_prompts:
        measured.samples = subject.samples(asked.prompts[: stage.kl_prompts])
        measured.logps = subject.token_logps("samples", measured.samples)
    slots = subject.context.config.data
    if stage.max_pairs and slots.preferences:
        _read_pairs(subject, measured)
    if stage.max_texts and slots.text:
        _read_text(subject, measured)
    return measured


def baseline_reads(baseline: Subject, other: Subject, measured: Measured) -> None:
    """What the baseline makes of another model's samples, for the KL; nothing if they read text differently."""
    if baseline.template.digest != other.template.digest:
        measured.no_kl = f"{other.label} has another tokenizer or template than {baseline.label}"
        measured.samples = []
        return
    measured.baseline_logps = baseline.token_logps(f"samples of {other.label}", measured.samples)


def _read_pairs(subject: Subject, measured: Measured) -> None:
    prepared = subject.pairs()
    rows = [prepared.held_out[i] for i in range(min(len(prepared.held_out), subject.stage.max_pairs))]
    sides = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    sums = [sum(values) for values in subject.token_logps("pairs", sides)]
    measured.chosen, measured.rejected = sums[0::2], sums[1::2]
    measured.pairs_digest = prepared.report.digest
    measured.pairs = [
        {
            "p": row["p"], "margin": row["margin"],
            "chosen_tokens": len(row["chosen_ids"]), "rejected_tokens": len(row["rejected_ids"]),
        }
        for row in rows
    ]  # fmt: skip


def _read_text(subject: Subject, measured: Measured) -> None:
    prepared = subject.text()
    held_out = prepared.held_out
    pieces = [held_out[i]["input_ids"] for i in range(min(len(held_out), subject.stage.max_texts))]
    rows = [(ids[:1], ids[1:]) for ids in pieces if len(ids) > 1]
    logps = subject.token_logps("texts", rows)
    measured.text_logps = [sum(values) for values in logps]
    measured.text_words = word_counts([subject.text_of(ids) for _, ids in rows]).tolist()
    measured.text_digest = prepared.report.digest


def _task_rows(path: str, wanted: Sequence[str]) -> list[dict[str, Any]]:
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file (stages.evaluate.tasks or instructions)")
    rows = []
    for origin, row in read_file(file):
        missing = [name for name in wanted if name not in row]
        if missing:
            raise UserError(f"{origin}: no {missing[0]}; rows of this file need {', '.join(wanted)}")
        rows.append(row)
    return rows
