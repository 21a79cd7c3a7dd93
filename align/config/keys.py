"""The schema as dotted keys: which exist, what type each has, what it means, and which one a typo was meant to be."""

import ast
import dataclasses
import difflib
import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from align.config import schema
from align.config.best import slots_for
from align.config.schema import RunConfig

SLOTS = {
    "pretrain": "text",
    "sft": "demonstrations",
    "reward": "preferences",
    "score": "demonstrations",
    "dpo": "preferences",
    "ppo": "prompts",
    "constitutional": "prompts",
    "evaluate": "prompts",
    "classify": "demonstrations",
    "export": "prompts",
}
"""Stage -> the data slot that it reads."""
ALSO_READ = {"reward": ("demonstrations",)}
"""Stage -> further slots that it reads: a reward model's zero is its mean score on demonstrations."""


EVERY_SLOT = frozenset({*SLOTS.values(), "helpful"})


def slots_of(config: RunConfig, stage: str) -> tuple[str, ...]:
    """Every slot that a stage of the run reads."""
    mixed: tuple[str, ...] = ()
    if stage == "ppo" and config.stages.ppo is not None and config.stages.ppo.pretraining_weight > 0:
        mixed = ("text",)
    judged = config.stages.evaluate
    if stage == "evaluate" and judged is not None:
        wanted = {"preferences": judged.max_pairs, "text": judged.max_texts, "demonstrations": judged.few_shot}
        mixed = tuple(slot for slot, count in wanted.items() if count and getattr(config.data, slot))
    made = config.stages.constitutional
    if stage == "constitutional" and made is not None and made.helpful_ratio > 0 and config.data.helpful:
        mixed = ("helpful",)
    mixed += tuple(slot for slot in slots_for(config, stage) if slot != SLOTS[stage])
    return (SLOTS[stage], *ALSO_READ.get(stage, ()), *mixed)


@dataclass(frozen=True)
class Key:
    """One setting of the run."""

    path: str
    owner: type
    """The dataclass that holds it."""
    type: Any
    note: str
    """The line under the field in the schema."""

    @property
    def leaf(self) -> str:
        return self.path.rsplit(".", 1)[-1]

    @property
    def open(self) -> bool:
        """True where keys below this one are the user's own (a dictionary, or a value of any shape)."""
        return self.type is Any or get_origin(self.type) is dict


@cache
def keys() -> dict[str, Key]:
    """Every key of the schema that holds a value, in schema order."""
    return {key.path: key for key in _walk(RunConfig, "")}


@cache
def sections() -> tuple[str, ...]:
    """Dotted names that hold keys, not values: model, stages.dpo ..."""
    parents = {path.rsplit(".", 1)[0] for path in keys() if "." in path}
    return tuple(sorted(parents | {parent.rsplit(".", 1)[0] for parent in parents}))


def find(path: str) -> Key | None:
    """The key at `path`, or the open key that `path` lies below."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        key = keys().get(".".join(parts[:length]))
        if key is not None:
            return key if length == len(parts) or key.open else None
    return None


def nearest(path: str, run: list[str]) -> list[str]:
    """Up to three keys that `path` may have been meant to be; those of stages in `run` come first."""
    scored = {key.path: _likeness(path, key.path) for key in keys().values()}
    best = max(scored.values())
    if best < 0.7:
        return []
    close = [key for key, score in scored.items() if score > best - 0.01]
    running = [key for key in close if stage_of(key) is None or stage_of(key) in run]
    return (running or close)[:3]


def stage_of(path: str) -> str | None:
    """The stage that a key belongs to; None for a key that all stages share."""
    parts = path.split(".")
    return parts[1] if parts[0] == "stages" and len(parts) > 1 else None


def _likeness(typed: str, path: str) -> float:
    whole = difflib.SequenceMatcher(None, typed, path).ratio()
    ends = difflib.SequenceMatcher(None, typed.rsplit(".", 1)[-1], path.rsplit(".", 1)[-1]).ratio()
    if "." in typed:
        return (whole + ends) / 2
    return max(whole, ends)


def _walk(owner: type, prefix: str) -> list[Key]:
    found, hints = [], get_type_hints(owner)
    for field in dataclasses.fields(owner):
        kind = _without_none(hints[field.name])
        if dataclasses.is_dataclass(kind):
            found += _walk(kind, f"{prefix}{field.name}.")
        else:
            found.append(Key(prefix + field.name, owner, kind, _note(owner, field.name)))
    return found


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) is Union:
        return next(kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


def _note(owner: type, field: str) -> str:
    notes = (_notes().get((ancestor.__name__, field)) for ancestor in owner.__mro__)
    return next((note for note in notes if note), "")


@cache
def _notes() -> dict[tuple[str, str], str]:
    """(class, field) -> the string under the field, which Python itself throws away."""
    found = {}
    for definition in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(definition, ast.ClassDef):
            continue
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[definition.name, field.target.id] = " ".join(str(text.value.value).split())
    return found
