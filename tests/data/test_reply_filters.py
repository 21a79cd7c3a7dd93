"""Filters over replies: what each finds and lets pass, measured on labelled rows with hard cases on both sides."""

import json
import time
from pathlib import Path

import pytest

from align.config.constitution import Scaffold
from align.data.reply_filters import FILTERS, Judged, Limits, first_fault

FOLDER = Path(__file__).parent / "reply_filters"
PRECISION_RECALL = {
    "empty": (1.0, 1.0),
    "scaffold_leak": (1.0, 1.0),
    "role_flip": (1.0, 0.96),
    "meta_talk": (1.0, 0.98),
    "unchanged": (1.0, 1.0),
    "near_copy": (0.93, 0.93),
    "repetition": (0.97, 1.0),
    # What has `finished` false is always found; the last words alone tell of few of the others.
    "cut_by_limit": (1.0, 0.88),
    "wrong_language": (1.0, 1.0),
    "too_short": (1.0, 1.0),
    "too_long": (1.0, 1.0),
}
"""At least so much, on these rows. The rules were tuned on them, so expect less elsewhere. On the last rows written,
before anything was tuned on those, recall and precision were 0.83 and 0.91 (meta_talk), 0.70 and 0.78 (role_flip),
0.80 and 1 (wrong_language), 0.92 and 1 (scaffold_leak), 0.75 and 1 (near_copy), 0.40 and 1 (cut_by_limit by its words
alone)."""
GOOD = "Scrub the boards with detergent and warm water, let them dry for two days, and sand off what is left."
ASKED = "How do I remove mold from wood?"


def rows(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def judged(row):
    return Judged(row["prompt"], row["initial"], row["reply"], row.get("finished", True))


def test_every_filter_has_labelled_rows_and_nothing_else_has():
    assert {file.stem for file in FOLDER.glob("*.jsonl")} == set(FILTERS) == set(PRECISION_RECALL)


@pytest.mark.parametrize("name", FILTERS)
def test_labelled_rows_are_thirty_or_more_with_both_labels_and_no_copies(name):
    listed = rows(name)
    labels = [row.pop("label") for row in listed]
    assert len(listed) >= 30 and labels.count(True) >= 10 and labels.count(False) >= 10
    assert len({json.dumps(row, sort_keys=True) for row in listed}) == len(listed)


@pytest.mark.parametrize("name", FILTERS)
def test_precision_and_recall_on_the_labelled_rows(name):
    listed = rows(name)
    found = [FILTERS[name](judged(row), Limits()) for row in listed]
    right = sum(row["label"] for row, hit in zip(listed, found, strict=True) if hit)
    precision, recall = right / sum(found), right / sum(row["label"] for row in listed)
    least = PRECISION_RECALL[name]
    assert precision >= least[0] and recall >= least[1], f"{name}: precision {precision:.3f}, recall {recall:.3f}"


def test_a_broken_reply_is_found_under_some_name():
    broken = [
        row for name in ("scaffold_leak", "role_flip", "meta_talk", "empty") for row in rows(name) if row["label"]
    ]
    missed = [row["reply"] for row in broken if first_fault(judged(row)) is None]
    assert len(broken) > 100 and len(missed) <= 3, missed


def test_a_good_reply_has_no_fault():
    assert first_fault(Judged(ASKED, "Bleach it. It may come back after a while.", GOOD)) is None


@pytest.mark.parametrize(
    ("reply", "finished", "name"),
    [
        ("", False, "empty"),
        ("Critique: none.", True, "scaffold_leak"),
        ("User: and then?\nAssistant: sand it.", True, "scaffold_leak"),
        (GOOD, True, "unchanged"),
        (GOOD, False, "unchanged"),
        (GOOD + " Good luck!", False, "near_copy"),
        ("Scrub the wood, " * 30, False, "repetition"),
        ("Wash the wood with soap, dry it,", False, "cut_by_limit"),
    ],
)
def test_the_first_of_several_faults_names_the_reply(reply, finished, name):
    assert first_fault(Judged(ASKED, GOOD, reply, finished)) == name


def test_a_reply_that_nothing_came_before_is_not_compared():
    for name in ("unchanged", "near_copy", "too_short", "too_long"):
        assert not FILTERS[name](Judged(ASKED, "", GOOD), Limits())
        assert not FILTERS[name](Judged(ASKED, " \n", ""), Limits())


def test_limits_move_the_border():
    short = Judged(ASKED, GOOD + " " + GOOD, "Scrub it.")
    assert FILTERS["too_short"](short, Limits())
    assert not FILTERS["too_short"](short, Limits(shortest_share=0.01, scant_share=0.0))
    longer = Judged(ASKED, "Scrub it.", GOOD)
    assert not FILTERS["too_long"](longer, Limits())
    assert FILTERS["too_long"](longer, Limits(long_words=10))
    near = Judged(ASKED, GOOD, GOOD.replace("warm", "hot"))
    assert FILTERS["near_copy"](near, Limits()) and not FILTERS["near_copy"](near, Limits(near_copy_share=0.01))


@pytest.mark.parametrize(
    "reply", ["Faultless.", "PROBLEM: the mask is missing", "Say whether the villager was kind to all.\n"]
)
def test_the_wording_of_ones_own_scaffold_is_a_leak_too(reply):
    own = Scaffold(
        flaw="Problem:",
        no_flaw="Faultless",
        critique="{conversation}\n{reply}\n{request}\nSay whether the villager was kind to all.",
    )
    row = Judged(ASKED, GOOD, reply)
    assert FILTERS["scaffold_leak"](row, Limits(scaffold=own))
    assert not FILTERS["scaffold_leak"](row, Limits())


@pytest.mark.parametrize(
    ("change", "near"),
    [
        ({"Take the tablets": "Swallow the tablets"}, True),
        ({" with a glass of water": ""}, True),
        ({" and tell your doctor about pills, drops and creams": ""}, False),
        ({"it is safe": "it is unsafe"}, False),
        ({"for five days": "for six days"}, False),
        ({"Take": "Never take"}, False),
        ({"tablets": "pills", "evening": "night", "doctor": "nurse", "water": "milk", "meal": "snack"}, False),
    ],
)
def test_scattered_words_are_a_near_copy_and_a_turn_of_meaning_is_a_change(change, near):
    initial = (
        "Take the tablets in the evening, after a meal, with a glass of water, for five days; it is safe to drive. "
        "Keep the box away from children, note the time, and tell your doctor about pills, drops and creams. Store "
        "leftover packets in a dry cupboard, never above a stove or near a window."
    )
    reply = initial
    for old, new in change.items():
        assert old in reply
        reply = reply.replace(old, new)
    assert FILTERS["near_copy"](Judged("How do I take these?", initial, reply), Limits()) is near


def test_a_passage_taken_out_or_moved_is_a_change_however_long_the_text():
    towns = [
        f"Town{n} has market{n}, church{n}, harbour{n}, bridge{n}, castle{n} and museum{n}." for n in "abcdefghijklm"
    ]
    initial = " ".join(towns)
    assert FILTERS["near_copy"](Judged("Towns?", initial, initial.replace("churcha", "chapela")), Limits())
    assert not FILTERS["near_copy"](Judged("Towns?", initial, " ".join(towns[1:])), Limits())
    scattered = initial
    for n in "abcdefghijklm":
        scattered = scattered.replace(f"market{n}, church{n}", f"church{n}, market{n}")
    assert not FILTERS["near_copy"](Judged("Towns?", initial, scattered), Limits())


def test_lines_may_come_again_in_a_song_and_nowhere_else():
    song = "\n".join(
        f"{line}\nAnd the harbour lights call me home again" for line in ("One", "Two boats", "Three nets")
    )
    assert not FILTERS["repetition"](Judged("Write a song.", "", song), Limits())
    assert FILTERS["repetition"](Judged("Write a report.", "", song), Limits())


def test_the_language_of_earlier_turns_counts_where_the_prompt_shows_none():
    german = "Ich habe ein Brett mit Schimmel, und ich weiß nicht, wie ich das wieder weg bekomme."
    reply = GOOD + " You can do it and it is easy."
    assert FILTERS["wrong_language"](Judged("ok", "", reply, conversation=german), Limits())
    assert not FILTERS["wrong_language"](Judged("ok", "", reply), Limits())


def test_what_was_said_in_earlier_turns_may_be_taken_back():
    reply = "My previous response was dangerous. Never mix them."
    assert FILTERS["meta_talk"](Judged("And bleach?", "", reply), Limits())
    assert not FILTERS["meta_talk"](Judged("And bleach?", "", reply, conversation="Can I mix cleaners?"), Limits())


HOSTILE = ["a", "\n", "word ", "(", '"', "«", "<b", "how do i ", "i ", "thank you, ", "1. ", "- "]


@pytest.mark.parametrize("part", HOSTILE)
def test_long_and_hostile_replies_take_no_time(part):
    reply = part * (10_000 // len(part))
    started = time.process_time()
    first_fault(Judged(reply[:2000], GOOD * 20, reply))
    first_fault(Judged(ASKED, reply, reply + "x"))
    for applies in FILTERS.values():
        applies(Judged(ASKED, GOOD, reply), Limits())
    assert time.process_time() - started < 1.0
