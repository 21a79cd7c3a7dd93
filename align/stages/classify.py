"""Label words for held-out texts: trained models against the base, which is shown examples first."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align import artifacts
from align.artifacts import Manifest
from align.config.errors import UserError
from align.config.schema import ClassifyStage
from align.constitutional.work import Work
from align.data.held_out import first_turn, held_out_rows, position
from align.data.prepare import PreparedDemonstrations, read_demonstrations
from align.data.records import Demonstration, Message
from align.distributed import runtime
from align.evaluation.classification import Classified, classified
from align.evaluation.verdicts import paired_difference
from align.generation.speakers import Choose, Chosen, Failed
from align.stages.context import RunContext, stage_record
from align.stages.rows import BAD_ROWS
from align.stages.session import input_digests, log_manifest
from align.stages.speakers import load_local
from align.tracking.progress import say

PREDICTIONS, SCORES, JOURNAL = "predictions.jsonl", "scores.json", "journal"
MOST_LABELS = 200
"""More different answers are no labels."""


@dataclass(frozen=True)
class Labelled:
    """Texts with their labels, of which some are held out."""

    labels: list[str]
    train: list[Demonstration]
    held_out: list[Demonstration]
    left_out: int
    """Rows with an answer that is none of the labels."""


def run(stage: ClassifyStage, context: RunContext) -> Manifest:
    """Write `predictions.jsonl` (a held-out text and every model's label a line) and `scores.json`."""
    _check(stage)
    read = read_demonstrations(context.config.data)
    if context.runtime.is_main:
        read.report.bad_rows.write(context.stage_dir / BAD_ROWS)
    rows = labelled(stage, read.rows, context.config.data.held_out_fraction)
    work = Work(context.stage_dir / JOURNAL, context.runtime, context.stage_name)
    answers = _answers(stage, context, work, rows)
    truth = [row.messages[-1].content.strip() for row in rows.held_out]
    found = {
        name: classified(rows.labels, truth, [_guess(one, rows.labels) for one in chosen], draws=stage.resamples)
        for name, chosen in answers.items()
    }
    numbers = _scores(stage, rows, found)
    if context.runtime.is_main:
        _write(context, rows, answers, numbers)
        for line in lines(numbers):
            say(f"{context.stage_name}: {line}" if line else "")
    runtime.barrier()
    manifest = _manifest(stage, context, read, rows, numbers)
    log_manifest(manifest, context)
    return manifest


def _check(stage: ClassifyStage) -> None:
    """Raises: UserError for settings that contradict each other, before any model is loaded."""
    if stage.baseline not in stage.models:
        raise UserError(
            f"stages.classify.baseline={stage.baseline} is none of stages.classify.models ({', '.join(stage.models)})"
        )
    if len(set(stage.labels)) != len(stage.labels):
        raise UserError(f"stages.classify.labels={stage.labels}: a label is there twice")


def labelled(stage: ClassifyStage, rows: Sequence[Demonstration], held_out_fraction: float) -> Labelled:
    """The rows with a label, split as SFT splits them: what is held out here, SFT has not trained on.

    Raises: UserError for answers that are no labels, labels of which one is the beginning of another, too few rows.
    """
    found = sorted({row.messages[-1].content.strip() for row in rows})
    labels = stage.labels or found
    if len(labels) > MOST_LABELS or 2 * len(labels) > len(rows):
        raise UserError(
            f"data.demonstrations: {len(labels):,} different answers in {len(rows):,} rows are no labels; give rows of "
            "text and label, or name the label words in stages.classify.labels"
        )
    if len(labels) < 2:
        raise UserError(
            f"data.demonstrations: the only label is {', '.join(labels) or 'none'}; there is nothing to tell"
        )
    begins = next(((a, b) for a in labels for b in labels if a != b and b.startswith(a)), None)
    if begins:
        raise UserError(
            f"the label {begins[0]!r} is the beginning of {begins[1]!r}, so it could never be the less likely answer; "
            "rename one of them in the rows"
        )
    unseen = held_out_rows([position(first_turn(row.messages)) for row in rows], held_out_fraction)
    known = [row.messages[-1].content.strip() in labels for row in rows]
    held_out = [row for row, out, there in zip(rows, unseen, known, strict=True) if out and there][: stage.max_rows]
    train = [row for row, out, there in zip(rows, unseen, known, strict=True) if there and not out]
    if not held_out:
        raise UserError("data.demonstrations: no row is held out to be labelled; raise data.held_out_fraction")
    return Labelled(list(labels), train, held_out, known.count(False))


def shots(rows: Labelled, each: int) -> list[Message]:
    """The first `each` rows of each label that are not held out, the labels in turn.

    Raises: UserError if a label has fewer.
    """
    by_label: dict[str, list[Demonstration]] = {label: [] for label in rows.labels}
    for row in rows.train:
        taken = by_label[row.messages[-1].content.strip()]
        if len(taken) < each and len(row.messages) == 2:
            taken.append(row)
    for label, taken in by_label.items():
        if len(taken) < each:
            raise UserError(
                f"stages.classify.few_shot={each}: only {len(taken)} rows to learn from are {label}; lower it"
            )
    return [turn for group in zip(*by_label.values(), strict=True) for row in group for turn in row.messages]


def _answers(stage: ClassifyStage, context: RunContext, work: Work, rows: Labelled) -> dict[str, list[Chosen | Failed]]:
    """Column -> what was found of each held-out row; the baseline with examples comes after it."""
    examples = shots(rows, stage.few_shot) if stage.few_shot else []
    found: dict[str, list[Chosen | Failed]] = {}
    for name, path in stage.models.items():
        speaker = load_local(path, context, seed=0, batch_size=stage.batch_size)
        columns = {name: [], **({few_shot_name(stage): examples} if examples and name == stage.baseline else {})}
        for column, before in columns.items():
            asked = [
                Choose(
                    str(place), tuple(turn.as_dict() for turn in (*before, *row.messages[:-1])), tuple(rows.labels), 0
                )
                for place, row in enumerate(rows.held_out)
            ]
            found[column] = work.choose(f"labels by {column}", speaker, asked)
        speaker.close()
    return found


def few_shot_name(stage: ClassifyStage) -> str:
    """The column of the baseline with examples."""
    return f"{stage.baseline} few-shot"


def _guess(answer: Chosen | Failed, labels: Sequence[str]) -> str | None:
    if isinstance(answer, Failed):
        return None
    return labels[max(range(len(labels)), key=lambda place: answer.logps[place])]


def _scores(stage: ClassifyStage, rows: Labelled, found: dict[str, Classified]) -> dict[str, Any]:
    """What `scores.json` holds."""
    against = few_shot_name(stage) if stage.few_shot else stage.baseline
    models, verdict = {}, []
    for name, one in found.items():
        models[name] = {
            "accuracy": asdict(one.accuracy), "macro_f1": one.macro_f1, "f1": one.f1, "precision": one.precision,
            "recall": one.recall, "confusion": one.confusion, "unanswered": one.unanswered,
        }  # fmt: skip
        if name not in (against, stage.baseline):
            change = paired_difference(one.right, found[against].right, draws=stage.resamples)
            models[name]["accuracy_change"] = asdict(change) if change else None
            base = found[against]
            verdict.append(
                f"{name} against {against}: accuracy {base.accuracy.mean:.1%} -> {one.accuracy.mean:.1%}, "
                f"macro-F1 {base.macro_f1:.3f} -> {one.macro_f1:.3f}"
            )
    return {
        "rows": len(rows.held_out),
        "labels": rows.labels,
        "baseline": against,
        "verdict": verdict,
        "models": models,
    }


def lines(numbers: dict[str, Any]) -> list[str]:
    """Figures and confusion tables for people."""
    labels, models = numbers["labels"], numbers["models"]
    width = max(map(len, [*models, "model"]))
    told = [f"{numbers['rows']:,} held-out rows, labels {', '.join(labels)}"]
    told.append(f"  {'model':<{width}}  accuracy                 macro-F1")
    for name, one in models.items():
        accuracy = one["accuracy"]
        said = f"{accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]"
        told.append(f"  {name:<{width}}  {said:<23}  {one['macro_f1']:.3f}")
    column = max(map(len, [*labels, "true, down"]))
    for name, one in models.items():
        told.append(f"  {name}: true label down, given label across")
        told.append(f"    {'':<{column}}  " + "  ".join(f"{label:>{max(5, len(label))}}" for label in labels))
        for label, row in zip(labels, one["confusion"], strict=True):
            cells = "  ".join(f"{count:>{max(5, len(other))}}" for other, count in zip(labels, row, strict=True))
            told.append(f"    {label:<{column}}  {cells}")
    return told + numbers["verdict"]


def _write(
    context: RunContext, rows: Labelled, answers: dict[str, list[Chosen | Failed]], numbers: dict[str, Any]
) -> None:
    found = []
    for place, row in enumerate(rows.held_out):
        line: dict[str, Any] = {"text": row.messages[-2].content, "label": row.messages[-1].content.strip()}
        line["guessed"] = {name: _guess(chosen[place], rows.labels) for name, chosen in answers.items()}
        found.append(json.dumps(line, ensure_ascii=False) + "\n")
    artifacts.write_text(context.stage_dir / PREDICTIONS, "".join(found))
    artifacts.write_json(context.stage_dir / SCORES, numbers)


def _manifest(
    stage: ClassifyStage,
    context: RunContext,
    read: PreparedDemonstrations,
    rows: Labelled,
    numbers: dict[str, Any],
) -> Manifest:
    record = stage_record(context.config, context.stage_name, context.run_dir)
    figures = {}
    for name, one in numbers["models"].items():
        figures |= {f"{name}/accuracy": one["accuracy"]["mean"], f"{name}/macro_f1": one["macro_f1"]}
    dropped = read.report.dropped | ({"other_label": rows.left_out} if rows.left_out else {})
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=[digest for name, path in stage.models.items() for digest in input_digests(path, name)] + read.inputs,
        outputs=artifacts.list_outputs(context.stage_dir, [PREDICTIONS, SCORES]) if context.runtime.is_main else [],
        rows={"read": read.report.read, "kept": len(rows.held_out), "dropped": dropped},
        metrics=figures,
        world_size=context.runtime.world_size,
    )
