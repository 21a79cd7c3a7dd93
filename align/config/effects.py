"""Keys of the command line that would change nothing: refused, with the reason. A recipe's keys are not judged."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from align.config.adapters import NOT_MERGED, READ_BY
from align.config.best import COMPARED, Needs, asked_for, measured
from align.config.errors import UserError
from align.config.keys import EVERY_SLOT, SLOTS, slots_of, stage_of
from align.config.rewards import parse_rewards
from align.config.schema import (
    Advantage,
    ConstitutionalStage,
    ExportForm,
    JudgeConfig,
    JudgeKind,
    KLController,
    OnBadRows,
    PairLoss,
    PairSource,
    PeftMethod,
    ReportTo,
    RewardTarget,
    RunConfig,
    SpeakerBackend,
    StageConfig,
    Verb,
    ZeroChoice,
)

WRITES = {Needs.replies, Needs.oracle, Needs.verdicts, Needs.kl, Needs.tasks, Needs.instructions}
SMOOTHED = (PairLoss.sigmoid, PairLoss.robust, PairLoss.sigmoid_norm)


@dataclass(frozen=True)
class Typed:
    """A key of the command line, with the run that it is part of."""

    path: str
    config: RunConfig
    slots: dict[str, Any]
    """`data` before interpolation, so that it shows which slot reads which."""
    given: frozenset[str]
    """All keys of the command line."""

    @property
    def stage(self) -> Any:
        """The settings of the stage that the key belongs to."""
        return getattr(self.config.stages, str(stage_of(self.path)))


def refuse_without_effect(given: list[str], config: RunConfig, slots: dict[str, Any]) -> None:
    """Judge the keys given on the command line against the run they are part of.

    Raises: UserError for the first that would change nothing.
    """
    for path in given:
        typed = Typed(path, config, slots, frozenset(given))
        for pattern, idle, reason in RULES:
            if fnmatchcase(path, pattern) and idle(typed):
                raise UserError(f"{path} would have no effect: {reason.format(**_words(typed))}")


def _words(typed: Typed) -> dict[str, str]:
    return {
        "run": ", ".join(typed.config.run),
        "first": next((name for name in typed.config.run if name not in ("evaluate", "score")), "sft"),
        "stage": str(stage_of(typed.path)),
        "verb": typed.config.do.value,
        "slots": ", ".join(f"data.{name}" for name in sorted(_slots_read(typed))),
    }


def _slots_read(typed: Typed) -> set[str]:
    """The slots that the stages read, and those that these read in turn. Without stages, as to convert, all."""
    if not typed.config.run:
        return set(EVERY_SLOT)
    read: set[str] = set()
    waiting = [slot for name in typed.config.run if name in SLOTS for slot in slots_of(typed.config, name)]
    while waiting:
        slot = waiting.pop()
        if slot not in read:
            read.add(slot)
            waiting += re.findall(r"\$\{data\.(\w+)", str(typed.slots.get(slot)))
    return read


def _unread_slot(typed: Typed) -> bool:
    return typed.path.split(".")[1] not in _slots_read(typed)


def _not_doing(*verbs: Verb) -> Callable[[Typed], bool]:
    return lambda typed: typed.config.do not in verbs


def _nothing_for_wandb(typed: Typed) -> bool:
    """Neither runs nor a report."""
    reported = typed.config.do is Verb.report and typed.config.report.to is ReportTo.wandb
    return not typed.config.log.wandb and not reported


def _no_trained_stage(typed: Typed) -> bool:
    stages = [getattr(typed.config.stages, name) for name in typed.config.run]
    return not any(isinstance(stage, StageConfig) for stage in stages)


def models_of(config: RunConfig) -> Iterator[str]:
    """Every model that the run loads, by path or id."""
    yield config.model.path
    for name in config.run:
        stage = getattr(config.stages, name)
        if name == "score":
            yield stage.reward_model
        elif isinstance(stage, ConstitutionalStage):
            speakers = (stage.generator, stage.critic, stage.judge)
            yield from (one.model for one in speakers if one.model and one.backend is not SpeakerBackend.server)
        else:
            yield from stage.models.values() if name in ("evaluate", "classify") else [stage.policy]
        if name == "evaluate":
            yield from _judges(stage.judge)
        if measured(name, stage):
            yield config.best.baseline
            yield from _judges(config.best.judge)
        for field in fields(stage):
            if field.name in ("reference", "value") and getattr(stage, field.name):
                yield getattr(stage, field.name)
        if name == "ppo":
            yield from (str(setting.model) for setting in parse_rewards(stage.rewards) if setting.model)


def _none_pruned(typed: Typed) -> bool:
    stages = [getattr(typed.config.stages, name) for name in typed.config.run]
    return not any(isinstance(stage, StageConfig) and stage.prune for stage in stages)


def _measured(typed: Typed) -> set[Needs]:
    """What is measured at the evaluations of the run's stages for their `best_by`."""
    found = (measured(name, getattr(typed.config.stages, name)) for name in typed.config.run)
    return {needs for needs in found if needs is not None}


def _judges(judge: JudgeConfig) -> Iterator[str]:
    if judge.kind is JudgeKind.reward and judge.reward_model:
        yield judge.reward_model
    if judge.kind is JudgeKind.model and judge.speaker.model and judge.speaker.backend is not SpeakerBackend.server:
        yield judge.speaker.model


def _no_model_from_hub(typed: Typed) -> bool:
    return all(model.startswith("tiny-") or Path(model).expanduser().is_dir() for model in models_of(typed.config))


def _only_embedded_models(typed: Typed) -> bool:
    return all(model.startswith("tiny-") for model in models_of(typed.config))


def _only_safetensors(typed: Typed) -> bool:
    """Whether every model of the run is embedded, or a folder whose weights are safetensors."""
    folders = [Path(model).expanduser() for model in models_of(typed.config) if not model.startswith("tiny-")]
    return all(any(folder.glob("*.safetensors")) for folder in folders)


Rule = tuple[str, Callable[[Typed], bool], str]
RULES: tuple[Rule, ...] = (
    ("stages.*", lambda t: stage_of(t.path) not in t.config.run, "the run has no stage {stage}, only {run}"),
    ("peft.*", _no_trained_stage, "the run trains nothing ({run})"),
    (
        "peft.*",
        lambda t: t.path != "peft.method" and t.config.peft.method is PeftMethod.none,
        "peft=none trains every weight; add peft=lora",
    ),
    *(
        (
            f"peft.{key}",
            lambda t, methods=methods: t.config.peft.method not in methods,
            f"only {', '.join(f'peft={method.value}' for method in methods)} reads it",
        )
        for key, methods in READ_BY.items()
    ),
    (
        "peft.keep_adapter",
        lambda t: t.config.peft.method in NOT_MERGED,
        "this method cannot be merged, so policy/ is base + adapter anyway",
    ),
    (
        "peft.dropout",
        lambda t: not {"sft", "pretrain"} & set(t.config.run),
        "DPO, reward models and PPO train without dropout, so that what is compared comes from one network",
    ),
    *(
        (key, lambda t: t.config.deepspeed.mode is not ZeroChoice.zero, "only ZeRO reads it; add deepspeed=zero2")
        for key in ("deepspeed.stage", "deepspeed.offload")
    ),
    *(
        (f"log.{key}", _nothing_for_wandb, "nothing is sent to wandb; add log=wandb")
        for key in ("project", "entity", "mode")
    ),
    ("log.upload_models", lambda t: not t.config.log.wandb, "nothing is sent to wandb; add log=wandb"),
    *(
        (pattern, _unread_slot, "no stage of this run ({run}) reads it; they read {slots}")
        for slot in sorted(EVERY_SLOT)
        for pattern in (f"data.{slot}", f"data.{slot}.*")
    ),
    (
        "data.max_bad_fraction",
        lambda t: t.config.data.on_bad_rows is OnBadRows.drop,
        "data.on_bad_rows=drop never stops",
    ),
    ("plan.*", _not_doing(Verb.plan), "only do=plan reads it; add do=plan"),
    *(
        (f"sweep.{key}", _none_pruned, "no stage prunes; add stages.{first}.prune=true")
        for key in ("prune_after", "prune_from_fraction")
    ),
    ("sweep.*", _not_doing(Verb.train), "do={verb} ranks nothing"),
    ("out", _not_doing(Verb.convert, Verb.report), "only do=convert and do=report write it"),
    ("report.*", _not_doing(Verb.report), "only do=report reads it; add do=report"),
    ("chat.*", _not_doing(Verb.chat), "only do=chat reads it; add do=chat"),
    ("chat.seed", lambda t: t.config.chat.temperature == 0, "chat.temperature=0 samples nothing"),
    ("launch.*", _not_doing(Verb.env), "only do=env reads it; add do=env"),
    ("data.rankings", _not_doing(Verb.convert), "only do=convert asks; training on pairs takes all pairs of a ranking"),
    *(
        (pattern, _not_doing(Verb.check), "only do=check reads it; add do=check")
        for pattern in ("data.near_duplicate_threshold", "data.evaluation_sets", "data.evaluation_sets.*")
    ),
    ("model.revision", _no_model_from_hub, "only a hub id has revisions, and no model of this run is one"),
    ("model.trust_remote_code", _only_embedded_models, "the embedded models come without code"),
    ("model.pickled_weights", _only_safetensors, "the models of this run have safetensors, which are taken first"),
    ("stages.*.epochs", lambda t: t.stage.max_steps is not None, "stages.{stage}.max_steps takes the place of epochs"),
    (
        "stages.*.keep_checkpoints",
        lambda t: t.stage.save_every == 0,
        "stages.{stage}.save_every=0 writes no checkpoints",
    ),
    *(
        (f"stages.{stage}.{key}", idle, f"nothing is judged between the first step and the last; {way}")
        for key in ("keep_best", "stop_after", "prune")
        for stage, idle, way in (
            ("ppo", lambda t: t.stage.sample_every == 0, "raise stages.ppo.sample_every"),
            ("*", lambda t: "ppo" not in t.path and t.stage.eval_every == 0, "add stages.{stage}.eval_every=50"),
        )
    ),
    (
        "stages.*.best_by",
        lambda t: not asked_for(t.stage),
        "add stages.{stage}.keep_best=true or stop_after=3 (in a sweep also prune=true)",
    ),
    (
        "best.*",
        lambda t: not _measured(t),
        "no stage measures its best_by; add such as stages.{first}.best_by=win_rate with keep_best or stop_after",
    ),
    *(
        (f"best.{pattern}", lambda t, of=of: not _measured(t) & of, f"only best_by={names} reads it")
        for pattern, of, names in (
            ("judge.*", {Needs.verdicts}, "win_rate and win_rate_at_equal_length"),
            ("tasks", {Needs.tasks}, "tasks"),
            ("instructions", {Needs.instructions}, "instructions"),
            ("max_new_tokens", WRITES, "what needs replies"),
            ("batch_size", WRITES, "what needs replies"),
            ("rows", set(Needs) - {Needs.tasks, Needs.instructions}, "what reads rows of a slot"),
            ("baseline", COMPARED, "what is compared with a baseline"),
        )
    ),
    (
        "stages.dpo.label_smoothing",
        lambda t: t.stage.loss not in SMOOTHED,
        "this loss has no label smoothing; sigmoid, robust and sigmoid_norm have",
    ),
    *(
        (f"stages.ppo.{key}", lambda t: t.stage.advantage is not Advantage.gae, "only advantage=gae has a value model")
        for key in ("gae_lambda", "value", "value_*")
    ),
    (
        "stages.ppo.gamma",
        lambda t: t.stage.advantage in (Advantage.rloo, Advantage.grpo),
        "this advantage takes a completion as a whole; gae and reinforce_plus_plus discount",
    ),
    *(
        (f"stages.ppo.{key}", lambda t: t.stage.kl_coefficient == 0, "stages.ppo.kl_coefficient=0 has no reference")
        for key in ("reference", "kl_estimator", "kl_place", "kl_controller")
    ),
    (
        "stages.ppo.kl_*_completion*",
        lambda t: t.stage.kl_controller is KLController.fixed or t.stage.kl_coefficient == 0,
        "only stages.ppo.kl_controller=adaptive reads it, with a first kl_coefficient above 0",
    ),
    ("stages.ppo.eval_every", lambda t: True, "held-out prompts are answered every stages.ppo.sample_every updates"),
    (
        "stages.ppo.reference",
        lambda t: t.config.peft.method is not PeftMethod.none,
        "with peft the reference is the base without adapters",
    ),
    *(
        (
            f"stages.reward.{key}",
            lambda t: t.stage.objective is not RewardTarget.comparison,
            f"only stages.reward.objective=comparison has {words}",
        )
        for key, words in (("label_smoothing", "labels to swap"), ("centring_weight", "scores without a zero"))
    ),
    *(
        (
            f"stages.constitutional.{key}",
            lambda t: t.stage.rounds == 0,
            "stages.constitutional.rounds=0 revises nothing",
        )
        for key in ("draw", "judge_revisions", "targets", "max_critique_tokens", "critic")
    ),
    *(
        (
            f"stages.constitutional.{key}",
            lambda t: t.stage.pairs not in (PairSource.all, PairSource.random, PairSource.best_worst),
            "only pairs=all, random and best_worst sample replies",
        )
        for key in ("samples", "temperatures")
    ),
    (
        "stages.constitutional.judge_principles",
        lambda t: t.stage.pairs in (PairSource.none, PairSource.contrast) and t.stage.targets.value != "best",
        "with these pairs nothing is judged by several principles",
    ),
    *(
        (
            f"stages.constitutional.{role}.{key}",
            lambda t, role=role, backend=backend: getattr(t.stage, role).backend is not backend,
            f"only backend={backend.name} reads it",
        )
        for role in ("generator", "critic", "judge")
        for backend, keys in (
            (SpeakerBackend.server, ("url", "key_env", "concurrency", "timeout_seconds", "retries", "votes")),
            (SpeakerBackend.vllm, ("memory_share", "max_tokens")),
        )
        for key in keys
    ),
    *(
        (
            f"stages.export.{key}",
            lambda t: ExportForm.model not in t.stage.forms,
            "only stages.export.forms=[model] writes a model",
        )
        for key in ("dtype", "max_shard_size", "generation", "generation.*")
    ),
    (
        "stages.export.gguf_type",
        lambda t: ExportForm.gguf not in t.stage.forms,
        "no GGUF file is made; add stages.export.forms=[model,gguf]",
    ),
    ("stages.export.private", lambda t: t.stage.push_to is None, "nothing is uploaded; add stages.export.push_to=ID"),
    (
        "stages.evaluate.seed",
        lambda t: t.stage.temperature == 0 and not t.stage.kl_prompts,
        "stages.evaluate.temperature=0 and kl_prompts=0 sample nothing",
    ),
    ("stages.evaluate.beta", lambda t: not t.stage.max_pairs, "stages.evaluate.max_pairs=0 weighs no pairs"),
    (
        "stages.evaluate.max_tokens",
        lambda t: not t.stage.max_pairs and not t.stage.max_texts,
        "stages.evaluate.max_pairs=0 and max_texts=0 read nothing",
    ),
    (
        "stages.evaluate.resamples",
        lambda t: t.stage.judge.kind is JudgeKind.none,
        "stages.evaluate.judge.kind=none judges nothing",
    ),
    *(
        (
            f"{judge}.{key}",
            lambda t, kind=kind, of=of: of(t).kind is not kind,
            f"only {judge}.kind={kind.name} reads it",
        )
        for judge, of in (
            ("stages.evaluate.judge", lambda t: t.stage.judge),
            ("best.judge", lambda t: t.config.best.judge),
        )
        for kind, pattern in (
            (JudgeKind.reward, ("reward_model",)),
            (JudgeKind.function, ("function",)),
            (JudgeKind.model, ("constitution", "speaker.*")),
        )
        for key in pattern
    ),
)
"""(keys, true where they change nothing, why)"""
