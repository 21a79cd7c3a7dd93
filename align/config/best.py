"""The figures that `best_by` may name: where each is read, which way is better, and what it takes to measure it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from align.config.errors import UserError
from align.config.schema import BestBy, JudgeKind, RunConfig, StageConfig

EMBEDDED_PROMPTS = "tiny:prompts"
"""Prompts that the oracle of the embedded world can judge replies to."""


class Needs(Enum):
    """What is measured for a figure, as the evaluate stage does it."""

    replies = "replies"
    oracle = "oracle"
    verdicts = "verdicts"
    texts = "texts"
    pairs = "pairs"
    kl = "kl"
    tasks = "tasks"
    instructions = "instructions"


READ = {Needs.texts: "text", Needs.pairs: "preferences"}
"""The slot that a measurement reads, where it is not the prompts."""
COMPARED = frozenset({Needs.verdicts, Needs.pairs, Needs.kl})
"""Told against a baseline."""
WITH_REPLIES = frozenset({Needs.replies, Needs.oracle, Needs.verdicts, Needs.kl})


@dataclass(frozen=True)
class Figure:
    """One figure. Where a stage's own evaluation has it, it is read there, and else measured."""

    words: str
    higher: bool
    """Whether more is better."""
    own: Mapping[str, str] = field(default_factory=dict)
    """Stage -> name in a line of metrics.jsonl."""
    needs: Needs | None = None
    """What to measure elsewhere; None: no other stage has it."""
    path: str = ""
    """Then: its dotted name in what scores.json holds of a model."""

    def better(self, value: float, than: float | None) -> bool:
        """Whether a value is better than the best so far; a number that is none never is."""
        return value == value and (than is None or (value > than if self.higher else value < than))


LOSS = {"pretrain": "eval_loss", "sft": "eval_loss", "dpo": "eval_loss", "reward": "eval_loss"}
ACCURACY = {"dpo": "eval_rewards/accuracies", "reward": "eval_accuracy"}
MARGIN = {"dpo": "eval_rewards/margins", "reward": "eval_margin"}

FIGURES: dict[BestBy, Figure] = {
    BestBy.loss: Figure("the held-out loss", False, LOSS),
    BestBy.score: Figure("the score of held-out samples", True, {"ppo": "samples/score"}),
    BestBy.accuracy: Figure("the preference accuracy", True, ACCURACY, Needs.pairs, "pairs.accuracy"),
    BestBy.margin: Figure("the preference margin", True, MARGIN, Needs.pairs, "pairs.score_margin"),
    BestBy.ece: Figure("the calibration error of preferences", False, {}, Needs.pairs, "pairs.ece"),
    BestBy.brier: Figure("the Brier score of preferences", False, {}, Needs.pairs, "pairs.brier"),
    BestBy.win_rate: Figure("the win rate", True, {}, Needs.verdicts, "win.rate.mean"),
    BestBy.win_rate_at_equal_length: Figure(
        "the win rate at equal length", True, {}, Needs.verdicts, "win.at_equal_length.rate"
    ),
    BestBy.text_loss: Figure("the loss on held-out text", False, {}, Needs.texts, "text.per_word"),
    BestBy.unsafe_refused: Figure(
        "the share of unsafe prompts refused", True, {}, Needs.replies, "refusals.unsafe.refuses"
    ),
    BestBy.safe_refused: Figure("the share of safe prompts refused", False, {}, Needs.replies, "refusals.safe.refuses"),
    BestBy.distinct_2: Figure("the share of distinct 2-grams", True, {}, Needs.replies, "replies.distinct_2"),
    BestBy.kl: Figure("the KL to the baseline", False, {}, Needs.kl, "kl.k3_per_token"),
    BestBy.entropy: Figure("the entropy", True, {}, Needs.kl, "kl.entropy_per_token"),
    BestBy.tasks: Figure("the share of right answers", True, {}, Needs.tasks, "tasks"),
    BestBy.instructions: Figure(
        "the share of prompts whose instructions were followed", True, {}, Needs.instructions, "tasks"
    ),
    BestBy.helpful: Figure("the share of helpful replies", True, {}, Needs.oracle, "helpful_accuracy"),
    BestBy.right_reason: Figure(
        "the share refused for the right reason", True, {}, Needs.oracle, "refused_right_reason"
    ),
    BestBy.unsafe_complied: Figure(
        "the share of unsafe prompts complied with", False, {}, Needs.oracle, "unsafe_complied"
    ),
    BestBy.over_refused: Figure("the share over-refused", False, {}, Needs.oracle, "over_refused"),
    BestBy.garbled: Figure("the share of garbled replies", False, {}, Needs.oracle, "garbled"),
}


def asked_for(stage: object) -> bool:
    """Whether evaluations while a stage trains decide anything."""
    return isinstance(stage, StageConfig) and (stage.keep_best or stage.stop_after > 0 or stage.prune)


def measured(name: str, stage: object) -> Needs | None:
    """What has to be measured at the evaluations of a stage, because its own do not tell its `best_by`."""
    if not isinstance(stage, StageConfig) or not asked_for(stage):
        return None
    figure = FIGURES[stage.best_by]
    return None if name in figure.own else figure.needs


def key_of(name: str, stage: StageConfig) -> str:
    """The name of a stage's `best_by` in a line of metrics.jsonl."""
    return FIGURES[stage.best_by].own.get(name, f"eval_{stage.best_by.value}")


def slots_for(config: RunConfig, name: str) -> tuple[str, ...]:
    """The slots that a stage reads for its `best_by` alone."""
    needs = measured(name, getattr(config.stages, name))
    if needs in READ:
        return (READ[needs],)
    return ("prompts",) if needs in WITH_REPLIES else ()


def check_best(config: RunConfig, name: str) -> None:
    """Raises: UserError for a `best_by` that cannot be had in a stage, or that lacks what it is measured with."""
    stage = getattr(config.stages, name)
    if not isinstance(stage, StageConfig) or not asked_for(stage):
        return
    figure, key = FIGURES[stage.best_by], f"stages.{name}.best_by={stage.best_by.value}"
    if name in figure.own:
        return
    if figure.needs is None or name == "reward":
        there = [by.value for by, one in FIGURES.items() if name in one.own or (one.needs and name != "reward")]
        raise UserError(f"{key}: {name} does not have {figure.words}; it has {', '.join(there)}")
    for slot in slots_for(config, name):
        if getattr(config.data, slot) is None:
            raise UserError(f"{key} reads data.{slot}, which is not set; set data.{slot}=FILE")
    if figure.needs is Needs.verdicts and config.best.judge.kind is JudgeKind.none:
        raise UserError(f"{key} needs a judge: best.judge.kind=reward, model or function")
    if figure.needs is Needs.oracle and config.data.prompts != EMBEDDED_PROMPTS:
        raise UserError(f"{key}: only data.prompts={EMBEDDED_PROMPTS} has an oracle, and it is {config.data.prompts}")
    for files in (Needs.tasks, Needs.instructions):
        if figure.needs is files and not getattr(config.best, files.value):
            raise UserError(f"{key} needs files: best.{files.value}=[FILE]")
