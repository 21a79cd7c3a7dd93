"""An out-of-memory error as one line: what did not fit, and what would."""

import sys
from typing import Any

from align.config.errors import UserError
from align.config.schema import StageConfig
from align.data.prepare import Prepared
from align.distributed.memory import FITS, size_words, usable
from align.distributed.zero import Choice
from align.stages.context import RunContext
from align.stages.longest import longest_rows, rows_of
from align.stages.needs import Setup, worst
from align.stages.rows import load_template, tokenised
from align.stages.sharding import choose_sharding, in_words, overrides_that_fit, this_target
from align.tracking.progress import say
from align.trainers.out_of_memory import BatchOutOfMemory, is_out_of_memory

LESS = 0.85
"""Share of the estimate that did not fit below which another setting is offered."""


def memory_refusal(error: BaseException, context: RunContext) -> UserError | None:
    """The line for an out-of-memory error in a stage, with overrides from the estimate; None for any other error.

    Ranks run out of memory one by one, so a rank other than the first says the line itself: nobody else would.
    """
    if not is_out_of_memory(error):
        return None
    run, name = context.runtime, context.stage_name
    rank = f"rank {run.rank} of {run.world_size} " if run.world_size > 1 else ""
    where = f"{name}: {rank}ran out of memory"
    if isinstance(error, BatchOutOfMemory):
        where += f" at step {error.step}, in a micro-batch of {error.rows:,} rows and {error.tokens:,} tokens"
    line = f"{where}; {_help(context)}"
    if any((context.stage_dir / "checkpoints").glob("checkpoint-*")):
        # What helps belongs to a checkpoint, so none can be taken up with it.
        line += f"; delete {context.stage_dir} first, or use another run_dir"
    if not run.is_main:
        print(f"align: {line}", file=sys.stderr)
    return UserError(line)


def _help(context: RunContext) -> str:
    """Overrides that take clearly less than what was tried, and fit by the estimate."""
    stage = getattr(context.config.stages, context.stage_name)
    if not isinstance(stage, StageConfig):
        return _smaller_batch(context.stage_name, stage)
    setup = _setup(context, stage)
    try:
        choice: Choice = choose_sharding(setup)
        took = worst(setup, choice.sharding)
    except UserError:
        return _smaller_batch(context.stage_name, stage)
    limit = min(FITS * usable(setup.target.memory), LESS * took.peak)
    found = overrides_that_fit(setup, choice.sharding, limit)
    return f"{in_words(found)} (counted were {size_words(took.peak)} a rank; do=plan shows for what)"


def _setup(context: RunContext, stage: StageConfig) -> Setup:
    """The stage as it ran, with its rows from the cache."""
    config, name = context.config, context.stage_name
    try:
        prepared: Prepared = tokenised(config, name, load_template(config, stage.policy), lambda done, total: None)
        rows = rows_of(stage, prepared)
    except (UserError, OSError) as error:
        say(f"{name}: rows are taken to be as long as they may be ({error})", active=context.runtime.is_main)
        rows = longest_rows(stage, str(error))
    return Setup(config, name, rows, this_target(config, context.runtime))


def _smaller_batch(name: str, stage: Any) -> str:
    """For a stage that trains nothing, of which nothing is counted: its own batch, halved."""
    key = "micro_batch_size" if hasattr(stage, "micro_batch_size") else "batch_size"
    size = getattr(stage, key)
    return f"use stages.{name}.{key}={size // 2}" if size > 1 else "use a smaller model, or a device with more memory"
