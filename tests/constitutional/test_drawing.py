"""What is drawn for a prompt: by weight, without replacement where asked, and by nothing but the seed."""

import hashlib
from collections import Counter

import pytest

from align.config.schema import Draw
from align.constitutional.drawing import draw_principles, seed_of
from tests.constitutional.making import Desk, constitution, principle, row, speaker, stage

WEIGHTS = {"rare": 1.0, "usual": 2.0, "often": 5.0}
PRINCIPLES = [principle(id, weight=weight) for id, weight in WEIGHTS.items()]
DRAWS = 4000
CHI_SQUARE = 13.8
"""Two degrees of freedom: passed by chance once in a thousand times; the seeds are fixed, so never or always."""


def chi_square(counts):
    expected = {id: DRAWS * weight / 8 for id, weight in WEIGHTS.items()}
    assert sum(counts.values()) == DRAWS
    return sum((counts[id] - wanted) ** 2 / wanted for id, wanted in expected.items())


@pytest.mark.parametrize("draw", [Draw.with_replacement, Draw.without_replacement])
def test_the_first_principle_comes_as_often_as_its_weight_says(draw):
    counts = Counter(draw_principles(PRINCIPLES, 3, draw, seed_of(7, n))[0].id for n in range(DRAWS))
    assert chi_square(counts) < CHI_SQUARE


def test_with_replacement_every_later_one_does_too():
    counts = Counter(draw_principles(PRINCIPLES, 3, Draw.with_replacement, seed_of(7, n))[2].id for n in range(DRAWS))
    assert chi_square(counts) < CHI_SQUARE


def test_without_replacement_what_is_left_is_drawn_by_weight():
    drawn = [draw_principles(PRINCIPLES, 2, Draw.without_replacement, seed_of(7, n)) for n in range(DRAWS)]
    after_often = Counter(second.id for first, second in drawn if first.id == "often")
    assert after_often["usual"] / after_often.total() == pytest.approx(2 / 3, abs=0.04)


def test_without_replacement_all_come_once_before_any_comes_twice():
    for n in range(200):
        ids = [one.id for one in draw_principles(PRINCIPLES, 8, Draw.without_replacement, n)]
        assert set(ids[:3]) == set(ids[3:6]) == set(WEIGHTS)
        assert len(set(ids[6:])) == 2


def test_with_replacement_some_come_twice_in_a_row():
    assert any(len({one.id for one in draw_principles(PRINCIPLES, 3, Draw.with_replacement, n)}) < 3 for n in range(9))


def test_in_order_takes_them_as_they_are_written():
    ids = [one.id for one in draw_principles(PRINCIPLES, 7, Draw.in_order, 3)]
    assert ids == ["rare", "usual", "often", "rare", "usual", "often", "rare"]


def test_a_longer_draw_begins_like_a_shorter_one():
    for draw in Draw:
        longer, shorter = (draw_principles(PRINCIPLES, count, draw, 11) for count in (6, 2))
        assert longer[:2] == shorter


def test_a_seed_is_the_digest_of_its_parts():
    digest = hashlib.sha256(b"7\x1finitial\x1fp1").digest()
    assert seed_of(7, "initial", "p1") == int.from_bytes(digest[:8], "little") // 2
    assert seed_of("ab", "c") != seed_of("a", "bc")
    assert seed_of("\ud800") < 2**63


def drawn_for(works, folder):
    """The principles of each prompt's rounds, where each critique finds a flaw."""
    model = speaker(lambda ask, question: f"Flaw: {ask.seed}")
    desk = Desk(folder, stage(rounds=3), constitution(*(f"c{n}" for n in range(9))), model)
    return {work.id: [one.principle.id for one in work.rounds] for work in desk.revise(works)}


def test_what_a_prompt_draws_depends_on_no_other_prompt(tmp_path):
    names = [f"p{n}" for n in range(12)]
    alone = drawn_for([row(name) for name in names], tmp_path / "all")
    assert drawn_for([row(name) for name in reversed(names)], tmp_path / "reversed") == alone
    some = drawn_for([row(name) for name in names[5:8]], tmp_path / "some")
    assert some == {name: alone[name] for name in names[5:8]}
    assert len(set(map(tuple, alone.values()))) > 6, "prompts draw alike"
