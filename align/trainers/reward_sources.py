"""What scores completions while a policy is trained: reward models and Python functions, behind one `scores`."""

import importlib
import math
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from align.artifacts import digest_file
from align.config.errors import UserError
from align.config.refusals import near
from align.config.rewards import KEY, RewardSetting
from align.config.schema import Layout
from align.data.forest import Tree, lay_out_scores
from align.data.records import Message, RowRefused
from align.data.template import Ids, Template
from align.models.layout import attach, plain_model
from align.models.reward import centred_scores
from align.models.score_sample import check_sample
from align.tracking.progress import say

NO_SCORE = math.nan
IDLE = Tree([0], ([0],))
"""The least that a model can be given, by a rank that waits for the others."""

FUNCTION_FAILED = "function_failed"
"""Marks the folder of a stage that ended because a reward function failed: the next run may have it changed."""

Read = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
"""(model, batch of `lay_out_scores`) -> centred scores (C,)."""


@dataclass(frozen=True)
class Answered:
    """One completion of a prompt, as tokens of the policy and as text."""

    prompt: tuple[Message, ...]
    tools: tuple[str, ...]
    prompt_ids: Ids
    completion_ids: Ids
    """With the stop token, if it came."""
    text: str
    """The completion without special tokens."""
    finished: bool
    """Whether it ended by itself, with a stop token."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """What the prompt came from."""


class FunctionFailed(UserError):
    """A reward function raised, or gave what are no scores. Once it is mended, the run can go on."""

    def __init__(self, reason: str):
        super().__init__(f"{reason}; then the same command goes on from the last checkpoint")


class FunctionReward:
    """A Python function as a reward: called as f(prompts=, completions=, rows=), one entry a completion.

    prompts: lists of messages as dicts with role and content; completions: texts; rows: dicts, as they are in the
    file. It returns one number a completion, None where there is none. The working directory is searched too.
    """

    def __init__(self, setting: RewardSetting):
        assert setting.function is not None
        self.setting = setting
        self.function = _imported_function(setting)

    def scores(self, answered: Sequence[Answered]) -> np.ndarray:
        """Scores (n,) in float64, NaN where the function gave None.

        Raises: FunctionFailed if the function fails, or does not give a finite number or None for each.
        """
        if not answered:
            return np.zeros(0)
        name = self.setting.function
        try:
            # Copies, so that what the function changes is changed for nobody else.
            found = self.function(
                prompts=[[message.as_dict() for message in one.prompt] for one in answered],
                completions=[one.text for one in answered],
                rows=[dict(one.row) for one in answered],
            )
        # Whatever a user's function raises is a message to that user.
        except Exception as error:
            raise FunctionFailed(f"{name}: {_in_words(error)}; mend the function") from error
        return _numbers(name, found, len(answered))


def function_digest(setting: RewardSetting) -> dict[str, str]:
    """A reward function as a manifest's input: the digest of its module's file; what that imports is not in it."""
    module = _imported_module(str(setting.function).partition(":")[0], str(setting.function))
    file = getattr(module, "__file__", None)
    digest = digest_file(Path(file)) if file and Path(file).is_file() else "built in"
    return {"name": f"rewards.{setting.name}", "path": str(setting.function), "digest": digest}


def _imported_function(setting: RewardSetting) -> Callable[..., Any]:
    module_name, _, name = str(setting.function).partition(":")
    where = f"{setting.where or f'{KEY}.{setting.name}.function'}={setting.function}"
    function = getattr(_imported_module(module_name, where), name, None)
    if function is None:
        defined = [word for word, value in vars(sys.modules[module_name]).items() if callable(value) and word[0] != "_"]
        raise UserError(f"{where}: {module_name} has no {name}{near(name, defined)}")
    if not callable(function):
        raise UserError(f"{where}: {name} is no function, it is of type {type(function).__name__}")
    return function


def _imported_module(name: str, where: str) -> ModuleType:
    here = os.getcwd()
    # First, as with `python -m`: a command that is installed does not look here by itself.
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        if absent:
            raise UserError(f"{where}: no module {error.name} is installed or in {here}") from error
        raise UserError(f"{where}: the module cannot be imported: {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _numbers(name: str | None, found: Any, wanted: int) -> np.ndarray:
    """The results of a function as float64 (n,), None as NaN. Raises: FunctionFailed unless there is one for each."""
    found = found.tolist() if isinstance(found, Tensor | np.ndarray) else found
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise FunctionFailed(f"{name} returned {type(found).__name__}; return a list with one number a completion")
    if len(found) != wanted:
        raise FunctionFailed(f"{name} returned {len(found)} scores for {wanted} completions; return one for each")
    return np.array([_number(name, at, value) for at, value in enumerate(found)], dtype=np.float64)


def _number(name: str | None, at: int, value: Any) -> float:
    if value is None:
        return NO_SCORE
    if isinstance(value, Tensor | np.generic) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise FunctionFailed(
            f"{name} returned {value!r:.80} for completion {at}; return a number, or None for no score"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if math.isinf(number):
        raise FunctionFailed(
            f"{name} returned {value!r:.80} for completion {at}; bound it, or return None for no score"
        )
    return number


class ModelReward:
    """A reward model as a reward: its scores, less the centre in its config.

    model: as `reference_engine` returns it, frozen. template: that of the reward model. If its digest is the policy's,
    tokens are scored as they were sampled; else prompt and text are written anew by the reward model's own template.
    layout: one that the model is proven to take. micro_batch_size: completions a forward on a rank.
    read: how scores are read where `model` is more than a reward model; it must already be attached to `layout`, and
    have `config`.
    """

    def __init__(
        self,
        setting: RewardSetting,
        model: nn.Module,
        template: Template,
        *,
        policy_template_digest: str,
        layout: Layout,
        micro_batch_size: int,
        accelerator: Accelerator,
        read: Read | None = None,
    ):
        assert layout is not Layout.auto, "prove_layout says which"
        if read is None:
            attach(model, layout)
        self.setting, self.model, self.template = setting, model, template
        self.same_tokens = template.digest == policy_template_digest
        self.layout, self.micro_batch_size, self.accelerator = layout, micro_batch_size, accelerator
        self.read = centred_scores if read is None else read
        text_config = (plain_model(model) if read is None else model).config.get_text_config()
        self.vocabulary: int = text_config.vocab_size
        self.context: int | None = getattr(text_config, "max_position_embeddings", None)

    def scores(self, answered: Sequence[Answered]) -> np.ndarray:
        """Centred scores (n,) in float64, NaN where the reward model's template or context does not take a completion.

        Call it on every rank, with as many completions as each has, none included.
        """
        return self.token_scores(
            [(one.prompt_ids, one.completion_ids) for one in answered] if self.same_tokens else self._encoded(answered)
        )

    def check_sample(self) -> None:
        """Prove that the model gives the scores that it had when it was saved. Call it on every rank.

        Raises: UserError if it does not.
        """
        half = self.accelerator.mixed_precision != "no" or any(p.dtype.itemsize == 2 for p in self.model.parameters())
        line = check_sample(str(self.setting.model), self.token_scores, torch.bfloat16 if half else torch.float32)
        if line is not None:
            say(line, active=self.accelerator.is_main_process)

    def token_scores(self, completions: Sequence[tuple[Ids, Ids] | None]) -> np.ndarray:
        """Centred scores (n,) in float64 of (prompt_ids, completion_ids), NaN for None and for what does not fit.

        Every rank runs as many forwards as the one with the most completions: ZeRO-3 gathers weights in each.
        """
        scores = np.full(len(completions), NO_SCORE)
        batches = self._batches(completions)
        turns = self._most_over_ranks(len(batches))
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for turn in range(turns):
                places = batches[turn] if turn < len(batches) else []
                found = self._forward(_trees([completions[place] for place in places]))
                if places:
                    scores[places] = found.double().cpu().numpy()
        self.model.train(training)
        return np.where(np.isfinite(scores), scores, NO_SCORE)

    def _forward(self, trees: Sequence[Tree]) -> Tensor:
        batch = lay_out_scores(trees or [IDLE], self.layout, self.template.tokenizer.pad_token_id or 0)
        return self.read(self.model, {key: value.to(self.accelerator.device) for key, value in batch.items()})

    def _most_over_ranks(self, count: int) -> int:
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).max())

    def _batches(self, completions: Sequence[tuple[Ids, Ids] | None]) -> list[list[int]]:
        """Places of what can be scored, in micro-batches: longest first, completions of one prompt side by side."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for place, pair in enumerate(completions):
            if pair is not None and self._fits(*pair):
                groups.setdefault(tuple(pair[0]), []).append(place)
        for places in groups.values():
            places.sort(key=lambda place: -len(completions[place][1]))
        longest = sorted(groups.items(), key=lambda group: -len(group[0]) - len(completions[group[1][0]][1]))
        order = [place for _, places in longest for place in places]
        return [order[i : i + self.micro_batch_size] for i in range(0, len(order), self.micro_batch_size)]

    def _fits(self, prompt_ids: Ids, completion_ids: Ids) -> bool:
        if not prompt_ids or not completion_ids:
            return False
        short = self.context is None or len(prompt_ids) + len(completion_ids) <= self.context
        # A policy with more embeddings than its tokenizer has tokens may sample one that this model does not have.
        return short and max(max(prompt_ids), max(completion_ids)) < self.vocabulary

    def _encoded(self, answered: Sequence[Answered]) -> list[tuple[Ids, Ids] | None]:
        """Each completion by the reward model's template, with a stop token only if it came; None where refused."""
        # Apart, not as several answers to a prompt: one that is refused takes no other with it.
        rows = [(one.prompt, (Message("assistant", one.text),), one.tools) for one in answered]
        found: list[tuple[Ids, Ids] | None] = []
        for one, encoded in zip(answered, self.template.encode_trees(rows), strict=True):
            if isinstance(encoded, RowRefused):
                found.append(None)
                continue
            prompt_ids, [completion_ids] = encoded
            found.append((prompt_ids, completion_ids if one.finished else completion_ids[:-1]))
        return found


def _trees(completions: Sequence[tuple[Ids, Ids]]) -> list[Tree]:
    """Neighbours with the same prompt share a tree."""
    grouped = groupby(completions, key=lambda pair: pair[0])
    return [Tree(prompt, [ids for _, ids in pairs]) for prompt, pairs in grouped]
