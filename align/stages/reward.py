"""A reward model: trained on pairs or rankings, centred on demonstrations, judged on held-out rows."""

import gc
from collections.abc import Mapping, Sequence
from itertools import combinations
from math import nan
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedConfig, TrainingArguments

from align import artifacts
from align.artifacts import Manifest
from align.config.schema import Layout, RewardStage
from align.data.forest import Tree
from align.data.kinds import TREES
from align.data.prepare import answered_prompts, slot_digests
from align.distributed import runtime
from align.losses.calibration import rating_figures, summary
from align.losses.reward import OrdinalObjective, RewardObjective
from align.models.cut_points import add_cut_points, cut_points, drop_cut_points
from align.models.layout import prove_layout
from align.models.reward import SCORES, as_ratings, set_ratings, set_statistics
from align.models.score_sample import MOST, write_sample
from align.stages.adapters import padded_for_adapter
from align.stages.context import RunContext
from align.stages.saving import REWARD_MODEL, save_model
from align.stages.session import Session, close_session, open_session
from align.stages.training import sign, train
from align.tracking.progress import say
from align.tracking.reward_page import reward_page
from align.trainers.order import tree_tokens
from align.trainers.quiet import quiet_libraries
from align.trainers.ratings import all_ratings, level_counts, objective_of, rating_scale
from align.trainers.reference import reference_engine
from align.trainers.rewards import RewardTrainer
from align.trainers.scoring import completion_scores

SCORES_FILE, REPORT = "scores.json", "reward_report.html"
FORWARD = 4
"""Scoring keeps no gradients, so it takes this many micro-batches at once."""


def run(stage: RewardStage, context: RunContext) -> Manifest:
    """Train on `data.preferences`; leaves `reward_model/`, and `scores.json` with a page if rows are held out."""
    session = open_session(stage, context)
    session.inputs += slot_digests(context.config.data, "demonstrations")
    layout = _proven_layout(session, stage)
    # Made anew after the proof's own: DeepSpeed's state belongs to the arguments made last.
    arguments = TrainingArguments(**session.argument_values())
    trainer = _trainer(session, stage, arguments, layout)
    _say_what_to_know(session, stage)
    train(session, trainer)
    centre, std = _statistics(session, stage, trainer)
    scale = rating_scale(trainer.objective, cut_points(trainer.model))

    def finish(config: PreTrainedConfig) -> None:
        set_statistics(config, centre, std)
        set_ratings(config, scale)

    figures = _judge(session, stage, trainer, scale)
    drop_cut_points(trainer.model)
    save_model(session, trainer, REWARD_MODEL, finish)
    _leave_sample(session)
    outputs = [REWARD_MODEL, *([SCORES_FILE] if figures else []), *([REPORT] if "judged/accuracy" in figures else [])]
    manifest = sign(session, trainer, outputs, figures | {"score/centre": centre, "score/std": std})
    close_session(session)
    return manifest


def _proven_layout(session: Session, stage: RewardStage) -> Layout:
    """Of a model of its own, which is freed: one sharded by ZeRO-3 for training takes no forward before it begins."""
    if (padded := padded_for_adapter(session)) is not None:
        return padded
    arguments = TrainingArguments(**session.argument_values())
    model = session.load_for_proof(stage.policy, scores=True)
    trainer = RewardTrainer(
        model, arguments, RewardObjective(), layout=Layout.padded, pad_token_id=session.tokenizer.pad_token_id,
        train_dataset=session.prepared.train,
    )  # fmt: skip
    rows = session.prepared.train
    longest = np.argsort(-tree_tokens(rows), kind="stable")[:2].tolist()
    proven = prove_layout(
        reference_engine(model, trainer.accelerator),
        [Tree(rows[i]["prompt_ids"], rows[i]["completion_ids"]) for i in longest],
        stage.layout,
        pad_token_id=session.tokenizer.pad_token_id,
        device=trainer.accelerator.device,
        reading=SCORES,
    )
    name, active = session.context.stage_name, session.context.runtime.is_main
    say(f"{name}: layout {proven.layout.value} ({proven.reason})", active=active)
    del trainer, model
    gc.collect()
    return proven.layout


def _trainer(session: Session, stage: RewardStage, arguments: TrainingArguments, layout: Layout) -> RewardTrainer:
    rows, held_out = session.prepared.train, session.prepared.held_out
    objective, model = objective_of(stage, rows), session.load_scorer()
    if isinstance(objective, OrdinalObjective):
        add_cut_points(model, level_counts(objective, rows))
    return RewardTrainer(
        model,
        arguments,
        objective,
        layout=layout,
        pad_token_id=session.tokenizer.pad_token_id,
        train_dataset=rows,
        eval_dataset=held_out if len(held_out) else None,
        order=stage.order,
        processing_class=session.tokenizer,
        callbacks=session.callbacks,
    )


def _say_what_to_know(session: Session, stage: RewardStage) -> None:
    name, active = session.context.stage_name, session.context.runtime.is_main
    larger = sum(len(ranks) > 2 for ranks in session.prepared.train["ranks"])
    if stage.label_smoothing and larger:
        say(f"{name}: label_smoothing is for pairs; {larger:,} rankings are learnt without", active=active)
    if session.tokenizer.pad_token_id in session.template.stop_token_ids:
        say(
            f"{name}: the pad token ends answers too: scores here do not mind, but transformers' own forward of the "
            "saved model reads a padded row one token too early; give the tokenizer a pad token of its own",
            active=active,
        )


def _scores(session: Session, stage: RewardStage, trainer: RewardTrainer, rows: Dataset, what: str) -> list[np.ndarray]:
    return completion_scores(
        trainer.model_wrapped,
        rows,
        collator=trainer.data_collator,
        accelerator=trainer.accelerator,
        micro_batch_size=FORWARD * stage.micro_batch_size,
        label=f"{session.context.stage_name}: scoring {what}",
    )


def _statistics(session: Session, stage: RewardStage, trainer: RewardTrainer) -> tuple[float, float]:
    """Mean and standard deviation of the scores of demonstrations, which are what a policy starts from."""
    found = answered_prompts(session.context.config.data, session.template, stage.max_tokens, stage.statistics_rows)
    rows = [_tree_row(prompt, answer) for prompt, answer in found]
    if not rows:
        say(
            f"{session.context.stage_name}: no row of data.demonstrations can be scored; the centre stays 0",
            active=session.context.runtime.is_main,
        )
        return 0.0, 1.0
    scores = np.concatenate(
        _scores(session, stage, trainer, Dataset.from_list(rows, features=_features()), "demonstrations")
    )
    centre, std = float(scores.mean()), float(scores.std())
    say(
        f"{session.context.stage_name}: {len(scores):,} demonstrations score {centre:.3f} on average, spread {std:.3f}",
        active=session.context.runtime.is_main,
    )
    return centre, std


def _features() -> Any:
    return Dataset(TREES.empty_table()).features


def _tree_row(prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
    return {"prompt_ids": prompt, "completion_ids": [answer], "ranks": [0.0], "p": 1.0, "margin": 0.0, "scores": [nan]}


def _judge(
    session: Session, stage: RewardStage, trainer: RewardTrainer, scale: Mapping[str, Any] | None
) -> dict[str, float]:
    """Write what the scores of the held-out rows are worth; returns the figures, none if no row is held out."""
    rows = session.prepared.held_out
    if not len(rows):
        return {}
    found = _scores(session, stage, trainer, rows, "held-out rows")
    pairs = _pairs(rows, found)
    compared = bool((pairs["p"] > 0.5).any())
    judged = summary(**pairs) if compared else {"figures": {}, "tables": {}}
    scores = np.concatenate(found)
    predicted = None if scale is None else as_ratings(scale, torch.from_numpy(scores)).numpy()
    judged["figures"] |= rating_figures(scores, all_ratings(rows), predicted)
    if not judged["figures"]:
        return {}
    context = session.context
    if context.runtime.is_main:
        artifacts.write_json(context.stage_dir / SCORES_FILE, judged)
        title = f"Reward model: {context.run_dir / context.stage_name / REWARD_MODEL}"
        if compared:
            artifacts.write_text(context.stage_dir / REPORT, reward_page(judged, title))
    return {f"judged/{name}": value for name, value in judged["figures"].items()}


def _pairs(rows: Dataset, scores: list[np.ndarray]) -> dict[str, Any]:
    """The arguments of `summary`: every two answers of a row, the better one chosen; ties of rankings are left out."""
    columns: dict[str, list[float]] = {
        name: [] for name in ("chosen", "rejected", "p", "margin", "chosen_tokens", "rejected_tokens")
    }
    for row, found in zip(rows, scores, strict=True):
        ranked = sorted(zip(row["ranks"], found, map(len, row["completion_ids"]), strict=True))
        for (rank, chosen, chosen_tokens), (other, rejected, rejected_tokens) in combinations(ranked, 2):
            if rank != other:
                values = (chosen, rejected, row["p"], row["margin"], chosen_tokens, rejected_tokens)
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    tokens = [len(answer) for answers in rows["completion_ids"] for answer in answers]
    every = (np.concatenate(scores), np.array(tokens, dtype=np.float64))
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()} | {"completions": every}


def _leave_sample(session: Session) -> None:
    """Scores of a few training rows beside the saved weights: from the shortest to the median, so cheap on a CPU."""
    if session.context.runtime.is_main:
        rows = session.prepared.train
        by_tokens = np.argsort(tree_tokens(rows), kind="stable")
        chosen = np.unique(np.linspace(0, (len(rows) - 1) // 2, MOST // 2).astype(int))
        trees = [Tree(rows[i]["prompt_ids"], rows[i]["completion_ids"][:2]) for i in by_tokens[chosen].tolist()]
        quiet_libraries()  # the trainer set the level of transformers' talk anew
        write_sample(session.context.stage_dir / REWARD_MODEL, trees, session.context.config.model)
    runtime.barrier()
