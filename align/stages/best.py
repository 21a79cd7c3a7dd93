"""Figures of the evaluate stage of the policy while it trains, for a `best_by` that held-out rows do not tell."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from align import artifacts
from align.config.best import COMPARED, EMBEDDED_PROMPTS, FIGURES, WITH_REPLIES, Needs, measured, slots_for
from align.config.errors import UserError
from align.config.schema import EvaluateStage, JudgeConfig, JudgeKind, PPOStage, SpeakerBackend, StageConfig
from align.constitutional.work import Work
from align.data.prepare import prepare_prompts, slot_digests
from align.data.records import Message, PromptRow
from align.generation.local_speaker import LocalSpeaker
from align.generation.speakers import Failed, Said
from align.stages.context import RunContext
from align.stages.evaluate import chosen_prompts
from align.stages.evaluate_figures import scores
from align.stages.evaluate_judges import check_judge, judge_inputs, verdicts
from align.stages.evaluate_measure import baseline_reads, measured_of, questions
from align.stages.evaluate_models import Subject
from align.stages.evaluate_parts import Parts, shared
from align.stages.session import Session, input_digests
from align.trainers.quiet import quiet_libraries
from align.trainers.samples import append, keep_until
from align.trainers.surviving import SurvivingTrainer

FOLDER, SAMPLES = "best", "samples.jsonl"
BASELINE, POLICY = "baseline", "policy"
WHERE = "best.judge"


def measures(session: Session) -> "Measures | None":
    """What to measure at the evaluations of a stage; None if its own tell its `best_by`. Loads no model.

    Raises: UserError for a judge or files that cannot be used.
    """
    needs = measured(session.context.stage_name, session.stage)
    return None if needs is None else Measures(session, needs)


class Measures:
    """Puts the same questions to the policy at each evaluation, and compares with the baseline's answers."""

    def __init__(self, session: Session, needs: Needs) -> None:
        self.session, self.needs, context = session, needs, session.context
        self.stage = _settings(context, session.stage, needs)
        _check_judge(self.stage.judge, context)
        prompts: list[PromptRow] = []
        if needs in WITH_REPLIES:
            # From the end: evaluate takes the first, so that what is chosen by these is judged by others.
            found = prepare_prompts(context.config.data)
            prompts = chosen_prompts(found.rows[::-1], self.stage, context.config.data)
        self.asked = questions(self.stage, context, prompts)
        if needs is Needs.kl:
            self.stage.kl_prompts = len(prompts)
        folder = context.stage_dir / FOLDER
        self.work, self.parts = Work(folder, context.runtime, context.stage_name), Parts(folder, context.runtime)
        session.inputs += self._inputs()

    def of(self, trainer: SurvivingTrainer, moment: Callable[[], int], pause: Callable[[], None]) -> Callable:
        """What the trainer calls. moment: the `step` that it is at. pause: called between two parts, on every rank."""

        def figures() -> dict[str, float]:
            with _unchanged_randomness(), _loading_whole(trainer.args):
                return self._figures(trainer, moment(), pause)

        return figures

    def _figures(self, trainer: SurvivingTrainer, moment: int, pause: Callable[[], None]) -> dict[str, float]:
        stage, context = self.stage, self.session.context
        quiet_libraries()
        with torch.no_grad(), trainer.generating() as model:
            policy = Trained(model, self.session, stage)
            found = measured_of(policy, self.work, self.asked)
        pause()
        models, said = {POLICY: found}, {}
        if stage.baseline == BASELINE:
            subject = Subject(BASELINE, stage.models[BASELINE], stage, context, self.parts)
            models[BASELINE] = measured_of(subject, self.work, self.asked)
            if self.needs is Needs.kl:
                baseline_reads(subject, policy, found)
            subject.close()
            pause()
            replies = {name: one.replies for name, one in models.items()}
            said = verdicts(stage, context, self.work, self.parts, self.asked.prompts, replies)
        embedded = self.asked.prompts != [] and context.config.data.prompts == EMBEDDED_PROMPTS
        numbers = scores(stage, self.asked, models, said, embedded=embedded)
        if context.runtime.is_main and self.asked.prompts and not isinstance(self.session.stage, PPOStage):
            self._keep_samples(moment, found.replies)
        return named(numbers["models"][POLICY], numbers["oracle"].get(POLICY, {}))

    def _keep_samples(self, moment: int, replies: Sequence[Said | Failed]) -> None:
        """Add the replies to samples.jsonl; later ones, of a run that was interrupted, are forgotten."""
        file = self.session.context.stage_dir / SAMPLES
        if file.is_file():
            keep_until(file, moment - 1)
        lines = _sample_lines(moment, self.asked.prompts, replies)
        append(file, lines)
        self.session.wandb_run.table("samples", moment, lines)

    def _inputs(self) -> list[dict[str, str]]:
        """What decides the figures beside the config, as inputs of the manifest."""
        found = []
        if self.stage.baseline == BASELINE:
            found += input_digests(self.stage.models[BASELINE], "best.baseline")
            found += [entry | {"name": f"best.{entry['name']}"} for entry in judge_inputs(self.stage)]
        context = self.session.context
        known = [entry["name"] for entry in self.session.inputs]
        for slot in slots_for(context.config, context.stage_name):
            if not any(name.startswith(f"data.{slot}") for name in known):
                found += slot_digests(context.config.data, slot)
        for path in [*self.stage.tasks, *self.stage.instructions]:
            found.append({"name": "best.file", "path": path, "digest": artifacts.digest_file(Path(path))})
        return found


def _settings(context: RunContext, trained: StageConfig, needs: Needs) -> EvaluateStage:
    """The settings of an evaluate stage that measures no more than is needed."""
    best = context.config.best
    compared = needs in COMPARED
    models = {POLICY: trained.policy} | ({BASELINE: best.baseline} if compared else {})
    return EvaluateStage(
        models=models,
        baseline=BASELINE if compared else POLICY,
        judge=best.judge if needs is Needs.verdicts else JudgeConfig(),
        kl_prompts=0,
        max_pairs=best.rows if needs is Needs.pairs else 0,
        max_texts=best.rows if needs is Needs.texts else 0,
        max_tokens=trained.max_tokens,
        tasks=best.tasks if needs is Needs.tasks else [],
        instructions=best.instructions if needs is Needs.instructions else [],
        resamples=100,  # nobody reads these intervals
        max_prompts=best.rows,
        max_new_tokens=best.max_new_tokens,
        batch_size=best.batch_size,
        seed=trained.seed,
    )


def _check_judge(judge: JudgeConfig, context: RunContext) -> None:
    check_judge(judge, context, WHERE)
    if judge.kind is JudgeKind.model and judge.speaker.backend is SpeakerBackend.vllm:
        raise UserError(
            f"{WHERE}.speaker.backend=vllm: an engine of vLLM does not let go of the GPU that trains; serve the judge "
            f"with vllm serve and use {WHERE}.speaker.backend=server, or hf"
        )


def named(figures: Mapping[str, Any], oracle: Mapping[str, float]) -> dict[str, float]:
    """Name -> value of every figure that `best_by` could name and that was measured."""
    found: dict[str, float] = {}
    for by, figure in FIGURES.items():
        if figure.needs is Needs.oracle:
            value = oracle.get(figure.path)
        elif figure.needs in (Needs.tasks, Needs.instructions):
            value = _share_right(figures.get("tasks", {}), exact=figure.needs is Needs.tasks)
        else:
            value = _at(figures, figure.path) if figure.path else None
        if value is not None:
            found[by.value] = float(value)
    return found


def _share_right(files: Mapping[str, Any], *, exact: bool) -> float | None:
    """The mean over files of the share that was answered rightly, or of prompts whose instructions were followed."""
    shares = [one.get("share") if exact else (one.get("prompts_strict") or {}).get("share") for one in files.values()]
    there = [share for share in shares if share is not None]
    return sum(there) / len(there) if there else None


def _at(figures: Any, path: str) -> float | None:
    for key in path.split("."):
        figures = figures.get(key) if isinstance(figures, dict) else None
    return figures


def _sample_lines(moment: int, prompts: Sequence[PromptRow], replies: Sequence[Said | Failed]) -> list[dict[str, Any]]:
    return [
        {
            "step": moment, "place": place, "prompt": row.messages[-1].content,
            "completion": reply.text if isinstance(reply, Said) else "",
        }
        for place, (row, reply) in enumerate(zip(prompts, replies, strict=True))
    ]  # fmt: skip


class Trained(Subject):
    """The policy as it is in the middle of training. What it answers is kept nowhere: the next time it is another."""

    def __init__(self, model: PreTrainedModel, session: Session, stage: EvaluateStage) -> None:
        self.label = self.name = POLICY
        self.path, self.stage, self.context = session.stage.policy, stage, session.context
        self.template, self.parts = session.template, Unkept()
        self._speaker = LocalSpeaker(model, session.template, name=POLICY, batch_size=stage.batch_size)

    def replies(self, work: Work, prompts: Sequence[PromptRow], shots: Sequence[Message] = ()) -> list[Said | Failed]:
        """An answer to each prompt; the ranks share them."""

        def answer(share: Sequence[Any]) -> list[Said | Failed]:
            found: dict[int, Said | Failed] = {}
            self._speaker.say(share, found.__setitem__)
            return [found[place] for place in range(len(share))]

        return shared(self.context.runtime, self.asks(prompts, shots), answer)


class Unkept:
    """Stands for `Parts` where nothing is to be kept."""

    def get(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """The value, computed now."""
        return compute()


@contextmanager
def _loading_whole(args: TrainingArguments) -> Iterator[None]:
    """Inside, ZeRO-3 does not shard a model that is loaded, such as a judge."""
    plugin = getattr(args, "hf_deepspeed_config", None)
    if plugin is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(plugin)


@contextmanager
def _unchanged_randomness() -> Iterator[None]:
    """After it, random numbers go on as if nothing had been measured."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
