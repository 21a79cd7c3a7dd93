"""The page of a PPO run: one sound file, before and after first, every figure that was logged, answers side by side."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from align.tracking.ppo_page import ppo_page

# What HTML leaves open on purpose.
VOID = re.compile(r"<(meta|br)( [^>]*)?>")
NAMES = (
    "reward/score reward/total kl/nats_per_completion kl/nats_per_token completion/tokens completion/unfinished "
    "policy/entropy policy/clipped policy/approx_kl policy/ratio_max policy/ratio_first value/explained_variance "
    "value/loss rollout/mismatch_kl"
).split()
TITLES = [
    "Score and reward", "Score against KL", "KL per completion", "KL per token", "Length", "Unfinished completions",
    "Entropy", "Clipped tokens", "KL of an update", "Largest ratio", "Explained variance", "Value loss",
    "Ratio before the first step", "Sampler against trainer",
]  # fmt: skip


def lines(updates=20, **changes):
    """Figures that grow by one an update, from 1; the score from -1."""
    made = [{"step": n, **{name: float(n) for name in NAMES}, "reward/score": n - 2.0} for n in range(1, updates + 1)]
    return [line | {name: change(line["step"]) for name, change in changes.items()} for line in made]


def without(name):
    return [{key: value for key, value in line.items() if key != name} for line in lines()]


def sample(step, prompt, completion, score):
    return {"step": step, "prompt": prompt, "completion": completion, "score": score}


SAMPLES = [
    sample(0, "Why <b>?", "no\nidea", -1.0),
    sample(0, "How?", "so", -2.0),
    sample(10, "Why <b>?", "middle", 0.0),
    sample(10, "How?", "middle", 0.0),
    sample(20, "Why <b>?", "because & why", 1.5),
    sample(20, "How?", "thus", None),
]
ALARM = {"step": 7, "guard": "kl", "text": "update 7: kl/nats_per_token is 7 <& above 1"}


def parsed(text):
    """The body as XML, which fails on a tag that is closed in the wrong place or never."""
    text = text.removeprefix("<!doctype html>\n").replace("&ensp;", " ").replace("&nbsp;", " ")
    return ElementTree.fromstring(VOID.sub("", text)).find("body")


def body(updates=None, samples=SAMPLES, alarms=()):
    return parsed(ppo_page(lines() if updates is None else updates, samples, "PPO", list(alarms)))


def words(element):
    return "".join(element.itertext())


def titles(tree):
    return [figure.find("h3").text for figure in tree.iter("figure")]


def by_class(tree, name):
    return [element for element in tree.iter() if element.get("class") == name]


def test_the_page_is_whole_escaped_and_needs_no_network():
    text = ppo_page(lines(), SAMPLES, "PPO <script> & co", [ALARM])
    assert words(parsed(text).find("h1")) == "PPO <script> & co"
    assert "http" not in text and "url(" not in text and "<script" not in text and "src=" not in text


def test_before_and_after_come_first():
    tree = body()
    assert [child.tag for child in tree][:4] == ["h1", "p", "div", "p"]
    # Means of updates 1 to 5 and 16 to 20; the score is the update less 2.
    assert words(tree[1]) == (
        "Score from 1 to 16 in 20 updates, 18 nats a completion from the reference, completions 500% longer"
    )
    rows = {words(row[0]): [words(cell) for cell in row[1:]] for row in tree.find("div/table/tbody")}
    assert rows["score"] == ["1.0", "16.0"] and rows["reward in all"] == ["3.0", "18.0"]
    assert rows["completions without a stop token, %"] == ["300.0", "1,800.0"] and len(rows) == 7
    assert words(tree[3]) == (
        "Means of the first 5 and the last 5 updates. "
        "On the held-out prompts below the mean score went from −1.5 to 1.5."
    )
    assert "No guard raised an alarm." in words(tree[4]) and tree[4].get("class") == "good"


def test_a_short_run_is_not_averaged_with_itself():
    assert words(body(lines(3))[1]).startswith("Score from −1 to 1 in 3 updates")
    assert words(body(lines(1))[1]) == "Score −1 in the only update"
    assert words(body([], [])[1]) == "No update was logged."


def test_figures_that_are_no_numbers_are_left_out_of_the_means():
    scores = lines(**{"reward/score": lambda n: math.nan if n in (1, 20) else float(n)})
    assert words(body(scores)[1]).startswith("Score from 3.5 to 17.5")
    assert "without a score that is a number" in words(body(lines(**{"reward/score": lambda n: math.nan}))[1])


def test_alarms_are_listed_and_marked_on_the_figures_they_name():
    tree = body(alarms=[ALARM])
    assert words(by_class(tree, "warn")[0]) == "1 alarm" and by_class(tree, "good") == []
    assert [words(item) for item in tree.iter("li")] == [f"kl {ALARM['text']}"]
    marked = [f.find("h3").text for f in tree.iter("figure") if any(x.get("class") == "limit" for x in f.iter("line"))]
    assert marked == ["KL per token"]


def test_every_figure_that_was_logged_has_a_curve_and_a_sentence():
    tree = body()
    assert titles(tree) == [*TITLES, "Score of held-out prompts"]
    for figure in tree.iter("figure"):
        assert figure.find("svg") is not None and "Healthy:" in words(figure.find("figcaption"))


@pytest.mark.parametrize("name", NAMES[2:])
def test_a_figure_that_was_not_logged_has_none(name):
    missing = set(TITLES) - set(titles(body(without(name))))
    assert len(missing) == (2 if name == "kl/nats_per_completion" else 1)


def test_the_weight_of_kl_is_shown_where_it_moves():
    assert "Weight of the KL penalty" not in titles(body(lines(**{"kl/coefficient": lambda n: 0.05})))
    assert "Weight of the KL penalty" in titles(body(lines(**{"kl/coefficient": lambda n: 0.05 * n})))


def test_a_curve_ends_where_its_figure_does():
    falls = lines(**{"kl/nats_per_token": lambda n: 2.0 - n / 10})
    (figure,) = [f for f in body(falls).iter("figure") if f.find("h3").text == "KL per token"]
    path = figure.find("svg").find("path").get("d")
    heights = [float(point.split()[1]) for point in path.removeprefix("M").split("L")]
    assert len(heights) == 20 and heights == sorted(heights)
    (zero,) = [line for line in figure.iter("line") if line.get("class") == "zero"]
    assert heights[-1] == float(zero.get("y1"))


def test_the_frontier_runs_over_kl_and_rises_with_the_score():
    (figure,) = [f for f in body().iter("figure") if f.find("h3").text == "Score against KL"]
    run = figure.find("svg").find("path").get("d").removeprefix("M").split("L")
    (x0, y0), (x1, y1) = (tuple(map(float, point.split())) for point in (run[0], run[-1]))
    assert x1 > x0 and y1 < y0
    # KL goes from 1 to 20, the score from -1 to 18.
    labels = [text.text for text in figure.iter("text")]
    assert "20" in labels and labels.index("20") > labels.index("−5") and "KL, nats a completion" in labels


def test_smoothing_is_said():
    assert "Faint" not in words(body())
    assert "Faint: one update a point. Strong: the mean of 5 around it." in words(body(lines(100)))
    assert "Faint: the mean of 4 updates a point. Strong: the mean of 52 around it." in words(body(lines(1000)))


def test_lines_without_a_score_are_no_updates():
    assert words(body([{"step": 0, "eval_loss": 1.0}, *lines()])[1]).endswith("completions 500% longer")


def test_answers_to_a_prompt_stand_side_by_side_first_and_last():
    pairs = by_class(body(), "sample")
    shown = [[words(element) for element in pair.iter() if element.tag in ("h4", "pre")] for pair in pairs]
    before, after = "before the first update", "after update 20"
    assert [[text.removeprefix("\n") for text in pair] for pair in shown] == [
        ["prompt", "Why <b>?", f"{before}: score −1", "no\nidea", f"{after}: score 1.5", "because & why"],
        ["prompt", "How?", f"{before}: score −2", "so", f"{after}: not scored", "thus"],
    ]


def test_a_completion_keeps_the_newline_it_begins_with():
    assert '<pre dir="auto">\n\nso</pre>' in ppo_page(lines(), [sample(0, "Why?", "\nso", 1.0)], "PPO", [])


def test_a_prompt_asked_twice_keeps_both_answers():
    twice = [sample(step, "Why?", f"{step} {n}", 0.0) for step in (0, 5) for n in "ab"]
    pairs = by_class(body(samples=twice), "sample")
    assert [[words(pre).strip() for pre in pair.iter("pre")] for pair in pairs] == [
        ["Why?", "0 a", "5 a"],
        ["Why?", "0 b", "5 b"],
    ]


def test_messages_are_shown_with_their_roles():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    (pair,) = by_class(body(samples=[sample(0, messages, "so", 1.0)]), "sample")
    assert words(next(pair.iter("pre"))).strip() == "system: Be brief.\n\nuser: Why?"


def test_one_step_of_samples_is_shown_once_and_none_not_at_all():
    (pair,) = by_class(body(samples=[sample(5, "Why?", "so", 1.0)]), "sample")
    assert len(list(pair.iter("pre"))) == 2 and "went from" not in words(body(samples=[sample(5, "Why?", "so", 1.0)]))
    assert "The same prompts" not in words(body(samples=[]))
