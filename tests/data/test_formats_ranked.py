"""Compared answers: labels, scores, ranks and votes are read by one stated convention, their ties kept."""

from dataclasses import replace

import pytest

from align.config.errors import UserError
from align.config.schema import Ties
from align.data.formats import FORMATS, as_records, find_format
from align.data.quality import check_record
from align.data.records import Demonstration, Message, PreferencePair, PromptRow, Ranking, RowRefused

ASK = Message("user", "Why?")
A, B, C, D = (Message("assistant", text) for text in "abcd")
A_BETTER, B_BETTER = PreferencePair((ASK,), A, B), PreferencePair((ASK,), B, A)
TIE = PreferencePair((ASK,), A, B, p=0.5, tie=True)
MESSAGES = [{"role": "user", "content": "Why?"}]
TWO = {"question": "Why?", "response1": "a", "response2": "b"}


def scored(pair, chosen, rejected):
    return replace(pair, scores=(float(chosen), float(rejected)))


def turn(text, role, *replies, rank=None, **more):
    return {"text": text, "role": role, "rank": rank, "replies": list(replies), **more}


TREE = turn(
    "Why?",
    "prompter",
    turn("b", "assistant", rank=1),
    turn(
        "a",
        "assistant",
        turn("So?", "prompter", turn("c", "assistant", rank=0), turn("d", "assistant", rank=1)),
        rank=0,
    ),
)
SO = (ASK, A, Message("user", "So?"))
RANKINGS = [Ranking((ASK,), (B, A), (1.0, 0.0)), Ranking(SO, (C, D), (0.0, 1.0))]

EXAMPLES = [
    ("comparison_label", {"input": "Why?", "output_1": "a", "output_2": "b", "label": 1}, A_BETTER),
    ("comparison_label", {"prompt": "Why?", "response_0": "a", "response_1": "b", "preferred": 1}, B_BETTER),
    ("comparison_label", {"messages": MESSAGES, "answer_a": "a", "answer_b": "b", "winner": "b"}, B_BETTER),
    ("comparison_label", {"instruction": "Why?", "output 1": "a", "output 2": "b", "label": 0}, TIE),
    (
        "comparison_scores",
        {"question": "Why?", "answer_a": "a", "answer_b": "b", "score_a": 3, "score_b": 2},
        scored(A_BETTER, 3, 2),
    ),
    (
        "comparison_scores",
        {"prompt": "Why?", "output_0": "a", "output_1": "b", "score_0": "1", "score_1": 4},
        scored(B_BETTER, 4, 1),
    ),
    ("comparison_scores", TWO | {"score_1": 2, "score_2": 2.0}, scored(TIE, 2, 2)),
    ("votes", TWO | {"annotator1": 1, "annotator2": 1, "annotator3": 1}, A_BETTER),
    ("votes", TWO | {"votes": [2, 2]}, B_BETTER),
    ("votes", TWO | {"votes": {"ann": 0, "bob": 0}}, TIE),
    (
        "pairwise_labels",
        {"question": "Why?", "prediction 1": "a", "prediction 2": "b", "prediction 3": "c", "preference": [1, 0, 2]},
        [A_BETTER, PreferencePair((ASK,), A, C, p=0.5, tie=True), PreferencePair((ASK,), C, B)],
    ),
    (
        "ranking",
        {"prompt": "Why?", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]},
        Ranking((ASK,), (A, B, C), (2.0, 1.0, 2.0)),
    ),
    (
        "ranking",
        {"prompt": "Why?", "responses": ["a", "b"], "scores": [0.5, 7]},
        Ranking((ASK,), (A, B), (-0.5, -7.0), scores=(0.5, 7.0)),
    ),
    (
        "ranking",
        {"question": "Why?", "answers": [{"text": "a", "rank": 0}, {"content": "b", "rank": 1}]},
        Ranking((ASK,), (A, B), (0.0, 1.0)),
    ),
    (
        "ranking",
        {"prompt": "Why?", "completions": [A.as_dict(), [B.as_dict()]], "ranks": [0, 1]},
        Ranking((ASK,), (A, B), (0.0, 1.0)),
    ),
    ("oasst_tree", TREE, RANKINGS),
    ("oasst_tree", {"message_tree_id": "x", "prompt": TREE}, RANKINGS),
]


@pytest.mark.parametrize(("name", "row", "expected"), EXAMPLES, ids=[f"{e[0]}-{i}" for i, e in enumerate(EXAMPLES)])
def test_a_format_is_found_and_read(name, row, expected):
    for wanted in (None, PreferencePair, PromptRow, Demonstration):
        assert find_format([row], wanted, "data.x").name == name
    found = as_records(FORMATS[name], None, row, ties=Ties.keep)
    assert found == (expected if isinstance(expected, list) else [expected])
    for record in found:
        check_record(record)


def converted(name, row, wanted, ties=Ties.keep):
    return as_records(FORMATS[name], wanted, row, ties=ties)


def reasons(records):
    return [record.reason if isinstance(record, RowRefused) else "" for record in records]


def label(value, suffixes):
    first, second = suffixes
    row = {"prompt": "Why?", f"output_{first}": "a", f"output_{second}": "b", "label": value}
    return converted("comparison_label", row, PreferencePair)


@pytest.mark.parametrize(
    ("suffixes", "first", "second", "tie"),
    [
        ("12", [1, "1", 1.0, "output_1", "first"], [2, "2", "Output (2)", "model_2"], [0, "0", "tie", "Both"]),
        ("01", [0, "0", "output_0"], [1, "1", 1.0, "second"], ["tie", "draw", "equal"]),
        ("ab", ["a", "A", "[[A]]", "model_a"], ["b", "B", "answer b"], ["tie", "Tie (bothbad)", "both"]),
        ("AB", ["a", "A"], ["b", "B"], ["tie"]),
    ],
)
def test_labels_are_read_by_what_the_answers_are_called(suffixes, first, second, tie):
    for values, expected in ((first, A_BETTER), (second, B_BETTER), (tie, TIE)):
        for value in values:
            assert label(value, suffixes) == [expected], value


@pytest.mark.parametrize(
    ("suffixes", "value"),
    [("12", 3), ("12", -1), ("12", "-1"), ("12", "a"), ("01", 2), ("ab", 1), ("ab", "c"), ("ab", ""), ("12", 1.5)],
)
def test_a_label_that_names_no_answer_is_refused(suffixes, value):
    with pytest.raises(RowRefused, match="unknown_label"):
        label(value, suffixes)


@pytest.mark.parametrize("value", [True, False, [1], {"a": 1}])
def test_a_label_that_is_no_label_is_refused(value):
    with pytest.raises(RowRefused, match="wrong_type"):
        label(value, "12")


def test_labels_0_and_1_of_answers_1_and_2_are_not_guessed():
    rows = [{"prompt": "Why?", "output_1": "a", "output_2": "b", "label": value} for value in (0, 1, 1, 0)]
    with pytest.raises(UserError, match="if 0 is a tie, say format=comparison_label; if 0 is the first answer, rename"):
        find_format(rows, PreferencePair, "data.preferences=x")
    assert find_format([*rows, rows[0] | {"label": 2}], PreferencePair, "x").name == "comparison_label"


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (TWO | {"label": 1, "annotator1": 1}, "comparison_label or votes"),
        (TWO | {"label": 1, "score_1": 1, "score_2": 2}, "comparison_label or comparison_scores"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "completions": ["b", "c"], "ranks": [0, 1]},
            "preference or ran",
        ),
    ],
)
def test_rows_with_two_verdicts_fit_two_formats(row, names):
    with pytest.raises(UserError, match=f"can be read as {names}"):
        find_format([row], PreferencePair, "data.preferences=x")


def reason(name, row):
    with pytest.raises(RowRefused) as refused:
        for record in as_records(FORMATS[name], None, row, ties=Ties.keep):
            if isinstance(record, RowRefused):
                raise record
            check_record(record)
    return refused.value.reason


LISTED = {"prompt": "Why?", "completions": ["a", "b"]}
PREDICTED = {"question": "Why?", "prediction 1": "a", "prediction 2": "b"}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("comparison_label", TWO | {"response3": "c", "label": 1}, "ambiguous_answers"),
        ("comparison_label", TWO | {"response_a": "a", "response_b": "c", "label": 1}, "ambiguous_answers"),
        ("comparison_label", TWO | {"label": 1, "winner": 2}, "ambiguous_label"),
        ("comparison_label", TWO | {"label": None}, "missing_field"),
        ("comparison_label", TWO | {"label": 1, "prompt": "How?"}, "ambiguous_prompt"),
        ("comparison_label", TWO | {"label": 1, "input": "How?"}, "ambiguous_prompt"),
        ("comparison_label", TWO | {"label": 1, "question": None}, "missing_field"),
        ("comparison_label", TWO | {"label": 1, "response2": True}, "wrong_type"),
        ("comparison_label", TWO | {"label": 1, "response2": "a"}, "chosen_equals_rejected"),
        ("comparison_scores", TWO | {"score_1": 1}, "missing_field"),
        ("comparison_scores", TWO | {"score_1": 1, "score_2": True}, "wrong_type"),
        ("comparison_scores", TWO | {"score_1": 1, "score_2": float("nan")}, "wrong_type"),
        ("comparison_scores", TWO | {"score_1": 1, "score_2": 10**400}, "wrong_type"),
        ("comparison_scores", TWO | {"score_1": 1, "score_2": "two"}, "wrong_type"),
        ("votes", TWO | {"annotator1": None}, "missing_field"),
        ("votes", TWO | {"annotator1": 3}, "unknown_label"),
        ("votes", TWO | {"votes": 2}, "wrong_type"),
        ("pairwise_labels", PREDICTED | {"preference": [1, 1]}, "wrong_type"),
        ("pairwise_labels", PREDICTED | {"preference": [3]}, "unknown_label"),
        ("pairwise_labels", PREDICTED | {"preference": [1], "passages": [[1]]}, "wrong_type"),
        ("pairwise_labels", {"question": "Why?", "prediction 1": "a", "preference": []}, "too_few_answers"),
        ("ranking", LISTED, "ambiguous_ranks"),
        ("ranking", LISTED | {"ranks": [0, 1], "scores": [1, 0]}, "ambiguous_ranks"),
        ("ranking", LISTED | {"ranks": [0, 1, 2]}, "wrong_type"),
        ("ranking", LISTED | {"ranks": [0, None]}, "wrong_type"),
        ("ranking", LISTED | {"completions": ["a"], "ranks": [0]}, "too_few_answers"),
        ("ranking", LISTED | {"completions": ["a", "a "], "ranks": [0, 1]}, "answers_equal"),
        ("ranking", LISTED | {"completions": ["a", ""], "ranks": [0, 1]}, "empty_completion"),
        ("oasst_tree", turn("Why?", "prompter"), "nothing_to_compare"),
        ("oasst_tree", turn("Why?", "assistant"), "roles_do_not_alternate"),
        ("oasst_tree", turn("Why?", "prompter", deleted=True), "deleted"),
        ("oasst_tree", turn("Why?", "prompter", turn("a", "assistant"), turn("b", "assistant")), "unranked"),
        ("oasst_tree", turn("Why?", "prompter", turn("a", "prompter")), "roles_do_not_alternate"),
        ("oasst_tree", turn("Why?", "prompter", "a"), "wrong_type"),
    ],
)
def test_a_bad_row_is_refused_with_its_reason(name, row, expected):
    assert reason(name, row) == expected


def test_a_margin_is_kept():
    (pair,) = converted("comparison_label", TWO | {"label": 2, "margin": 3}, PreferencePair)
    assert pair == PreferencePair((ASK,), B, A, margin=3.0)


@pytest.mark.parametrize(
    ("votes", "chosen", "p", "tie"),
    [
        ([1, 1, 2], A, 2 / 3, False),
        ([2, 2, 1], B, 2 / 3, False),
        ([2, 2, 0], B, 5 / 6, False),
        ([0, 0, 2], B, 2 / 3, True),
        ([0, 1, 2], A, 1 / 2, True),
        ([1, 2], A, 1 / 2, True),
        ([0, 1], A, 3 / 4, False),
        ([0, 0, 0], A, 1 / 2, True),
        ([1, None, 1], A, 1, False),
    ],
)
def test_votes_give_their_share_and_most_votes_decide_what_is_a_tie(votes, chosen, p, tie):
    (pair,) = converted("votes", TWO | {"votes": votes}, PreferencePair)
    assert (pair.chosen, pair.tie) == (chosen, tie)
    assert pair.p == pytest.approx(p)


def test_a_ranking_makes_all_its_pairs_and_equal_ranks_are_ties():
    row = {"prompt": "Why?", "completions": ["a", "b", "c"], "ranks": [2, 1, 2]}
    tie = PreferencePair((ASK,), A, C, p=0.5, tie=True)
    pairs = [PreferencePair((ASK,), B, A), PreferencePair((ASK,), B, C)]
    assert converted("ranking", row, PreferencePair) == [*pairs, tie]
    assert reasons(converted("ranking", row, PreferencePair, Ties.drop)) == ["", "", "tie"]


def test_the_single_best_answer_of_a_ranking_is_a_demonstration():
    row = {"prompt": "Why?", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}
    assert converted("ranking", row, Demonstration) == [Demonstration((ASK, B))]
    assert reasons(converted("ranking", row | {"scores": [3, 3, 2]}, Demonstration)) == ["tie"]
    assert converted("ranking", row, PromptRow) == [PromptRow((ASK,), row)]


def test_the_prediction_that_wins_most_is_a_demonstration_and_the_row_is_one_prompt():
    row = PREDICTED | {"prediction 3": "c", "preference": [2, 0, 1]}
    assert converted("pairwise_labels", row, Demonstration) == [Demonstration((ASK, B))]
    assert converted("pairwise_labels", row, PromptRow) == [PromptRow((ASK,), row)]
    with pytest.raises(RowRefused, match="tie: 3 answers are equally good"):
        converted("pairwise_labels", row | {"preference": [0, 0, 0]}, Demonstration)


def test_passages_come_before_the_question():
    row = PREDICTED | {"preference": [1], "passages": [["Title", "One.", "Two."], ["Other"], "Text."]}
    (pair,) = converted("pairwise_labels", row, PreferencePair)
    assert pair.prompt == (Message("user", "Title\nOne. Two.\n\nOther\n\nText.\n\nWhy?"),)


def test_a_tree_is_one_conversation_along_its_best_answers():
    assert converted("oasst_tree", TREE, Demonstration) == [Demonstration((*SO, C))]
    assert converted("oasst_tree", TREE, PromptRow) == [PromptRow((ASK,), TREE)]


def test_a_conversation_of_a_tree_ends_where_no_reply_is_the_best():
    follow_up = [turn("So?", "prompter", turn("c", "assistant")), turn("And?", "prompter", turn("d", "assistant"))]
    two_questions = turn("Why?", "prompter", turn("a", "assistant", *follow_up))
    unranked = turn("So?", "prompter", turn("c", "assistant"), turn("d", "assistant"))
    for tree in (two_questions, turn("Why?", "prompter", turn("a", "assistant", unranked))):
        assert converted("oasst_tree", tree, Demonstration) == [Demonstration((ASK, A))]
    equal = turn("Why?", "prompter", turn("a", "assistant", rank=0), turn("b", "assistant", rank=0))
    for tree, expected in ((turn("Why?", "prompter"), "unanswered"), (unranked, "unranked"), (equal, "tie")):
        with pytest.raises(RowRefused, match=expected):
            converted("oasst_tree", tree, Demonstration)


def test_deleted_turns_of_a_tree_are_passed_over_and_bad_branches_left_out():
    gone = turn("", "assistant", rank=2, deleted=True)
    tree = turn("Why?", "prompter", *TREE["replies"], gone)
    assert converted("oasst_tree", tree, None) == RANKINGS
    broken = turn("Why?", "prompter", *TREE["replies"], turn(3, "assistant", rank=2))
    refused, deeper = converted("oasst_tree", broken, None)
    assert refused.reason == "wrong_type"
    assert deeper == RANKINGS[1]
