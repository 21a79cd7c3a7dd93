"""The page of the constitutional stage: one sound file, every figure under its name, nothing unescaped."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from align.tracking.constitutional_page import constitutional_page

# What HTML leaves open on purpose.
VOID = re.compile(r"<(meta|br)( [^>]*)?>")
EVIL = "<b>&\"'</pre><script>x</script>"


def figures(**changes):
    principle = {
        "critiques": 40, "flaws": 0.75, "accepted": 0.6, "judged": 12, "p": 0.61, "from_the_others": 0.07,
        "position_gap": -0.13,
    }  # fmt: skip
    made = {
        "prompts": 1234,
        "left_out": {"initial_empty": 11},
        "demonstrations": {"made": 1001, "of_prompts": 0.8, "kept_as_they_were": 77, "helpful_mixed_in": 501},
        "rounds": {
            "critiques": 2000, "flaws": 1500, "without_verdict": 100, "accepted": 900, "left_out": {"unchanged": 12},
        },
        "refusals": {"initial": 0.111, "targets": 0.222},
        "words": {"initial": 33.3, "targets": 44.4},
        "principles": {"kind": principle},
        "pairs": {
            "judged": 4, "failed": {"verdict_timeout": 13}, "p_chosen": 0.789, "undecided": 0.25, "disagreement": 0.123,
            "position_gap": 0.456, "orders_contradict": 0.375, "p": [0.05, 0.55, 0.59, 1.0],
        },
        "replies_left_out": {"sample_repeated": 14},
        "steps": {
            "initial": {"calls": 1234, "prompt_tokens": 5000, "new_tokens": 7000, "failed": {"timeout": 3}},
            "judge": {"calls": 8, "prompt_tokens": 900, "new_tokens": 0, "failed": {}},
        },
        "price": 12.34,
    }  # fmt: skip
    return made | changes


def trace(**changes):
    made = {
        "id": "1", "left_out": None, "targets": ["after"],
        "conversation": [{"role": "user", "content": "How?"}],
        "answers": [{"step": "initial", "text": "\nfirst"}, {"step": "critique_1", "text": "Flaw: bad"}],
        "rounds": [
            {"principle": "kind", "before": "first", "critique": "bad", "flaw": True, "marked": True,
             "revision": "after", "left_out": None, "verdict": {"p": 0.87}},
            {"principle": "true", "before": "after", "critique": "worse", "flaw": True, "marked": True,
             "revision": "after", "left_out": "unchanged", "verdict": None},
            {"principle": "brief", "before": "after", "critique": "", "flaw": False, "marked": True,
             "revision": None, "left_out": None, "verdict": None},
        ],
        "pairs": [
            {"source": "all", "first": "one", "second": "two", "left_out": None, "verdict": {"p": 0.66}},
            {"source": "all", "first": "one", "second": "six", "left_out": "verdict_timeout", "verdict": None},
        ],
    }  # fmt: skip
    return made | changes


def parsed(text):
    """The page as XML, which fails on a tag that is closed in the wrong place or never."""
    text = text.removeprefix("<!doctype html>\n").replace("&ensp;", " ").replace("&nbsp;", " ")
    return ElementTree.fromstring(VOID.sub("", text))


def page(made=None, traces=None, title="Made", words="by test 1"):
    return constitutional_page(
        figures() if made is None else made, [trace()] if traces is None else traces, title, words
    )


def body(*args, **kwargs):
    return parsed(page(*args, **kwargs)).find("body")


def table_rows(element):
    return [[" ".join("".join(cell.itertext()).split()) for cell in line] for line in element.iter("tr")]


def test_the_page_says_first_what_was_made():
    found = body()
    assert "".join(found.find("h1").itertext()) == "Made"
    [verdict] = [p.text for p in found.iter("p") if p.get("class") == "verdict"]
    assert verdict == "1,001 demonstrations of 1,234 prompts (80% of them), 4 judged pairs"
    assert "by test 1" in "".join(found.itertext())


@pytest.mark.parametrize(
    "cells",
    [
        ["critiques", "2,000"],
        ["of them found a flaw", "1,500 (75%)"],
        ["of them without either mark, counted as a flaw", "100 (5%)"],
        ["revisions accepted", "900 (60%)"],
        ["prompts whose first reply was kept as it was", "77"],
        ["helpful rows mixed in", "501"],
        ["replies that open like a refusal, first and learnt", "11.1% → 22.2%"],
        ["words of a reply, first and learnt", "33.3 → 44.4"],
        ["prompts", "initial_empty", "11"],
        ["revisions", "unchanged", "12"],
        ["pairs", "verdict_timeout", "13"],
        ["sampled replies", "sample_repeated", "14"],
        ["kind", "40", "75%", "60%", "12", "0.61", "0.07", "-0.13"],
        ["mean probability of the chosen reply", "0.789"],
        ["undecided pairs (within 0.05 of 0.5)", "25.0%"],
        ["disagreement between principles (standard deviation)", "0.123"],
        ["position gap (0: fair, 1: always the first slot)", "+0.456"],
        ["verdicts that the other order contradicts", "37.5%"],
        ["initial", "1,234", "5,000", "7,000", "3"],
        ["judge", "8", "900", "0", "0"],
        ["all", "1,242", "5,900", "7,000", "3"],
    ],
)
def test_every_figure_stands_under_its_name(cells):
    assert cells in table_rows(body())


def test_probabilities_are_counted_in_ten_bins_with_one_in_the_last():
    bins = {cells[0]: cells[1] for cells in table_rows(body()) if " to " in cells[0]}
    assert len(bins) == 10
    assert {name: count for name, count in bins.items() if count != "0"} == {
        "0.0 to 0.1": "1", "0.5 to 0.6": "2", "0.9 to 1.0": "1",
    }  # fmt: skip


def test_a_price_is_told_where_there_is_one():
    assert "Price: 12.34" in "".join(body().itertext())
    assert "Price" not in "".join(body(figures(price=0.0)).itertext())


def test_a_trace_tells_the_prompt_the_rounds_and_the_pairs_with_their_outcome():
    [found] = [div for div in body().iter("div") if div.get("class") == "trace"]
    headings = ["".join(h.itertext()) for h in found.iter("h4")]
    assert headings == [
        "prompt", "first reply", "round 1, kind: critique", "revision, accepted, p=0.87", "round 2, true: critique",
        "revision, left out: unchanged", "round 3, brief: no flaw", "pair, p=0.66", "pair, left out: verdict_timeout",
    ]  # fmt: skip
    texts = ["".join(pre.itertext()) for pre in found.iter("pre")]
    # XML keeps the newline that HTML takes away at the start of <pre>.
    assert texts == [f"\n{text}" for text in
                     ["How?", "\nfirst", "bad", "after", "worse", "after", "", "one", "two", "one", "six"]]  # fmt: skip


def test_a_prompt_that_was_left_out_says_why():
    left = trace(answers=[], rounds=[], pairs=[], left_out="initial_timeout")
    [found] = [div for div in body(traces=[left]).iter("div") if div.get("class") == "trace"]
    assert ["".join(part.itertext()).strip() for part in found] == ["prompt", "How?", "left out: initial_timeout"]


def test_texts_are_escaped_wherever_they_stand():
    made = json.loads(json.dumps(trace()).replace("kind", "KIND"))
    made["conversation"] = [{"role": "user", "content": EVIL}]
    made["answers"][0]["text"] = made["left_out"] = EVIL
    for one in made["rounds"]:
        one.update(principle=EVIL, critique=EVIL, revision=EVIL, left_out=EVIL)
    for one in made["pairs"]:
        one.update(first=EVIL, second=EVIL, left_out=EVIL)
    changes = {"left_out": {EVIL: 1}, "principles": {EVIL: figures()["principles"]["kind"]}}
    changes["steps"] = {EVIL: figures()["steps"]["judge"]}
    text = page(figures(**changes), [made], title=EVIL, words=EVIL)
    assert "<script>" not in text and "<b>" not in text
    found = "".join(parsed(text).itertext())
    # title, h1, words, 1 reason, 1 principle, 1 step; prompt, first reply, last line; 3 rounds of 4, pairs of 2 and 1
    assert found.count(EVIL) == 6 + 3 + 3 * 4 + 2 * 2 + 1


def test_nothing_made_is_a_page_too():
    nothing = figures(
        prompts=0, left_out={}, principles={}, replies_left_out={}, steps={},
        rounds={"critiques": 0, "flaws": 0, "without_verdict": 0, "accepted": 0, "left_out": {}},
        pairs=figures()["pairs"] | {"judged": 0, "failed": {}, "p": []},
    )  # fmt: skip
    found = body(nothing, traces=[])
    headings = ["".join(h.itertext()) for h in found.iter("h2")]
    assert headings == ["What was kept", "What it took"]
    assert ["of them found a flaw", "none"] in table_rows(found)
