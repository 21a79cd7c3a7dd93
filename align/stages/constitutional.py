"""Constitutional data: a model's replies, criticised, revised and compared by principles, become rows to train on."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from align import artifacts
from align.artifacts import Manifest
from align.config.constitution import Constitution, load_constitution
from align.config.errors import UserError
from align.config.schema import ConstitutionalStage, PairSource, SpeakerBackend
from align.constitutional import outputs
from align.constitutional.drawing import seed_of
from align.constitutional.figures import Made, figures
from align.constitutional.journal import key_of
from align.constitutional.judging import Judge, Pair
from align.constitutional.pairing import Pairing
from align.constitutional.prompts import Questions
from align.constitutional.revising import Revising
from align.constitutional.rows import Filters, PromptWork, going
from align.constitutional.work import Work, role_of
from align.data.prepare import PreparedPrompts, helpful_demonstrations, prompts_to_answer
from align.data.reply_filters import FILTERS
from align.distributed import runtime
from align.generation.speakers import Speaker
from align.stages.context import RunContext, flat, stage_record
from align.stages.session import input_digests, log_manifest
from align.stages.speakers import check_speakers, load_speakers, speaker_configs
from align.tracking.constitutional_page import constitutional_page
from align.tracking.progress import say

JOURNAL, REPORT, FIGURES = "journal", "constitutional_report.html", "report.json"
FILES = (
    outputs.DEMONSTRATIONS, outputs.PREFERENCES, outputs.UNPAIRED, outputs.TRACE, outputs.LEFT_OUT, FIGURES, REPORT,
)  # fmt: skip
SHOWN_TRACES = 20


def run(stage: ConstitutionalStage, context: RunContext) -> Manifest:
    """Make demonstrations, preferences and unpaired rows of `data.prompts`; every answer is journalled as it comes."""
    constitution = load_constitution(stage.constitution)
    check_stage(stage, constitution)
    prompts = prompts_to_answer(context.config.data)
    rows = prompt_works(prompts, stage)
    _say_start(context, stage, constitution, prompts, rows)
    speakers = load_speakers(stage, context)
    work = Work(context.stage_dir / JOURNAL, context.runtime, context.stage_name)
    targets, pairs, faults = make(stage, constitution, rows, speakers, work)
    for speaker in {id(one): one for one in speakers.values()}.values():
        speaker.close()
    demonstrations = list(outputs.demonstrations(rows, targets))
    helpful, inputs = _helpful(stage, context, len(demonstrations))
    made = Made(rows, targets, pairs, faults, len(helpful), work.spent)
    numbers = figures(made, _price(stage, work))
    if context.runtime.is_main:
        prompts.report.bad_rows.write(context.stage_dir / outputs.LEFT_OUT)
        _write(context, stage, made, [*demonstrations, *helpful], speakers, numbers, constitution)
    runtime.barrier()
    manifest = _manifest(stage, context, prompts, inputs, numbers)
    log_manifest(manifest, context)
    return manifest


def make(
    stage: ConstitutionalStage,
    constitution: Constitution,
    rows: Sequence[PromptWork],
    speakers: Mapping[str, Speaker],
    work: Work,
) -> tuple[dict[str, list[str]], list[Pair], list[tuple[PromptWork, str, str]]]:
    """Both phases, step by step: what each prompt has to learn, the judged pairs, and replies compared with nothing.

    What was said of each prompt is kept in `rows`. Call it on every rank with the same rows.
    """
    questions = Questions(constitution)
    filters = Filters.of(stage, constitution.scaffold)
    judge = Judge(
        questions, work, speakers["judge"], seed=stage.seed, temperature=stage.revision_temperature,
        thought_tokens=stage.max_critique_tokens,
    )  # fmt: skip
    revising = Revising(
        stage, questions, work, generator=speakers["generator"], critic=speakers["critic"], judge=judge, filters=filters
    )
    revising.answer(rows)
    revising.revise(going(rows))
    targets = outputs.choose_targets(rows, stage, constitution, judge)
    pairing = Pairing(stage, questions, work, generator=speakers["generator"], judge=judge, filters=filters)
    # A prompt without a target may still have pairs: its first reply was sound.
    pairs = pairing.pairs([row for row in rows if row.fault in (None, outputs.NO_TARGET)])
    return targets, pairs, pairing.faults


def check_stage(stage: ConstitutionalStage, constitution: Constitution) -> None:
    """Raises: UserError for settings that the constitution or the machine cannot serve."""
    check_speakers(stage)
    unknown = [name for name in stage.filters if name != "all" and name not in FILTERS]
    if unknown:
        raise UserError(
            f"stages.constitutional.filters: no filter is called {unknown[0]}; there are {', '.join(FILTERS)}"
        )
    if stage.pairs is PairSource.contrast and not any(one.positive for one in constitution.principles):
        raise UserError(
            f"stages.constitutional.pairs=contrast: no principle of {constitution.name} has positive and negative "
            "prompts; add them, or choose other pairs"
        )
    if stage.rounds == 0 and stage.pairs is PairSource.revision_vs_initial:
        raise UserError(
            "stages.constitutional.pairs=revision_vs_initial compares revisions, and rounds=0 makes none; set "
            "stages.constitutional.rounds=1 or more, or pairs=random"
        )


def prompt_works(prompts: PreparedPrompts, stage: ConstitutionalStage) -> list[PromptWork]:
    """Each different prompt once, the first ones in file order; prompts with tools are left out and counted."""
    rows: dict[str, PromptWork] = {}
    for row in prompts.rows:
        conversation = tuple({"role": one.role, "content": one.content} for one in row.messages)
        id = key_of(conversation)[:16]
        if id in rows:
            continue
        rows[id] = PromptWork(id, conversation, row)
        if row.tools or any(message.role == "tool" or message.tool_calls for message in row.messages):
            rows[id].drop("has_tools", "a conversation with tools cannot be told as a transcript")
        if len(rows) == stage.max_prompts:
            break
    return list(rows.values())


def _say_start(
    context: RunContext,
    stage: ConstitutionalStage,
    constitution: Constitution,
    prompts: PreparedPrompts,
    rows: Sequence[PromptWork],
) -> None:
    active = context.runtime.is_main
    for line in prompts.report.lines():
        say(f"{context.stage_name}: {line}", active=active)
    models = {role: config.model for role, config in speaker_configs(stage).items()}
    say(
        f"{context.stage_name}: {len(rows):,} different prompts; constitution {constitution.name} "
        f"{constitution.version}, {len(constitution.principles)} principles; "
        + ", ".join(f"{role} {model}" for role, model in models.items()),
        active=active,
    )


def _helpful(
    stage: ConstitutionalStage, context: RunContext, made: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of `data.helpful` to mix in, and their inputs; a set that is too small is used whole, and that is said."""
    if not stage.helpful_ratio or not context.config.data.helpful:
        return [], []
    rows, report, inputs = helpful_demonstrations(context.config.data)
    for line in report.lines():
        say(f"{context.stage_name}: {line}", active=context.runtime.is_main)
    found = outputs.mixed_in(rows, made, stage.helpful_ratio, stage.seed)
    wanted = round(stage.helpful_ratio * made)
    if len(found) < wanted:
        say(
            f"{context.stage_name}: WARN {len(found):,} helpful rows for {wanted:,} wanted "
            f"(stages.constitutional.helpful_ratio={stage.helpful_ratio:g})",
            active=context.runtime.is_main,
        )
    return found, inputs


def _price(stage: ConstitutionalStage, work: Work) -> float:
    """What all steps cost, each by the prices of the role that it asks."""
    configs, total = speaker_configs(stage), 0.0
    for step, spent in work.spent.items():
        config = configs[role_of(step)]
        total += spent.prompt_tokens * config.prompt_price + spent.new_tokens * config.completion_price
    return total / 1e6


def _write(
    context: RunContext,
    stage: ConstitutionalStage,
    made: Made,
    demonstrations: list[dict[str, Any]],
    speakers: dict[str, Speaker],
    numbers: dict[str, Any],
    constitution: Constitution,
) -> None:
    folder = context.stage_dir
    outputs.write_lines(folder / outputs.DEMONSTRATIONS, demonstrations)
    outputs.write_lines(folder / outputs.PREFERENCES, outputs.preferences(made.pairs))
    outputs.write_lines(folder / outputs.UNPAIRED, outputs.unpaired(made.rows, made.targets))
    outputs.append_lines(folder / outputs.LEFT_OUT, outputs.left_out(made.rows, made.pairs, made.faults))
    lines = list(outputs.traces(made.rows, made.targets, made.pairs, speakers))
    outputs.write_lines(folder / outputs.TRACE, lines)
    artifacts.write_json(folder / FIGURES, numbers)
    shown = random.Random(seed_of(stage.seed, "shown")).sample(lines, min(SHOWN_TRACES, len(lines)))
    title = f"Constitutional data: {folder}"
    words = f"constitution {constitution.name} {constitution.version}"
    artifacts.write_text(folder / REPORT, constitutional_page(numbers, shown, title, words))


def _manifest(
    stage: ConstitutionalStage,
    context: RunContext,
    prompts: PreparedPrompts,
    inputs: list[dict[str, str]],
    numbers: dict[str, Any],
) -> Manifest:
    record = stage_record(context.config, context.stage_name, context.run_dir)
    models = {
        role: config for role, config in speaker_configs(stage).items() if config.backend is not SpeakerBackend.server
    }
    made = [digest for role, config in models.items() for digest in input_digests(config.model, role)]
    own = {"name": "constitution", "path": stage.constitution, "digest": load_constitution(stage.constitution).digest}
    counts = prompts.report.counts()
    return Manifest(
        stage=context.stage_name,
        config=record,
        config_digest=artifacts.digest_value(record),
        inputs=[*made, *prompts.inputs, *inputs, own],
        outputs=artifacts.list_outputs(context.stage_dir, list(FILES)) if context.runtime.is_main else [],
        rows={
            "read": counts["read"], "kept": numbers["prompts"], "held_out": counts["held_out"],
            "dropped": {**counts["dropped"], **numbers["left_out"]},
        },
        metrics=_metrics(numbers),
        seed=stage.seed,
        world_size=context.runtime.world_size,
    )  # fmt: skip


def _metrics(numbers: dict[str, Any]) -> dict[str, float]:
    """The numbers that stand alone, by dotted name."""
    found = flat({name: numbers[name] for name in ("demonstrations", "rounds", "refusals", "words", "pairs")})
    return {name.replace(".", "/"): float(value) for name, value in found.items() if isinstance(value, int | float)}
