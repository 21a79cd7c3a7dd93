"""`do=plan` of a trained stage: memory by ZeRO option, batches, steps and checkpoints."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align import artifacts
from align.config.errors import UserError
from align.config.keys import slots_of
from align.config.schema import PPOStage, PretrainStage, RewardStage, RunConfig, SFTStage
from align.distributed import memory
from align.distributed.memory import FITS, GIB, Need, Sharding, size_words, usable, verdict
from align.distributed.zero import Choice
from align.models.load import TOKENIZER_FILES
from align.stages.longest import Rows, layout_of, longest_rows, rows_of
from align.stages.needs import Setup, Target, frozen_models, needs, origin, trained_models, worst
from align.stages.rows import load_template, maker_of, starting_model, tokenised
from align.stages.sharding import choose_sharding, in_words, overrides_that_fit
from align.trainers.arguments import accumulation_steps

TOKENISING_SECONDS = 4.0
"""How long rows are tokenised for a plan; `do=check` takes the time it needs, and a plan then finds them."""
PARTS = ("weights", "gradients", "optimizer", "other models", "activations", "logits", "buffers")
"""Columns of the table; what else a moment takes is counted with the buffers."""


class TooSlow(Exception):
    """Tokenising takes longer than a plan may."""


def planned_rows(config: RunConfig, name: str) -> Rows:
    """The lengths of a stage's rows: of the real ones if they can be had quickly, else as long as they may be."""
    stage = getattr(config.stages, name)
    for maker in (maker_of(config, slot) for slot in slots_of(config, name)):
        if maker and artifacts.read_manifest(Path(config.run_dir) / maker) is None:
            return longest_rows(stage, f"stage {maker} has not made them yet")
    model = starting_model(config, name)
    if Path(model).is_dir() and not any((Path(model) / file).is_file() for file in TOKENIZER_FILES):
        return longest_rows(stage, f"{model} has no tokenizer")
    try:
        template = load_template(config, model)
        return rows_of(stage, tokenised(config, name, template, _deadline()))
    except TooSlow:
        return longest_rows(stage, "not tokenised yet; do=check does it, and the next plan counts them")
    except UserError as error:
        return longest_rows(stage, str(error))


def _deadline() -> Callable[[int, int | None], None]:
    until = time.monotonic() + TOKENISING_SECONDS

    def watch(done: int, total: int | None) -> None:
        if time.monotonic() > until:
            raise TooSlow

    return watch


@dataclass
class StagePlan:
    """A stage with its rows and the choice that a run would make."""

    setup: Setup
    choice: Choice

    def lines(self) -> list[str]:
        """All that is told of the stage."""
        return [
            *_model_lines(self.setup),
            *_batch_lines(self.setup),
            *_activation_lines(self.setup, self.choice.sharding),
            "",
            *_table(self.setup, self.choice),
            *_choice_lines(self.setup, self.choice),
        ]

    def checkpoint(self) -> float:
        """Bytes of a checkpoint on disk."""
        shapes, setup = trained_models(self.setup), self.setup
        trained, frozen = sum(shape.trained for shape in shapes), sum(shape.frozen for shape in shapes)
        form = setup.form(self.choice.sharding)
        return memory.checkpoint_bytes(trained, frozen, self.choice.sharding, form, adapters=setup.adapters)

    def finished(self) -> float:
        """Bytes of what the stage leaves: its models whole, in the precision of the run, and its adapters."""
        shapes, size = trained_models(self.setup), 2 if self.setup.target.bf16 else 4
        adapters = sum(shape.adapter for shape in shapes)
        return float(size * sum(shape.parameters for shape in shapes) + 4 * adapters)


def plan_stage(config: RunConfig, name: str, target: Target) -> StagePlan:
    """The plan of one trained stage. Raises: UserError for a batch that does not divide among the ranks."""
    accumulation_steps(getattr(config.stages, name), target.ranks)
    setup = Setup(config, name, planned_rows(config, name), target)
    return StagePlan(setup, choose_sharding(setup))


# Parts.


def _model_lines(setup: Setup) -> list[str]:
    shape, start = setup.policy(), origin(setup.config, setup.stage.policy)
    method = setup.config.peft.method.value
    trained = f"peft={method} trains {shape.adapter:,} beside them" if shape.adapter else "all trained"
    lines = [f"{setup.name}", f"model    {start}: {shape.parameters:,} parameters, {trained}"]
    if isinstance(setup.stage, PPOStage):
        models = trained_models(setup)
        if len(models) > 1:
            lines.append(f"         value model: {models[1].parameters:,} parameters, all trained")
        for name, frozen in frozen_models(setup).items():
            lines.append(f"         {name}: {frozen.parameters:,} parameters, read only")
    if shape.quantised:
        lines.append(f"         {shape.quantised:,} of them in 4 bits")
    if not shape.checked:
        lines.append("         activations of this model type are not checked; they may be twice what is counted")
    return lines


def _batch_lines(setup: Setup) -> list[str]:
    stage, rows = setup.stage, setup.rows
    accumulation = accumulation_steps(stage, setup.target.ranks)
    unit = {SFTStage: "rows", PretrainStage: "rows", PPOStage: "completions"}.get(type(stage), "trees")
    steps = _steps(setup)
    warmup = math.ceil(steps * stage.warmup_fraction) if steps is not None else None
    counted = f"{rows.count:,} to train on, with their real lengths" if rows.known else f"not known: {rows.source}"
    words = f"{steps:,} in all, {warmup:,} of them warm-up" if steps is not None else "not known"
    lines = [
        f"rows     {counted}",
        *([] if rows.known else [f"         each is taken to be as long as max_tokens={stage.max_tokens} allows"]),
        f"batch    micro_batch_size {stage.micro_batch_size} x accumulation {accumulation} x ranks "
        f"{setup.target.ranks} = {stage.batch_size} {unit} a step",
        f"steps    {words}{_epoch_words(setup)}",
    ]
    if isinstance(stage, PPOStage):
        lines.append(f"updates  {stage.completions_per_update} completions, {_steps_an_update(stage)} steps each")
    return lines


def _epoch_words(setup: Setup) -> str:
    each = _steps_an_epoch(setup)
    return "" if each is None or isinstance(setup.stage, PPOStage) else f"; {each:,} an epoch"


def _rows_to_batch(setup: Setup) -> int | None:
    """Rows as batches count them: packed ones are about as many as their tokens fill."""
    stage, rows = setup.stage, setup.rows
    if isinstance(stage, SFTStage | PretrainStage) and stage.packing and rows.known:
        return math.ceil(int(rows.lengths.row.sum()) / stage.max_tokens)
    return rows.count


def _steps_an_epoch(setup: Setup) -> int | None:
    rows = _rows_to_batch(setup)
    return None if rows is None else math.ceil(rows / setup.stage.batch_size)


def _steps_an_update(stage: PPOStage) -> int:
    return stage.update_epochs * (stage.completions_per_update // stage.batch_size)


def _steps(setup: Setup) -> int | None:
    """Optimizer steps of the stage; None where rows are not known and no max_steps is set."""
    stage, rows = setup.stage, setup.rows
    if isinstance(stage, PPOStage):
        prompts = stage.completions_per_update // stage.completions_per_prompt
        if stage.max_steps is None and rows.count is None:
            return None
        updates = stage.max_steps or max(1, int(stage.epochs * (rows.count or 0) / prompts))
        return updates * _steps_an_update(stage)
    if stage.max_steps is not None:
        return stage.max_steps
    each = _steps_an_epoch(setup)
    return None if each is None else math.ceil(stage.epochs * each)


def _activation_lines(setup: Setup, sharding: Sharding) -> list[str]:
    """The longest micro-batch, and its activations with and without checkpointing."""
    stage, batch = setup.stage, setup.batch()
    kept = {True: 0.0, False: 0.0}
    for checkpointing in kept:
        changed = replace(stage, activation_checkpointing=checkpointing)
        stages = replace(setup.config.stages, **{setup.name: changed})
        other = replace(setup, config=replace(setup.config, stages=stages))
        moments = needs(other, sharding)["training"].moments
        kept[checkpointing] = moments["backward pass"]["activations"]
    packed = isinstance(stage, SFTStage | PretrainStage) and stage.packing
    layout = "packed" if packed else layout_of(stage).value
    return [
        f"longest  micro-batch: {batch.tokens:,} positions ({layout}), {_scored_words(setup)}",
        f"         activations {size_words(kept[False])}, with activation_checkpointing {size_words(kept[True])}",
    ]


def _scored_words(setup: Setup) -> str:
    stage, scored = setup.stage, setup.batch().scored
    if isinstance(stage, RewardStage):
        return "no logits"
    if isinstance(stage, PPOStage):
        return f"logits of {scored:,}, in fp32 a chunk at a time"
    if isinstance(stage, SFTStage | PretrainStage):
        whole = memory.logits_are_whole(setup.batch().tokens, setup.policy().vocabulary)
        return "small logits, whole" if whole else "logits a tile at a time"
    return f"logits of {scored:,} in fp32, whole"


def _table(setup: Setup, choice: Choice) -> list[str]:
    """A row for each option: GiB a rank at the moment that takes most, and what is left."""
    target = setup.target
    all_needs = {sharding: worst(setup, sharding) for sharding in memory.options(target.ranks)}
    unit, size = ("GiB", GIB) if max(need.peak for need in all_needs.values()) >= GIB else ("MiB", 2**20)
    head = "".join(f"{name:>13}" for name in (*PARTS, "peak", "headroom"))
    lines = [f"  {unit} a rank     {head}"]
    for sharding, need in all_needs.items():
        numbers = "".join(f"{part / size:>13,.1f}" for part in (*_columns(need), need.peak))
        left = (usable(target.memory) - need.peak) / size
        mark = ">" if sharding == choice.sharding else " "
        words = verdict(need.peak, target.memory) + _where(setup, sharding, need)
        lines.append(f"{mark} {sharding.name:<15}{numbers}{left:>13,.1f}  {words}")
    return lines


def _columns(need: Need) -> list[float]:
    moment = need.moments[need.peak_moment]
    found = {name: need.kept.get(name, 0.0) + moment.get(name, 0.0) for name in PARTS}
    found["buffers"] += sum(size for name, size in moment.items() if name not in PARTS)
    return list(found.values())


def _where(setup: Setup, sharding: Sharding, need: Need) -> str:
    """The phase and moment of a peak that is not in the backward pass, and the main memory that is needed."""
    phase = next(name for name, one in needs(setup, sharding).items() if one.peak == need.peak)
    moment = "" if need.peak_moment == "backward pass" else f"; most in the {phase}"
    if phase == "training" and moment:
        moment = f"; most in {'the ' if need.peak_moment == 'optimizer step' else ''}{need.peak_moment}"
    host = f"; {size_words(need.host)} of main memory" if need.host else ""
    return moment + host


def _choice_lines(setup: Setup, choice: Choice) -> list[str]:
    asked = f"deepspeed={setup.config.deepspeed.mode.value}"
    if choice.reason in ("asked for", "deepspeed=none"):
        peak = worst(setup, choice.sharding).peak
        fits = verdict(peak, setup.target.memory) != "does not fit"
        line = f"takes    {choice.sharding.name}, which was asked for"
    else:
        fits = choice.fits
        line = f"takes    {asked} -> {choice.sharding.name}: {choice.reason}"
    if fits:
        return ["", line]
    found = overrides_that_fit(setup, choice.sharding, FITS * usable(setup.target.memory))
    refused = "" if choice.fits else "; a run is refused"
    return ["", f"{line}{refused}", f"         {in_words(found)}"]


# Disk.


def disk_lines(config: RunConfig, plans: list[StagePlan]) -> list[str]:
    """Checkpoints go when their stage is complete, so the disk needs those of one stage beside all that is finished."""
    run_dir, done, most = Path(config.run_dir), 0.0, 0.0
    lines = []
    for plan in plans:
        count = _checkpoints(plan.setup.stage)
        checkpoints = count * plan.checkpoint()
        most = max(most, done + max(checkpoints + plan.finished(), 2 * plan.finished()))
        done += plan.finished()
        sizes = f"{count} checkpoints of {size_words(plan.checkpoint())}, then {size_words(plan.finished())}"
        lines.append(f"         {plan.setup.name}: {sizes}")
    folder = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(folder).free
    words = "enough" if free > most else "too little: use another run_dir, or fewer keep_checkpoints"
    return [f"disk     {size_words(most)} at most in {run_dir}, {size_words(free)} free: {words}", *lines]


def _checkpoints(stage: Any) -> int:
    """As many as there are at a time: a new one is written before the oldest goes."""
    return stage.keep_checkpoints + 1 + int(stage.keep_best) if stage.save_every else 0
