"""What does not fit is counted, never cut; what is held out is decided by the first turn alone."""

import random

import pytest

from align.data.fit import pair_tokens, refuse_too_long, text_pieces, trained_tokens
from align.data.held_out import first_turn, held_out_rows, held_out_tails, position
from align.data.records import Message, RowRefused


def test_a_row_of_exactly_max_tokens_fits_and_one_more_does_not():
    refuse_too_long(8, 8)
    with pytest.raises(RowRefused, match="too_long: 9 tokens, max_tokens=8"):
        refuse_too_long(9, 8)


def test_a_pair_is_as_long_as_its_prompt_and_its_longer_completion():
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6]}
    assert pair_tokens(row) == 5
    assert trained_tokens(row) == 3


@pytest.mark.parametrize(("tokens", "sizes"), [(7, [7]), (8, [8]), (9, [7, 2]), (20, [8, 8, 4]), (17, [8, 7, 2])])
def test_text_is_cut_into_consecutive_pieces_and_nothing_is_lost(tokens, sizes):
    pieces = text_pieces(list(range(tokens)), 8)
    assert [len(piece["input_ids"]) for piece in pieces] == sizes
    assert [token for piece in pieces for token in piece["input_ids"]] == list(range(tokens))
    assert all(piece["labels"] == piece["input_ids"] for piece in pieces)


def test_near_copies_of_a_first_turn_fall_together():
    assert position("How do I\n cook rice?") == position("  how do i cook RICE? ")
    assert position("how do i cook rice?") != position("how do i cook pasta?")


def test_the_first_turn_is_the_users_not_the_systems():
    assert first_turn([Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "So.")]) == "Why?"


def test_the_share_held_out_is_the_one_asked_for_and_does_not_depend_on_order_or_other_rows():
    turns = [f"question {n}" for n in range(4000)]
    kept_out = {turn for turn, out in zip(turns, held_out_rows([*map(position, turns)], 0.05), strict=True) if out}
    assert 0.04 < len(kept_out) / 4000 < 0.06
    random.Random(0).shuffle(turns)
    fewer = turns[:1000]
    again = {turn for turn, out in zip(fewer, held_out_rows([*map(position, fewer)], 0.05), strict=True) if out}
    assert again == kept_out & set(fewer)


def test_a_position_never_moves():
    assert position("How do I cook rice?") == pytest.approx(0.32916111, abs=1e-8)


def test_from_twenty_rows_on_something_is_held_out():
    places = [0.5 + n / 100 for n in range(20)]
    assert held_out_rows(places, 0.01) == [True] + [False] * 19
    assert held_out_rows(places[:19], 0.01) == [False] * 19
    assert held_out_rows(places, 0.0) == [False] * 20


def test_never_everything_is_held_out():
    assert held_out_rows([0.01] * 30, 0.05) == [False] * 30


def test_of_few_long_documents_the_ends_are_held_out():
    assert held_out_tails([20, 3], 0.1) == [False] * 18 + [True] * 2 + [False] * 3
