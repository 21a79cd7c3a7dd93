"""Numbers out of replies, and what became of each row."""

import json
from decimal import Decimal

import numpy as np
import pytest

from align.config.errors import UserError
from align.evaluation.tasks import change, exact_match, given_answer, gold_answer, numbers
from tests.evaluation.published import folder_of


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 and 4.50, then 1,234,567.", ["3", "4.5", "1234567"]),
        ("$5.00 is -$5? No: $-5.", ["5", "-5", "-5"]),
        ("16-3=13, x = -2, (-7)", ["16", "3", "13", "-2", "-7"]),
        ("from 10 - 4 to 6", ["10", "4", "6"]),
        ("half is .5, of v2.1.", ["0.5", "2.1"]),
        ("none", []),
    ],
)
def test_numbers_are_read_as_people_read_them(text, found):
    assert numbers(text) == [Decimal(one) for one in found]


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("16 - 3 = 13\n#### 13", "13"),
        ("first #### 4\nno, #### 1,000 in 3 days", "1000"),
        ("So she makes $18.00 a day.", "18"),
        ("The answer is 7. ####", "7"),
        ("2 of them and 3 make 5 in all.", "5"),
        ("I do not know.", None),
    ],
)
def test_the_answer_of_a_reply(reply, answer):
    assert given_answer(reply) == (None if answer is None else Decimal(answer))


def test_a_solution_without_an_answer_is_refused_by_its_place():
    assert gold_answer("so\n#### 1,200") == 1200
    for solution in ("42", "#### none", "#### 3 or 4"):
        with pytest.raises(UserError, match=r"test.jsonl:7: no single number after ####; give"):
            gold_answer(solution, "test.jsonl:7")
    with pytest.raises(UserError, match="row 2: no single number"):
        exact_match(["1", "2"], ["#### 1", "2"])


def test_right_answers_are_counted_and_so_are_replies_without_one():
    found = exact_match(["it is 3", "3.0 of course", "4", "?"], ["#### 3"] * 4)
    assert found.right.tolist() == [1, 1, 0, 0]
    assert (found.accuracy.share, found.accuracy.count, found.without_number) == (0.5, 4, 1)
    assert exact_match([], []) is None


def test_before_and_after_are_compared_row_by_row():
    before, after = np.array([1.0] * 60 + [0] * 40), np.array([1.0] * 50 + [0] * 10 + [1] * 30 + [0] * 10)
    found = change(before, after)
    assert (found.before, found.after, found.gained, found.lost) == (0.6, 0.8, 30, 10)
    assert found.difference.mean == pytest.approx(0.2)
    # 30 up, 10 down: sd of the differences is sqrt(0.4 - 0.04).
    assert found.difference.standard_error == pytest.approx(np.sqrt(0.36 / 99), rel=1e-9)
    assert found.difference.low == pytest.approx(0.2 - 1.96 * np.sqrt(0.36 / 99), abs=0.02)
    assert change(np.array([]), np.array([])) is None


@pytest.mark.real_data
def test_every_solution_of_gsm8k_has_its_answer_and_is_right_against_itself(real_data):
    rows = [json.loads(line) for line in open(folder_of(real_data, "gsm8k") / "test.jsonl", encoding="utf-8")]
    solutions = [row["answer"] for row in rows]
    assert len(rows) == 1319 and gold_answer(solutions[0]) == 18
    assert exact_match(solutions, solutions).accuracy.share == 1.0
    # The last line's number, with the mark taken away and a sentence around it.
    said = [f"So the answer is {solution.split('####')[1].strip()}." for solution in solutions]
    assert exact_match(said, solutions).accuracy.share == 1.0
    shifted = exact_match(solutions[1:] + solutions[:1], solutions)
    assert shifted.accuracy.share < 0.05 and shifted.without_number == 0
