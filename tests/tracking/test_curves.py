"""Line plots: true to their points, honest about gaps, with ticks a person would choose."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.tracking import curves
from align.tracking.curves import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, line_plot, nice_ticks, path_plot, tick_label


def plot(series, **changes):
    return ElementTree.fromstring(line_plot(series, **({"x_label": "update", "y_label": "nats"} | changes)))


def path_points(path):
    """The runs of a path, each a list of pixels."""
    runs = [run for run in path.get("d").split("M") if run]
    return [[tuple(map(float, point.split())) for point in run.split("L")] for run in runs]


def strong(tree):
    return [path for path in tree.iter("path") if "faint" not in path.get("class")]


def texts(tree, anchor):
    return [text.text for text in tree.iter("text") if text.get("text-anchor") == anchor]


def upright(tree):
    """Value -> pixel of the labelled levels."""
    lines = [line for line in tree.iter("line") if line.get("x1") == str(LEFT) and line.get("class") in (None, "zero")]
    labels = [float(text.replace("\N{MINUS SIGN}", "-").replace(",", "")) for text in texts(tree, "end")]
    return dict(zip(labels, (float(line.get("y1")) for line in lines), strict=True))


def test_points_stand_where_both_axes_say():
    tree = plot({"KL": [(1, 0.5), (2, -1.5), (5, 3.0)]})
    (points,) = path_points(strong(tree)[0])
    levels = upright(tree)
    assert [x for x, _ in points] == pytest.approx([LEFT, LEFT + (WIDTH - RIGHT - LEFT) / 4, WIDTH - RIGHT], abs=0.1)
    (low, at_low), (high, at_high) = min(levels.items()), max(levels.items())
    assert (at_low, at_high) == (HEIGHT - BOTTOM, TOP)
    for (_, y), value in zip(points, (0.5, -1.5, 3.0), strict=True):
        assert y == pytest.approx(at_low + (value - low) / (high - low) * (at_high - at_low), abs=0.11)
    assert texts(tree, "middle") == ["1", "2", "3", "4", "5", "update"]
    assert [text.text for text in tree.iter("text") if text.get("text-anchor") is None] == ["nats"]


def test_series_share_their_axes_and_differ_in_class():
    tree = plot({"a": [(1, 0.0), (3, 1.0)], "b": [(2, 2.0), (4, 0.0)]})
    first, second = strong(tree)
    assert (first.get("class"), second.get("class")) == ("curve series-0", "curve series-1")
    (a,), (b,) = path_points(first), path_points(second)
    assert a[0][1] == b[1][1] == HEIGHT - BOTTOM and b[0][1] == TOP
    assert a[0][0] == LEFT and b[1][0] == WIDTH - RIGHT and a[1][0] > b[0][0]
    dashed = [n for n in range(4) if re.search(rf"series-{n}:not\(.faint\) {{ stroke-dasharray", curves.STYLE)]
    assert dashed == [1, 2, 3]


def test_a_gap_is_a_gap_and_a_lone_point_a_dot():
    tree = plot({"KL": [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.5), (5, math.inf), (6, 1.0), (7, 2.0)]})
    assert [len(run) for run in path_points(strong(tree)[0])] == [2, 2]
    (dot,) = tree.iter("circle")
    assert float(dot.get("cx")) == pytest.approx(LEFT + (WIDTH - RIGHT - LEFT) / 2, abs=0.1)


def test_nothing_finite_is_no_plot():
    assert line_plot({"KL": [(1, math.nan)]}, x_label="", y_label="") == ""
    assert path_plot([], x_label="", y_label="", ends=("first", "last")) == ""


@pytest.mark.parametrize("value", [0.0, 7.0, -0.002, 1e9])
def test_a_constant_has_an_axis_around_it(value):
    tree = plot({"KL": [(1, value), (2, value)]})
    ((one, two),) = path_points(strong(tree)[0])
    assert one[1] == two[1] and TOP <= one[1] <= HEIGHT - BOTTOM and len(texts(tree, "end")) >= 2


def test_a_value_can_be_kept_on_the_axis():
    assert 0 not in upright(plot({"KL": [(1, 10.0), (2, 11.0)]}))
    assert 0 in upright(plot({"KL": [(1, 10.0), (2, 11.0)]}, include=[0.0]))


def test_marks_stand_at_their_place_and_only_on_the_axis():
    tree = plot({"KL": [(1, 1.0), (5, 2.0)]}, marks=[2, 9])
    (mark,) = [line for line in tree.iter("line") if line.get("class") == "limit"]
    assert float(mark.get("x1")) == pytest.approx(LEFT + (WIDTH - RIGHT - LEFT) / 4, abs=0.1) and mark.get(
        "x2"
    ) == mark.get("x1")


def test_text_is_escaped():
    assert "a<b & c" in plot({'"a<b': [(1, 1.0), (2, 2.0)]}, y_label="a<b & c").itertext()
    assert "a&lt;b" in curves.key(["a<b"])


def noisy(count):
    draw = np.random.default_rng(1)
    return [(step, float(value)) for step, value in enumerate(draw.normal(5, 1, count), 1)]


def test_a_short_series_is_drawn_as_it_is():
    points = noisy(curves.SMOOTHED_FROM - 1)
    assert curves.drawn(points) == (points, []) and curves.drawn_as(len(points)) == (1, 1)


@pytest.mark.parametrize("count", [40, 300, 301, 1000, 12345])
def test_a_long_series_is_few_points_and_their_running_mean(count):
    points = noisy(count)
    chunk, window = curves.drawn_as(count)
    faint, line = curves.drawn(points)
    assert len(faint) == len(line) == math.ceil(count / chunk) <= curves.MOST_POINTS
    place = len(faint) // 2
    values = np.array([y for _, y in points])
    assert faint[place][1] == pytest.approx(values[place * chunk : (place + 1) * chunk].mean())
    start = place * chunk - (window - chunk) // 2
    assert line[place] == pytest.approx(
        (np.mean([x for x, _ in points][start : start + window]), values[start : start + window].mean())
    )
    tree = plot({"KL": points})
    assert [path.get("class") for path in tree.iter("path")] == ["curve faint series-0", "curve series-0"]


def test_the_running_mean_keeps_gaps_and_leaves_them_out_of_means():
    points = noisy(100)
    points[50] = (51, math.nan)
    _, line = curves.drawn(points)
    assert math.isnan(line[50][1]) and all(math.isfinite(y) for place, (_, y) in enumerate(line) if place != 50)
    assert line[49][1] == pytest.approx(np.mean([points[i][1] for i in (47, 48, 49, 51)]))


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e8), st.integers(2, 8))
def test_ticks_are_round_enclose_the_range_and_are_about_as_many_as_wanted(low, width, most):
    ticks, step = nice_ticks(low, low + width, most=most)
    assert float(f"{step:.0e}") == pytest.approx(step) and f"{step:.0e}"[0] in "125"
    assert ticks[0] <= low + 1e-6 * step and ticks[-1] >= low + width - 1e-6 * step and 2 <= len(ticks) <= most + 2
    assert np.diff(ticks) == pytest.approx(step)


@given(st.floats(-1e7, 1e7), st.floats(1e-3, 1e2), st.integers(2, 8))
def test_no_two_ticks_have_one_label(low, share, most):
    ticks, step = nice_ticks(low, low + share * max(abs(low), 1e-6), most=most)
    assert len({tick_label(tick, step) for tick in ticks}) == len(ticks)


def test_whole_places_have_whole_ticks():
    assert nice_ticks(1, 3, most=6, whole=True) == ([1, 2, 3], 1)
    assert texts(plot({"KL": [(1, 1.0), (3, 2.0)]}), "middle")[:-1] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "value, step, shown",
    [(0, 0.5, "0"), (0.5, 0.5, "0.5"), (1, 0.5, "1.0"), (-0.25, 0.05, "−0.25"), (1500, 500, "1,500"), (2e6, 1e6, "2e6"),
     (5e-10, 5e-10, "5e−10"), (0.002, 0.001, "0.002"), (20, 20, "20"), (2e-4, 2e-4, "0.0002"),
     (5.0002, 1e-4, "5.0002"), (1_234_500, 100, "1.2345e6")],
)  # fmt: skip
def test_ticks_are_labelled_as_a_person_would(value, step, shown):
    assert tick_label(value, step) == shown


def test_a_path_keeps_the_order_of_its_points_and_names_its_ends():
    tree = ElementTree.fromstring(
        path_plot([(0, 0.0), (10, 1.0), (5, 2.0), (7, math.nan)], x_label="KL", y_label="score", ends=("first", "last"))
    )
    (run,) = path_points(strong(tree)[0])
    assert [x for x, _ in run] == pytest.approx([LEFT, WIDTH - RIGHT, (LEFT + WIDTH - RIGHT) / 2], abs=0.1)
    names = {text.text: text for text in tree.iter("text") if text.get("class") == "end"}
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in tree.iter("circle") if c.get("r") == "4"]
    assert list(names) == ["first", "last"] and dots == [run[0], run[-1]]
    assert len(list(tree.iter("circle"))) == 3 + 2
