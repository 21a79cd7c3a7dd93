"""The stratified order: every row once, micro-batches of a step equally long, the rest left to chance."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from align.config.schema import DataConfig
from align.data.balance import micro_batch_tokens, stratified_order, wasted_share
from align.data.plain import PLAIN_TEMPLATE
from align.data.prepare import prepare_preferences
from align.data.template import Template
from tests.data.chat_tokenizers import gpt2

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
HH = Path(os.environ.get("ALIGN_REAL_DATA", DEFAULT)) / "hh_rlhf_harmless_test" / "test.jsonl.gz"
SPLITS = [(32, 4), (64, 8)]


def log_normal(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(6, 0.7, rows).astype(np.int64) + 1


def order_of(tokens, batch_size=32, micro_batch_size=4, seed=7, epoch=0) -> np.ndarray:
    return stratified_order(tokens, micro_batch_size=micro_batch_size, batch_size=batch_size, seed=seed, epoch=epoch)


def shuffled(tokens, epoch=0) -> np.ndarray:
    return np.random.default_rng(epoch).permutation(len(tokens))


def step_means(tokens, order, batch_size) -> np.ndarray:
    """Mean length of every whole step, relative to the mean of them all."""
    whole = len(order) // batch_size * batch_size
    means = tokens[order[:whole]].reshape(-1, batch_size).mean(1)
    return means / means.mean()


@pytest.fixture(scope="module")
def hh_tokens() -> np.ndarray:
    if not HH.is_file():
        pytest.skip(f"no {HH}; name the folder of real data with ALIGN_REAL_DATA")
    data = DataConfig(preferences=str(HH))
    rows = prepare_preferences(data, Template(gpt2(PLAIN_TEMPLATE)), 1_000_000, None).train
    return np.array([sum(len(row[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows])


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 100, 1027, 2200])
@pytest.mark.parametrize(("batch_size", "micro_batch_size"), [(32, 4), (32, 32), (8, 1), (1, 1), (6, 3)])
def test_every_row_is_taken_once(rows, batch_size, micro_batch_size):
    order = order_of(log_normal(rows), batch_size, micro_batch_size)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(rows))


@pytest.mark.parametrize("tokens", [[5] * 50, [0] * 50, list(range(50)), [1] * 49 + [10**6]])
def test_lengths_may_be_equal_zero_or_wild(tokens):
    assert sorted(order_of(tokens, 8, 2).tolist()) == list(range(50))


def test_the_order_is_decided_by_seed_and_epoch():
    tokens = log_normal(500)
    first = order_of(tokens, epoch=3).tolist()
    assert order_of(tokens.tolist(), epoch=3).tolist() == first
    assert order_of(tokens, epoch=4).tolist() != first
    assert order_of(tokens, epoch=3, seed=8).tolist() != first
    assert order_of(tokens, epoch=8, seed=3).tolist() != order_of(tokens, epoch=3, seed=8).tolist()


@pytest.mark.parametrize("rows", [200, 3000])
def test_rows_meet_other_rows_in_the_next_epoch(rows):
    def neighbours(epoch: int) -> set[frozenset[int]]:
        order = order_of(log_normal(rows), epoch=epoch)
        micro_batches = order[: rows // 4 * 4].reshape(-1, 4).tolist()
        return {frozenset((a, b)) for rows in micro_batches for a in rows for b in rows if a != b}

    assert len(neighbours(0) & neighbours(1)) < 0.1 * len(neighbours(0))


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), SPLITS)
def test_little_of_log_normal_lengths_is_wasted(batch_size, micro_batch_size):
    tokens = log_normal(5000)
    order = order_of(tokens, batch_size, micro_batch_size)
    assert wasted_share(tokens, order, micro_batch_size, batch_size) < 0.02
    assert wasted_share(tokens, shuffled(tokens), micro_batch_size, batch_size) > 0.2


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), SPLITS)
def test_less_than_3_percent_of_hh_is_wasted_in_any_epoch(hh_tokens, batch_size, micro_batch_size):
    for epoch in range(5):
        order = order_of(hh_tokens, batch_size, micro_batch_size, epoch=epoch)
        by_chance = shuffled(hh_tokens, epoch)
        assert wasted_share(hh_tokens, order, micro_batch_size, batch_size) < 0.03
        assert wasted_share(hh_tokens, by_chance, micro_batch_size, batch_size) > 0.25
        largest = micro_batch_tokens(hh_tokens, order, micro_batch_size).max()
        assert largest < 0.8 * micro_batch_tokens(hh_tokens, by_chance, micro_batch_size).max()


@pytest.mark.parametrize(("batch_size", "micro_batch_size"), SPLITS)
def test_steps_of_hh_differ_less_in_length_than_by_chance_but_for_a_few(hh_tokens, batch_size, micro_batch_size):
    means = step_means(hh_tokens, order_of(hh_tokens, batch_size, micro_batch_size), batch_size)
    assert means.std() < step_means(hh_tokens, shuffled(hh_tokens), batch_size).std()
    assert (abs(means - 1) > 0.1).mean() < 0.15
    assert means.max() < 1.6


def test_the_longest_row_may_be_in_any_step_and_in_any_micro_batch_of_it():
    # One window: without shuffled steps its longest row would always come at the end.
    tokens = log_normal(960)
    places = np.array([int(np.argmax(order_of(tokens, epoch=epoch) == tokens.argmax())) for epoch in range(60)])
    assert np.bincount(places * 3 // len(tokens), minlength=3).min() >= 5
    assert len(set(places % 32 // 4)) == 8


def test_what_is_left_over_comes_last_and_is_not_the_longest():
    tokens = np.concatenate([log_normal(2171), [10**6]])
    last_steps = [order_of(tokens, epoch=epoch)[2172 // 32 * 32 :] for epoch in range(30)]
    outlier_is_last = [len(tokens) - 1 in rows for rows in last_steps]
    assert sum(outlier_is_last) <= 5
    short = [set(order_of(tokens[:-1], epoch=epoch)[-3:].tolist()) for epoch in range(30)]
    longest = set(np.argsort(tokens[:-1])[-100:].tolist())
    assert not any(rows & longest for rows in short)
    assert len(set.union(*short)) > 60


def test_waste_is_what_the_longest_micro_batch_makes_the_others_wait():
    # Steps of two micro-batches of two rows: (3 of 7, 7), (4, 4), then a short one alone.
    tokens, order = [1, 2, 3, 4, 2, 2, 1, 3, 9], np.arange(9)
    assert micro_batch_tokens(tokens, order, 2).tolist() == [3, 7, 4, 4, 9]
    assert wasted_share(tokens, order, 2, 4) == pytest.approx(1 - 27 / (2 * 7 + 2 * 4 + 9))
    assert wasted_share(tokens, order[::-1], 9, 9) == 0.0
    assert wasted_share([], np.arange(0), 2, 4) == 0.0


def test_a_million_rows_take_a_few_seconds():
    tokens = log_normal(1_000_000)
    started = time.process_time()
    order_of(tokens, 64, 8)
    assert time.process_time() - started < 3
