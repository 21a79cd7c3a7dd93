"""An order of rows in which the micro-batches of an optimizer step are nearly equally long.

Ranks wait for the longest micro-batch of a step, and memory is sized by the longest of all. In a shuffled order of
dialogues a third of the work is such waiting. This order keeps chance where it matters and takes it away from the sums:

1. All rows are shuffled and cut into random windows of about 32 steps.
2. In a window, rows are cut into strata of like length, and each micro-batch gets one row of every stratum: the longest
   row of a stratum goes where the sum is smallest so far.
3. Micro-batches of like sums make a step; steps, and the micro-batches of a step, are shuffled.
4. A last, shorter step holds micro-batches from a random place of a window, then, if rows are left that fill no
   micro-batch, random rows of middling length.

What this does to training. Lengths are blurred by about a third before they are cut, so rows meet other rows in every
epoch even where the whole data set is one window. Which rows share a micro-batch does not change the gradient of a
step; which rows share the step does, and here that is not all chance. With a `micro_batch_size` from 4 up the mean
length of steps varies less than in a shuffled order, except in the few steps that gather rows too long to be made up
for: of hh-rlhf, in steps of 32 and micro-batches of 4, one step in ten is more than 10 % longer than the mean, and the
longest 40 %. A row's step explains 1.3 % of the variance of lengths, and 3.1 % if shuffled. Two rows in a micro-batch
make up for little (15 %), and one for nothing (98 %): then a step holds rows of like length, as in length grouping, and
`shuffled` is the safer choice.
"""

from collections.abc import Sequence

import numpy as np

WINDOW_STEPS = 32
"""Optimizer steps in a window: more waste less, and gather more of the longest rows in one step."""
BLUR = 0.3
"""Standard deviation of the logarithm of the factor on a length, before rows are cut into strata."""


def stratified_order(
    tokens: Sequence[int] | np.ndarray, *, micro_batch_size: int, batch_size: int, seed: int, epoch: int
) -> np.ndarray:
    """Every row index once, int64 (rows,), the same for the same arguments and another in each epoch.

    tokens: of each row. Steps of `batch_size` rows follow each other, each in micro-batches of `micro_batch_size`; only
    the last step and its last micro-batch may be short.
    """
    assert batch_size % micro_batch_size == 0, "a step is whole micro-batches"
    lengths = np.asarray(tokens, dtype=np.int64)
    generator = np.random.default_rng((seed, epoch))
    shuffled = generator.permutation(len(lengths))
    rows, short = _set_middling_apart(shuffled, lengths, len(shuffled) % micro_batch_size)
    parts = np.split(rows, batch_size * _window_edges(len(rows) // batch_size))
    windows = [_even_micro_batches(part, lengths, micro_batch_size, generator) for part in parts]
    in_step = batch_size // micro_batch_size
    windows[-1], last = _take_last_step(windows[-1], in_step, generator)
    whole = np.concatenate(windows).reshape(-1, in_step, micro_batch_size)
    return np.concatenate([_shuffle_steps(whole, generator).ravel(), last.ravel(), short])


def _set_middling_apart(shuffled: np.ndarray, lengths: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows but `count`, and those: the middle by length of three times as many, so that no outlier is alone."""
    others, drawn = np.split(shuffled, [max(0, len(shuffled) - 3 * count)])
    by_length = drawn[np.argsort(lengths[drawn], kind="stable")]
    start = (len(drawn) - count) // 2
    below, middle, above = np.split(by_length, [start, start + count])
    return np.concatenate([others, below, above]), middle


def _window_edges(steps: int) -> np.ndarray:
    """The steps at which windows of nearly equal size begin, but the first."""
    return np.linspace(0, steps, max(1, round(steps / WINDOW_STEPS)) + 1).astype(np.int64)[1:-1]


def _even_micro_batches(
    rows: np.ndarray, lengths: np.ndarray, micro_batch_size: int, generator: np.random.Generator
) -> np.ndarray:
    """`rows`, a multiple of micro_batch_size, as (micro-batches, micro_batch_size) of nearly equal sums, rising."""
    blurred = lengths[rows] * np.exp(BLUR * generator.standard_normal(len(rows)))
    strata = rows[np.argsort(-blurred, kind="stable")].reshape(micro_batch_size, -1)
    micro_batches = np.empty_like(strata.T)
    sums = np.zeros(len(micro_batches), dtype=np.int64)
    for place, stratum in enumerate(strata):
        longest_first = stratum[np.argsort(-lengths[stratum], kind="stable")]
        smallest_first = np.argsort(sums, kind="stable")
        micro_batches[smallest_first, place] = longest_first
        sums[smallest_first] += lengths[longest_first]
    return micro_batches[np.argsort(sums, kind="stable")]


def _take_last_step(
    micro_batches: np.ndarray, in_step: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The micro-batches of whole steps, and those left over: neighbours from a random place between such steps."""
    steps, left = divmod(len(micro_batches), in_step)
    start = in_step * generator.integers(steps + 1)
    before, last, after = np.split(micro_batches, [start, start + left])
    return np.concatenate([before, after]), generator.permutation(last)


def _shuffle_steps(steps: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Steps (steps, micro-batches, rows) in random order, and the micro-batches of each."""
    turns = np.argsort(generator.random(steps.shape[:2]), axis=1)
    return generator.permutation(np.take_along_axis(steps, turns[..., None], axis=1))


def micro_batch_tokens(tokens: Sequence[int] | np.ndarray, order: np.ndarray, micro_batch_size: int) -> np.ndarray:
    """Tokens of every micro-batch of an order, int64 (micro-batches,); the last may hold fewer rows."""
    lengths = np.asarray(tokens, dtype=np.int64)[order]
    return np.add.reduceat(lengths, np.arange(0, len(lengths), micro_batch_size)) if len(lengths) else lengths


def wasted_share(
    tokens: Sequence[int] | np.ndarray, order: np.ndarray, micro_batch_size: int, batch_size: int
) -> float:
    """Share of an epoch spent on waiting, if every micro-batch takes as long as the longest of its optimizer step."""
    sums = micro_batch_tokens(tokens, order, micro_batch_size)
    if not len(sums):
        return 0.0
    starts = np.arange(0, len(sums), batch_size // micro_batch_size)
    taken = np.maximum.reduceat(sums, starts) * np.diff(np.append(starts, len(sums)))
    return float(1 - sums.sum() / taken.sum())
