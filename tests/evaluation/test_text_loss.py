"""Loss by the word: by hand, and the same text whatever the tokenizer."""

import math

import numpy as np
import pytest

from align.evaluation.text_loss import text_loss, text_loss_change, word_counts


def test_perplexity_by_hand():
    found = text_loss(np.array([-4.0, -8.0]), word_counts(["two words", "a  text of\nfour"]))
    assert (found.per_word, found.words, found.documents) == (2.0, 6, 2)
    assert found.perplexity == pytest.approx(math.exp(2))


def test_a_uniform_guess_over_v_words_has_perplexity_v():
    words = np.array([3.0, 5.0, 2.0])
    assert text_loss(words * -math.log(50), words).perplexity == pytest.approx(50)


def test_how_text_is_cut_into_tokens_does_not_matter():
    words = np.array([4.0])
    few, many = np.full(4, -3.0), np.full(12, -1.0)
    assert text_loss(np.array([few.sum()]), words) == text_loss(np.array([many.sum()]), words)


def test_the_change_is_by_the_word_and_its_interval_by_the_document():
    words = np.array([10.0, 30, 20, 40] * 10)
    before = -2.0 * words
    after = before - words * np.array([0.1, 0.0, 0.2, 0.1] * 10)
    found = text_loss_change(before, after, words)
    assert found.mean == pytest.approx((1 + 0 + 4 + 4) / 100)
    assert found.low < found.mean < found.high and found.clusters == 40
    assert (found.high - found.low) / found.standard_error == pytest.approx(3.92, rel=0.1)
    assert found.mean == pytest.approx(text_loss(after, words).per_word - text_loss(before, words).per_word)
    same = text_loss_change(before, before, words)
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_what_is_no_number_is_refused_and_what_is_endless_is_said():
    assert text_loss(np.array([-1e6]), np.array([1.0])).perplexity == math.inf
    for logps, words in (([math.nan], [1.0]), ([-1.0], [0.0]), ([-1.0, -2.0], [1.0])):
        with pytest.raises(ValueError, match="one finite log-probability"):
            text_loss(np.array(logps), np.array(words))
