"""Which ZeRO stage a run takes, and what to change where it does not fit: both from the estimate of `needs`."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations, product
from typing import Any

from align.config.errors import UserError
from align.config.schema import Offload, PeftMethod, PPOStage, RunConfig, StageConfig, ZeroChoice
from align.data.prepare import Prepared
from align.distributed import zero
from align.distributed.devices import device_memory, host_share
from align.distributed.memory import FITS, Sharding, size_words, usable
from align.distributed.runtime import Runtime
from align.distributed.zero import Choice
from align.models.load import use_bf16
from align.stages.context import RunContext
from align.stages.longest import Rows, longest_rows, rows_of
from align.stages.needs import Setup, Target, worst
from align.trainers.order import Lengths

OFFERED = 3
"""Overrides that a refusal names."""
FEWER_ROWS_BELOW = 128
"""Tokens below which max_tokens is not lowered: what is left would hardly be the task."""


def this_target(config: RunConfig, run: Runtime) -> Target:
    """The machine that this process is on, under the launcher that it has."""
    cuda = run.device.startswith("cuda")
    return Target(run.world_size, device_memory(run.device), host_share(), cuda, use_bf16(config.precision, run.device))


def session_choice(context: RunContext, prepared: Prepared) -> Choice:
    """How a stage that is about to begin spreads its states. Only for `auto` is anything counted.

    Raises: UserError with overrides that would fit, if `auto` finds nothing that does.
    """
    config, run, name = context.config, context.runtime, context.stage_name
    if config.deepspeed.mode is not ZeroChoice.auto:
        return zero.choose(config.deepspeed, ranks=run.world_size, memory=0.0, peak=lambda _: 0.0)
    setup = Setup(config, name, rows_of(getattr(config.stages, name), prepared), this_target(config, run))
    try:
        choice = choose_sharding(setup)
    except UserError as error:
        # What cannot be counted may still be trained, or is refused in better words when it is loaded.
        choice = zero.choose(config.deepspeed, ranks=run.world_size, memory=float("inf"), peak=lambda _: 0.0)
        return replace(choice, reason=f"its memory cannot be counted: {error}")
    refuse_too_large(setup, choice)
    return choice


def planned_bytes(context: RunContext, prepared: Prepared, zero_stage: int | None) -> float:
    """What `do=plan` says that a rank takes of its device at most; 0 where that cannot be counted."""
    config, run, name = context.config, context.runtime, context.stage_name
    offload = zero_stage is not None and config.deepspeed.offload is Offload.cpu
    setup = Setup(config, name, rows_of(getattr(config.stages, name), prepared), this_target(config, run))
    try:
        return worst(setup, Sharding(zero_stage, offload, run.world_size)).peak
    except UserError:
        return 0.0


def choose_sharding(setup: Setup) -> Choice:
    """The choice of `zero.choose` for a stage, by all that it takes."""
    target = setup.target
    return zero.choose(
        setup.config.deepspeed,
        ranks=target.ranks,
        memory=target.memory,
        peak=lambda sharding: worst(setup, sharding).peak,
    )


def refuse_too_large(setup: Setup, choice: Choice) -> None:
    """Raises: UserError with overrides that would fit, if `choice` does not."""
    if choice.fits:
        return
    need, target = worst(setup, choice.sharding), setup.target
    found = overrides_that_fit(setup, choice.sharding, FITS * usable(target.memory))
    raise UserError(
        f"{setup.name}: takes about {size_words(need.peak)} a rank in the {need.peak_moment} even with "
        f"deepspeed={choice.sharding.name}, and there are {size_words(target.memory)}; {in_words(found)}; "
        "do=plan shows what takes it, and a deepspeed= that you name yourself is tried as it is"
    )


def in_words(overrides: list[str]) -> str:
    """Overrides as the end of a refusal."""
    return "this would fit: " + ", or ".join(overrides) if overrides else "nothing here makes it fit; use more ranks"


# Overrides.


@dataclass(frozen=True)
class Way:
    """A change to the command line: what it says, and what the stage is with it."""

    text: str
    setup: Setup
    sharding: Sharding


Change = Callable[[Way], Way]


def overrides_that_fit(setup: Setup, sharding: Sharding, limit: float) -> list[str]:
    """Up to three changes, each enough by itself to take at most `limit` bytes a rank; the smallest changes first.

    One key alone if that is enough, else two or three together. None that contains another is named.
    """
    start = Way("", setup, sharding)
    kinds = _kinds(start)
    found: list[str] = []
    used: list[set[int]] = []
    for size in (1, 2, 3):
        for chosen in combinations(range(len(kinds)), size):
            if any(earlier <= set(chosen) for earlier in used):
                continue
            way = _first_that_fits(start, [kinds[kind] for kind in chosen], limit)
            if way is not None:
                found.append(way.text.strip())
                used.append(set(chosen))
            if len(found) == OFFERED:
                return found
    return found


def _first_that_fits(start: Way, kinds: list[list[Change]], limit: float) -> Way | None:
    """The mildest changes, one of each kind, with which the stage fits."""
    # Where the strongest of each are not enough, none is.
    if not _fits(_after(start, [changes[-1] for changes in kinds]), limit):
        return None
    return next(way for changes in product(*kinds) if _fits(way := _after(start, list(changes)), limit))


def _after(way: Way, changes: list[Change]) -> Way:
    for change in changes:
        way = change(way)
    return way


def _fits(way: Way, limit: float) -> bool:
    need, host = worst(way.setup, way.sharding), way.setup.target.host
    return need.peak <= limit and (host is None or need.host <= host)


def _kinds(way: Way) -> list[list[Change]]:
    """Kinds of changes, those that change no result first; in each the mildest first."""
    setup, stage = way.setup, way.setup.stage
    shared = isinstance(stage, PPOStage) and setup.adapters
    per_rank = stage.batch_size // setup.target.ranks
    smaller = [size for size in range(stage.micro_batch_size - 1, 0, -1) if per_rank % size == 0]
    kinds: list[list[Change]] = [[partial(_set, key="micro_batch_size", value=size) for size in smaller]]
    if not stage.activation_checkpointing and not shared:
        kinds.append([partial(_set, key="activation_checkpointing", value=True)])
    kinds.append([partial(_shard, to=to) for to in _further(way.sharding)])
    if isinstance(stage, PPOStage):
        if not stage.offload_frozen:
            kinds.append([partial(_set, key="offload_frozen", value=True)])
        halves = [stage.rollout_batch_size // 2**n for n in range(1, 7)]
        kinds.append([partial(_set, key="rollout_batch_size", value=size) for size in halves if size])
    if not setup.adapters:
        kinds.append([_with_adapters])
    shorter = [stage.max_tokens // 2**n for n in range(1, 8)]
    lowest = max(FEWER_ROWS_BELOW, stage.max_new_tokens + 1 if isinstance(stage, PPOStage) else 0)
    kinds.append([partial(_set, key="max_tokens", value=tokens) for tokens in shorter if tokens >= lowest])
    return [changes for changes in kinds if changes]


def _further(sharding: Sharding) -> Iterator[Sharding]:
    """What shards more than this, the least first."""
    ranks, offload = sharding.ranks, sharding.offload
    plain = [] if offload or ranks == 1 else [stage for stage in (1, 2, 3) if stage > (sharding.stage or 0)]
    yield from (Sharding(stage, False, ranks) for stage in plain)
    yield from (Sharding(stage, True, ranks) for stage in (2, 3) if not offload or stage > (sharding.stage or 0))


def _shard(way: Way, to: Sharding) -> Way:
    settings = replace(
        way.setup.config.deepspeed,
        mode=ZeroChoice.zero,
        stage=to.stage,
        offload=Offload.cpu if to.offload else Offload.none,
    )
    config = replace(way.setup.config, deepspeed=settings)
    return Way(f"{way.text} deepspeed={to.name}", replace(way.setup, config=config), to)


def _with_adapters(way: Way) -> Way:
    config = way.setup.config
    setup = replace(way.setup, config=replace(config, peft=replace(config.peft, method=PeftMethod.lora)))
    return Way(f"{way.text} peft=lora", setup, way.sharding)


def _set(way: Way, key: str, value: Any) -> Way:
    setup = way.setup
    stage = replace(setup.stage, **{key: value})
    config = replace(setup.config, stages=replace(setup.config.stages, **{setup.name: stage}))
    rows = setup.rows
    if not rows.known:
        rows = longest_rows(stage, rows.source)
    elif key == "max_tokens":
        rows = _shorter_rows(stage, rows)
    text = f"{way.text} stages.{setup.name}.{key}={str(value).lower() if isinstance(value, bool) else value}"
    return Way(text, replace(setup, config=config, rows=rows), way.sharding)


def _shorter_rows(stage: StageConfig, rows: Rows) -> Rows:
    """Without those that are too long for the stage now."""
    room = stage.max_tokens - (stage.max_new_tokens if isinstance(stage, PPOStage) else 0)
    kept = rows.lengths.widest <= room
    if not kept.any():
        return longest_rows(stage, rows.source)
    lengths = Lengths(*(getattr(rows.lengths, field.name)[kept] for field in fields(rows.lengths)))
    return Rows(lengths, int(kept.sum()), rows.source)
