"""Figures of guessed labels against scikit-learn's (1.9.1) and scikit-learn's published example."""

import pytest

from align.evaluation.classification import classified

TRUTH = list("caaaaccbaaabbbaaccaabbcbbbbbaccccaabbccacaaccaaaacbbabacbaac")
GUESSED = list("caaaaccdaaabbbbcbccabdcbbbababcdcaabbdcbcaaaaadacdbbccabbaac")


def test_figures_are_those_of_scikit_learn():
    """accuracy_score, f1_score(average="macro", labels=list("abc")), f1_score, precision_score and recall_score with
    average=None, confusion_matrix; the rows were drawn by numpy's default_rng(3)."""
    found = classified("abcd", TRUTH, GUESSED, draws=200)
    assert found.accuracy.mean == pytest.approx(0.6833333333333333)
    assert found.macro_f1 == pytest.approx(0.7105088148566409)
    assert list(found.f1.values()) == pytest.approx([0.7826087, 0.74285714, 0.60606061, 0.0])
    assert list(found.precision.values()) == pytest.approx([0.85714286, 0.72222222, 0.66666667, 0.0])
    assert list(found.recall.values()) == pytest.approx([0.72, 0.76470588, 0.55555556, 0.0])
    assert found.confusion == [[18, 2, 4, 1], [1, 13, 1, 2], [2, 3, 10, 3], [0, 0, 0, 0]]
    assert found.accuracy.low < found.accuracy.mean < found.accuracy.high


def test_the_example_of_scikit_learns_documentation():
    found = classified("012", list("012012"), list("021001"), draws=200)
    assert found.macro_f1 == pytest.approx(0.26, abs=0.01) and found.f1["0"] == pytest.approx(0.8)
    assert found.confusion == [[2, 0, 0], [1, 0, 1], [0, 2, 0]]


def test_no_guess_is_wrong_and_in_no_column():
    found = classified("ab", ["a", "b", "b"], ["a", None, "b"], draws=200)
    assert (found.unanswered, found.accuracy.mean, found.confusion) == (1, pytest.approx(2 / 3), [[1, 0], [0, 1]])
    assert found.recall["b"] == 0.5


def test_rows_that_do_not_fit_are_refused():
    for truth, guessed in (([], []), (["a"], []), (["c"], ["a"])):
        with pytest.raises(ValueError):
            classified("ab", truth, guessed, draws=200)
