"""Who says which of two replies is better: a model in both orders, a reward model, or a Python function."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align.config.constitution import load_constitution
from align.config.errors import UserError
from align.config.rewards import RewardSetting, check_function
from align.config.schema import EvaluateStage, JudgeConfig, JudgeKind
from align.constitutional.journal import key_of
from align.constitutional.judging import Judge, Pair
from align.constitutional.prompts import Questions
from align.constitutional.rows import PromptWork
from align.constitutional.work import Work
from align.data.forest import Tree
from align.data.records import Message, PromptRow, RowRefused
from align.generation.speakers import Failed, Said, Speaker
from align.models.reward import check_reward_model
from align.stages.context import RunContext
from align.stages.evaluate_models import ROWS_TOGETHER
from align.stages.evaluate_parts import Parts
from align.stages.rows import load_template
from align.stages.scoring import answer_scores
from align.stages.session import input_digests
from align.stages.speakers import check_device, check_speaker, load_speaker
from align.trainers.reward_sources import Answered, FunctionReward, function_digest

WHERE = "stages.evaluate.judge"
NO_REPLY = "no_reply"
THOUGHT_TOKENS = 256

Verdict = dict[str, Any]
"""`as_given` and `swapped`: a list each, of one number a principle, the probability that the first slot's reply is
better; the model's is first as given. Or `scores`, the model's and the baseline's. Or `fault`, why there is none."""


def check_judge(judge: JudgeConfig, context: RunContext, where: str = WHERE) -> None:
    """Raises: UserError for a judge that lacks what its kind needs. where: the key of its settings."""
    if judge.kind is JudgeKind.reward:
        if not judge.reward_model:
            raise UserError(f"{where}.kind=reward needs {where}.reward_model, a reward model's folder")
        check_reward_model(judge.reward_model, context.config.model)
    if judge.kind is JudgeKind.function:
        if not judge.function:
            raise UserError(f"{where}.kind=function needs {where}.function, such as my_module:my_function")
        check_function(f"{where}.function", judge.function)
        FunctionReward(RewardSetting("judge", None, judge.function, where=f"{where}.function"))
    if judge.kind is JudgeKind.model:
        check_speaker(judge.speaker, f"{where}.speaker")
        check_device(judge.speaker, f"{where}.speaker", context.runtime.device)
        load_constitution(judge.constitution)


def judge_inputs(stage: EvaluateStage) -> list[dict[str, str]]:
    """The judge as inputs of a manifest."""
    judge = stage.judge
    if judge.kind is JudgeKind.reward:
        return input_digests(str(judge.reward_model), "judge")
    if judge.kind is JudgeKind.function:
        return [function_digest(_function(stage))]
    if judge.kind is JudgeKind.model:
        digest = load_constitution(judge.constitution).digest
        constitution = {"name": "constitution", "path": judge.constitution, "digest": digest}
        return [*input_digests(str(judge.speaker.model), "judge"), constitution]
    return []


def verdicts(
    stage: EvaluateStage,
    context: RunContext,
    work: Work,
    parts: Parts,
    prompts: Sequence[PromptRow],
    replies: dict[str, list[Said | Failed]],
) -> dict[str, list[Verdict]]:
    """Model -> a verdict a prompt on its reply against the baseline's. Call it on every rank, with the same replies."""
    if stage.judge.kind is JudgeKind.none:
        return {}
    others = [name for name in replies if name != stage.baseline]
    if stage.judge.kind is JudgeKind.model:
        return _by_model(stage, context, work, prompts, replies, others)
    texts = {name: [one.text if isinstance(one, Said) else None for one in said] for name, said in replies.items()}
    key = key_of([judge_inputs(stage), [[turn.as_dict() for turn in row.messages] for row in prompts], texts])
    score = _reward_scores if stage.judge.kind is JudgeKind.reward else _function_scores
    scores = parts.get("judge_scores", key, lambda: score(stage, context, prompts, replies))
    found: dict[str, list[Verdict]] = {}
    for name in others:
        pairs = zip(scores[name], scores[stage.baseline], strict=True)
        found[name] = [{"fault": "no_score"} if None in pair else {"scores": list(pair)} for pair in pairs]
    return found


def _by_model(
    stage: EvaluateStage,
    context: RunContext,
    work: Work,
    prompts: Sequence[PromptRow],
    replies: dict[str, list[Said | Failed]],
    others: Sequence[str],
) -> dict[str, list[Verdict]]:
    constitution = load_constitution(stage.judge.constitution)
    speaker: Speaker = load_speaker(stage.judge.speaker, f"{WHERE}.speaker", context, stage.seed, stage.batch_size)
    judge = Judge(
        Questions(constitution), work, speaker, seed=stage.seed, temperature=0.0, thought_tokens=THOUGHT_TOKENS
    )
    found = {}
    for name in others:
        pairs: list[Pair | None] = []
        for place, (row, ours, theirs) in enumerate(zip(prompts, replies[name], replies[stage.baseline], strict=True)):
            if isinstance(ours, Failed) or isinstance(theirs, Failed):
                pairs.append(None)
                continue
            chat = tuple(turn.as_dict() for turn in row.messages)
            prompt = PromptWork(str(place), chat, row)
            pairs.append(Pair(prompt, ours.text, theirs.text, name, constitution.principles))
        judge.decide(f"judge_{name}", [pair for pair in pairs if pair is not None])
        found[name] = [_told(pair) for pair in pairs]
    speaker.close()
    return found


def _told(pair: Pair | None) -> Verdict:
    if pair is None:
        return {"fault": NO_REPLY}
    if pair.verdict is None:
        return {"fault": pair.fault or "no_verdict"}
    orders = pair.verdict.orders
    return {"as_given": [one.as_given for one in orders], "swapped": [one.swapped for one in orders]}


def _reward_scores(
    stage: EvaluateStage, context: RunContext, prompts: Sequence[PromptRow], replies: dict[str, list[Said | Failed]]
) -> dict[str, list[float | None]]:
    path = str(stage.judge.reward_model)
    template = load_template(context.config, path)
    found: dict[str, list[float | None]] = {name: [None] * len(prompts) for name in replies}
    # Equal replies are scored once: in two batches their scores would differ in the last digits, and one would win.
    places: dict[tuple[int, str], list[str]] = {}
    for name, said in replies.items():
        for place, reply in enumerate(said):
            if isinstance(reply, Said):
                places.setdefault((place, reply.text), []).append(name)
    rows = [(prompts[place].messages, (Message("assistant", text),), prompts[place].tools) for place, text in places]
    encoded = zip(places.items(), template.encode_trees(rows), strict=True)
    sound = [(at, names, one) for (at, names), one in encoded if not isinstance(one, RowRefused)]
    scores = answer_scores(
        path, [Tree(prompt, answers) for *_, (prompt, answers) in sound], context,
        pad_token_id=template.tokenizer.pad_token_id or 0, micro_batch_size=ROWS_TOGETHER,
    )  # fmt: skip
    for ((place, _), names, _), [score] in zip(sound, scores, strict=True):
        for name in names:
            found[name][place] = score if np.isfinite(score) else None
    return found


def _function_scores(
    stage: EvaluateStage, context: RunContext, prompts: Sequence[PromptRow], replies: dict[str, list[Said | Failed]]
) -> dict[str, list[float | None]]:
    function = FunctionReward(_function(stage))
    found: dict[str, list[float | None]] = {}
    for name, said in replies.items():
        answered = [
            Answered(row.messages, row.tools, (), (), reply.text, reply.finished, row.row)
            for row, reply in zip(prompts, said, strict=True)
            if isinstance(reply, Said)
        ]
        scores = iter(function.scores(answered).tolist())
        values = [next(scores) if isinstance(reply, Said) else None for reply in said]
        found[name] = [None if value is None or not np.isfinite(value) else value for value in values]
    return found


def _function(stage: EvaluateStage) -> RewardSetting:
    return RewardSetting("judge", None, stage.judge.function, where=f"{WHERE}.function")
