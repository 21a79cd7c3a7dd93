"""The rows of a trained stage: prepared before any process group starts, found in the cache by the stage itself."""

from collections.abc import Callable
from pathlib import Path

from align import artifacts
from align.config.errors import UserError
from align.config.keys import slots_of
from align.config.schema import PPOStage, RewardStage, RewardTarget, RunConfig, StageConfig
from align.data.bad_rows import TooManyBadRows
from align.data.prepare import (
    Prepared,
    Watch,
    prepare_comparisons,
    prepare_demonstrations,
    prepare_preferences,
    prepare_prompt_rows,
    prepare_ratings,
    prepare_text,
)
from align.data.template import Template, chat_template_text
from align.distributed.runtime import launched_local_rank
from align.models import load
from align.tracking.progress import Progress, say

BAD_ROWS = "bad_rows.jsonl"

PREPARE: dict[str, Callable[..., Prepared]] = {
    "pretrain": prepare_text,
    "sft": prepare_demonstrations,
    "reward": prepare_comparisons,
    "dpo": prepare_preferences,
    "ppo": prepare_prompt_rows,
}
"""Trained stage -> what makes its rows."""


def trained_stages(config: RunConfig) -> list[str]:
    """The stages of the run that train on rows, in order."""
    return [name for name in config.run if name in PREPARE]


def starting_model(config: RunConfig, name: str) -> str:
    """The model that the chain up to stage `name` starts from: its policy, or that of the stage that makes it."""
    policy = getattr(config.stages, name).policy
    for earlier in reversed(config.run[: config.run.index(name)]):
        if policy == f"{config.run_dir}/{earlier}/policy":
            policy = getattr(config.stages, earlier).policy
    return policy


def row_tokens(stage: StageConfig) -> int:
    """Longest row of a stage; a prompt of PPO leaves room for its completion."""
    return stage.max_tokens - stage.max_new_tokens if isinstance(stage, PPOStage) else stage.max_tokens


def load_template(config: RunConfig, model: str) -> Template:
    """The tokenizer of a model with its chat template, or the one that `model.chat_template` names."""
    return Template(load.load_tokenizer(model, config.model, chat_template_text(config.model.chat_template)))


def prepare_rows(config: RunConfig, name: str, template: Template, stage_dir: Path) -> Prepared:
    """The rows of stage `name`, from the cache or made now, with progress from the first rank of each node.

    Raises: UserError by the policy for bad rows, after writing them to the stage's folder.
    """
    progress = Progress(f"{name}: tokenising", None, active=launched_local_rank() == 0, passing=True, unit="rows")
    try:
        return tokenised(config, name, template, progress.show_of)
    except TooManyBadRows as error:
        file = stage_dir / BAD_ROWS
        if launched_local_rank() == 0:
            error.bad_rows.write(file)
        raise UserError(f"{error}; all are listed in {file}") from error
    finally:
        progress.close()


def tokenised(config: RunConfig, name: str, template: Template, watch: Watch) -> Prepared:
    """The rows of stage `name`, from the cache or made now. Raises: TooManyBadRows by the policy for bad rows."""
    stage: StageConfig = getattr(config.stages, name)
    prepare = prepare_ratings if _learns_ratings(stage) else PREPARE[name]
    return prepare(config.data, template, row_tokens(stage), Path(config.cache_dir).expanduser(), watch)


def _learns_ratings(stage: StageConfig) -> bool:
    return isinstance(stage, RewardStage) and stage.objective is not RewardTarget.comparison


def maker_of(config: RunConfig, slot: str) -> str | None:
    """The stage that makes the rows of a slot, where the slot reads a file of this run's folder."""
    value = getattr(config.data, slot)
    if not isinstance(value, str):
        return None
    folder = Path(value).parent
    return folder.name if folder.parent == Path(config.run_dir) else None


def prepare_ahead(config: RunConfig, run_dir: Path) -> None:
    """Tokenise for every trained stage that is not complete, before any process group starts.

    Ranks that wait for one that tokenises would else run into the group's timeout. A chain hands its tokenizer on, so
    that of the model it starts from makes the same rows; should a stage find another, it tokenises for itself. Rows
    that an earlier stage of the run is still to make are left to the stage that reads them.
    """
    for name in trained_stages(config):
        makers = [maker_of(config, slot) for slot in slots_of(config, name)]
        waits = any(maker and artifacts.read_manifest(run_dir / maker) is None for maker in makers)
        if artifacts.read_manifest(run_dir / name) is None and not waits:
            prepare_rows(config, name, load_template(config, starting_model(config, name)), run_dir / name)


def report_rows(name: str, prepared: Prepared, stage_dir: Path) -> None:
    """Say what became of the rows and list those left out; for rank 0.

    Raises: UserError if none is left to train on.
    """
    report, file = prepared.report, stage_dir / BAD_ROWS
    for line in report.lines():
        say(f"{name}: {line}")
    report.bad_rows.write(file)
    if len(prepared.train) == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in report.dropped.items())
        raise UserError(
            f"{name}: none of {report.read} rows is left to train on ({reasons}); see {file}, and mend the rows or "
            f"change stages.{name}.max_tokens={report.max_tokens}"
        )
