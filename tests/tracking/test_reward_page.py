"""The page of a judged reward model: one sound file, accuracy first, and a reliability plot true to its numbers."""

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from align.losses.calibration import summary
from align.tracking.reward_page import LEFT, RIGHT, WIDTH, reliability_plot, reward_page

# What HTML leaves open on purpose.
VOID = re.compile(r"<meta [^>]*>")


def judged(pairs=400, **changes):
    draw = np.random.default_rng(3)
    chosen, rejected = draw.normal(1, 1.5, pairs), draw.normal(0, 1.5, pairs)
    columns = {
        "p": np.where(np.arange(pairs) < 5, 0.5, 1.0),
        "margin": np.zeros(pairs),
        "chosen_tokens": draw.integers(5, 1500, pairs),
        "rejected_tokens": draw.integers(5, 1500, pairs),
    }
    return summary(chosen, rejected, **(columns | changes))


def parsed(text):
    """The page as XML, which fails on a tag that is closed in the wrong place or never."""
    body = VOID.sub("", text.removeprefix("<!doctype html>\n"))
    return ElementTree.fromstring(body)


def test_the_page_is_whole_escaped_and_needs_no_network():
    text = reward_page(judged(), "reward <script> & co")
    assert "".join(parsed(text).find("body/h1").itertext()) == "reward <script> & co"
    assert "http" not in text and "url(" not in text and "<script" not in text and "src=" not in text


def test_accuracy_and_its_interval_come_first():
    found = judged()
    figures = found["figures"]
    body = parsed(reward_page(found, "reward")).find("body")
    assert body[1].text == (
        f"Accuracy {figures['accuracy']:.1%} "
        f"(95% interval {figures['accuracy_low']:.1%} to {figures['accuracy_high']:.1%})"
    )
    assert "395 held-out pairs; 5 ties beside them" in body[2].text and "not finite" not in body[2].text


def test_every_table_has_a_row_for_every_group():
    found = judged()
    shown = [len(t.findall("tbody/tr")) for t in parsed(reward_page(found, "reward")).iter("table")]
    names = ("by_score_margin", "by_longer_side", "by_length_difference")
    assert shown == [len(found["tables"][name]) for name in names]


def test_label_margins_are_shown_where_there_are_several():
    assert "margin of the label" not in reward_page(judged(), "reward")
    assert "margin of the label" in reward_page(judged(margin=np.arange(400) % 3), "reward")


def test_lengths_and_scores_that_cannot_be_told_are_said():
    same = np.full(400, 7)
    text = reward_page(judged(chosen_tokens=same, rejected_tokens=same), "reward")
    assert "they have no correlation" in text and "equally long" in text
    parsed(text)


def row(start, accuracy, count=10):
    more = {"end": start + 0.25, "confidence": start + 0.1, "low": accuracy - 0.05, "high": accuracy + 0.05}
    return {"start": start, "accuracy": accuracy, "count": count, **more}


def test_bars_rise_in_proportion_and_carry_their_counts():
    plot = ElementTree.fromstring(reliability_plot([row(0.5, 0.3), row(0.75, 0.6, count=1234)]))
    bars = [re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)H", path.get("d")).groups() for path in plot.iter("path")]
    low, high = (float(ground) - float(top) for ground, top in bars)
    assert high == pytest.approx(2 * low, abs=0.3) and low > 50
    assert "1,234" in [text.text for text in plot.iter("text")]


def test_a_calibrated_point_lies_on_the_diagonal():
    plot = ElementTree.fromstring(reliability_plot([row(0.5, 0.6), row(0.75, 0.85)]))
    x1, y1, x2, y2 = (
        float(line.get(key))
        for line in plot.iter("line")
        if line.get("class") == "diagonal"
        for key in ("x1", "y1", "x2", "y2")
    )
    points = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in plot.iter("circle")]
    assert len(points) == 2 and (x1, x2) == (LEFT, WIDTH - RIGHT)
    for x, y in points:
        assert (y - y1) / (x - x1) == pytest.approx((y2 - y1) / (x2 - x1), abs=0.005)
