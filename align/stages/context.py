"""What every stage is given besides its own settings."""

import dataclasses
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from align.config.best import measured
from align.config.keys import EVERY_SLOT, slots_of
from align.config.redaction import redacted
from align.config.schema import RunConfig, StageConfig
from align.distributed.runtime import Runtime

RUN_DIR = "<run_dir>"


@dataclass(frozen=True)
class RunContext:
    """One stage's place in a run."""

    config: RunConfig
    runtime: Runtime
    run_dir: Path
    stage_name: str

    @property
    def stage_dir(self) -> Path:
        return self.run_dir / self.stage_name

    @property
    def cache_dir(self) -> Path:
        return Path(self.config.cache_dir).expanduser()


def plain(value: Any) -> Any:
    """A config as JSON types: enums by name, dataclasses as dictionaries."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


def stage_record(config: RunConfig, stage_name: str, run_dir: Path) -> dict[str, Any]:
    """The part of the config that decides a stage's result, with the run folder's place taken out.

    Other slots, where figures go and how states are sharded are left out: changing those makes no other model.
    """
    data, model = plain(config.data), plain(config.model)
    for slot in EVERY_SLOT - set(slots_of(config, stage_name)):
        del data[slot]
    del model["path"], model["pickled_weights"]
    settings = getattr(config.stages, stage_name)
    stage = plain(settings)
    if isinstance(settings, StageConfig):
        # Whether it may be ended early is no part of what it makes if it is not.
        del stage["prune"]
    record = {
        "stages": {stage_name: stage},
        "model": model,
        "data": data,
        "peft": plain(config.peft),
        "precision": plain(config.precision),
    }
    if measured(stage_name, getattr(config.stages, stage_name)):
        record["best"] = plain(config.best)
    # Redacted before it is compared too: a key that was changed makes no other model.
    return redacted(without_run_dir(record, str(run_dir)))


def saved_config(config: RunConfig) -> dict[str, Any]:
    """The whole config as it may be written down: JSON types, with *** for keys and passwords."""
    return redacted(plain(config))


def without_run_dir(value: Any, run_dir: str) -> Any:
    """JSON values with `<run_dir>` for the run folder's path."""
    if isinstance(value, dict):
        return {k: without_run_dir(v, run_dir) for k, v in value.items()}
    if isinstance(value, str):
        return value.replace(run_dir, RUN_DIR)
    return value


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as dotted keys."""
    items: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            items |= flat(inner, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = inner
    return items
