"""A few scores that travel with a reward model, so that whoever loads it can prove that it still gives the same."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from align import artifacts
from align.config.errors import UserError
from align.config.schema import Layout, ModelConfig
from align.data.forest import Tree, lay_out_scores
from align.models import load
from align.models.adapters.saved import load_scorer
from align.models.layout import plain_model
from align.models.reward import centred_scores

SAMPLE = "score_sample.json"
TOLERANCE = {4: 1e-3, 2: 0.2}
"""Bytes of a number in the forward pass -> largest difference that is rounding, in standard deviations of scores.

Largest of 8 completions in bf16: 0.012 to 0.025 for trained models, up to 0.06 for random ones; a head that is not the
saved one is off by 1 and more (tiny models and 32 random layers, CPU, 2026-11)."""
MOST = 8
"""Completions in a sample: enough for a spread, few enough for a CPU."""

Ids = Sequence[int]
Score = Callable[[Sequence[tuple[Ids, Ids]]], Sequence[float]]
"""(prompt_ids, completion_ids) of each completion -> its centred score; NaN where there is none."""


def write_sample(folder: Path, trees: Sequence[Tree], model: ModelConfig) -> None:
    """Write `score_sample.json` into a saved reward model: prompt_ids, completion_ids and centred score of each row.

    The scores of the first MOST completions of `trees`, by the files as they are, loaded in fp32 on the CPU.
    Raises: UserError if one is not a finite number.
    """
    pairs = [(list(tree.prompt), list(ids)) for tree in trees for ids in tree.completions][:MOST]
    scorer = load_scorer(str(folder), model, torch.float32, seed=0).eval()
    alone = [lay_out_scores([Tree(prompt, (ids,))], Layout.padded, 0) for prompt, ids in pairs]
    with torch.no_grad():
        scores = [centred_scores(scorer, batch).item() for batch in alone]
    if not np.isfinite(scores).all():
        raise UserError(f"{folder}: the saved model's scores are no finite numbers; lower the learning rate")
    rows = [
        {"prompt_ids": prompt, "completion_ids": ids, "score": score}
        for (prompt, ids), score in zip(pairs, scores, strict=True)
    ]
    # The scale of differences. A few answers may lie close together, so theirs alone could be far too small.
    std = max(float(np.std(scores)), float(plain_model(scorer).config.to_dict().get("reward_std", 0.0)))
    artifacts.write_json(folder / SAMPLE, {"std": std, "rows": rows})


def check_sample(name: str, score: Score, dtype: torch.dtype) -> str | None:
    """Score the sample of reward model `name` again; returns a line to be said if it has none.

    dtype: what `score` computes in. Call it on every rank if `score` needs that (ZeRO-3).
    Raises: UserError if a score differs by more, or is none.
    """
    file = Path(load.resolve_model(name)) / SAMPLE
    stored = artifacts.read_json(file)
    if stored is None:
        return f"{name}: no {SAMPLE} in it, so its scores are taken on trust"
    try:
        pairs = [(row["prompt_ids"], row["completion_ids"]) for row in stored["rows"]]
        expected = np.array([row["score"] for row in stored["rows"]], dtype=np.float64)
        std = float(stored["std"])
        if not pairs:
            raise ValueError("no rows")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not a sample of scores; copy the reward model again, or delete this file") from error
    found = np.asarray(score(pairs), dtype=np.float64)
    tolerance = TOLERANCE[dtype.itemsize]
    off = np.abs(found - expected) / (std or 1.0)
    # A not-a-number is within no tolerance, so the test is for being allowed.
    if not (off <= tolerance).all():
        worst = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
        raise UserError(
            f"{file} row {worst + 1}: its score was {expected[worst]:.5g} when the model was saved, is "
            f"{found[worst]:.5g} now, {off[worst]:.2g} standard deviations off (at most {tolerance:g}); the files are "
            "not those that were saved together: copy the reward model again or train it again with +recipe=reward"
        )
    return None
