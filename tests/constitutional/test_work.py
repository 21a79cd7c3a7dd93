"""Questions put to a model: each once, in any order, kept at once, and the same share of answers on every rank."""

import math

import pytest

from align.constitutional.work import Spent, Work, role_of
from align.generation.speakers import Ask, Choose, Chosen, Failed, Said
from tests.constitutional.making import ALONE, LOST, speaker


def ask(text, **changes):
    settings = {"key": text, "seed": 1, "temperature": 1.0, "max_new_tokens": 9} | changes
    return Ask(messages=({"role": "user", "content": text},), **settings)


def choose(text, **changes):
    settings = {"key": text, "seed": 1, "candidates": ("A", "B")} | changes
    return Choose(messages=({"role": "user", "content": text},), **settings)


def work(folder):
    return Work(folder, ALONE, "test")


def echo():
    return speaker(lambda one, question: f"to {question.conversation}")


def test_answers_come_in_the_order_of_the_questions(tmp_path):
    model, asks = echo(), [ask(f"q{n}") for n in range(12)]
    answers = work(tmp_path).say("initial", model, asks)
    assert [answer.text for answer in answers] == [f"to q{n}" for n in range(12)]
    assert [one.key for one in model.asked] != [one.key for one in asks], "the fake answers in another order"


def test_what_is_known_is_not_asked_again_and_comes_back_as_it_was(tmp_path):
    asks = [ask(f"q{n}") for n in range(6)]
    first = work(tmp_path).say("initial", echo(), asks[:4])
    again = echo()
    answers = work(tmp_path).say("initial", again, asks)
    assert answers[:4] == first and all(isinstance(answer, Said) for answer in answers)
    assert {one.key for one in again.asked} == {"q4", "q5"}


def test_choices_come_back_as_they_were(tmp_path):
    weighed = speaker(weigh=lambda one, question: (-0.1, -math.inf))
    [first] = work(tmp_path).choose("judge", weighed, [choose("q")])
    [again] = work(tmp_path).choose("judge", weighed, [choose("q")])
    assert first == again == Chosen((-0.1, -math.inf), 1)
    assert len(weighed.weighed) == 1


@pytest.mark.parametrize("changes", [{"seed": 2}, {"temperature": 0.9}, {"max_new_tokens": 8}, {"stop": ("x",)}])
def test_a_question_that_differs_in_anything_that_decides_its_answer_is_another(tmp_path, changes):
    model = echo()
    work(tmp_path).say("initial", model, [ask("q")])
    work(tmp_path).say("initial", model, [ask("q", **changes)])
    assert len(model.asked) == 2


@pytest.mark.parametrize("changes", [{"seed": 2}, {"candidates": ("A", "C")}])
def test_so_is_a_choice(tmp_path, changes):
    model = speaker()
    work(tmp_path).choose("judge", model, [choose("q")])
    work(tmp_path).choose("judge", model, [choose("q", **changes)])
    assert len(model.weighed) == 2


def test_the_callers_name_for_a_question_decides_nothing(tmp_path):
    model = echo()
    answers = work(tmp_path).say("initial", model, [ask("q"), ask("q", key="other"), ask("p")])
    assert [answer.text for answer in answers] == ["to q", "to q", "to p"]
    assert len(model.asked) == 2


def test_another_model_is_asked_anew(tmp_path):
    one, other = echo(), speaker(lambda *_: "no", name="other")
    assert work(tmp_path).say("initial", one, [ask("q")])[0].text == "to q"
    assert work(tmp_path).say("initial", other, [ask("q")])[0].text == "no"


def test_a_failure_is_told_and_asked_again_by_the_next_run(tmp_path):
    broken = speaker(lambda one, question: LOST if question.conversation == "q1" else "fine")
    answers = work(tmp_path).say("initial", broken, [ask("q0"), ask("q1")])
    assert [getattr(answer, "text", answer) for answer in answers] == ["fine", LOST]
    mended = speaker(lambda *_: "mended")
    answers = work(tmp_path).say("initial", mended, [ask("q0"), ask("q1")])
    assert [answer.text for answer in answers] == ["fine", "mended"] and len(mended.asked) == 1


def test_known_answers_count_as_new_ones_do(tmp_path):
    model = speaker(lambda one, question: LOST if question.conversation == "q1" else "two words")
    asks = [ask("q0"), ask("q1"), ask("a longer q2")]
    for _ in range(2):
        desk = work(tmp_path)
        desk.say("initial", model, asks)
        desk.choose("judge", model, [choose("a b c")])
        spent = desk.spent["initial"]
        assert (spent.calls, spent.prompt_tokens, spent.new_tokens) == (3, 1 + 3, 4)
        assert spent.failed == {"timeout": 1}
        judged = desk.spent["judge"]
        assert (judged.calls, judged.prompt_tokens, judged.new_tokens, judged.failed) == (1, 3, 0, {})


def test_nothing_is_asked_of_nobody(tmp_path):
    desk, model = work(tmp_path), echo()
    assert desk.say("initial", model, []) == []
    assert desk.spent["initial"].calls == 0 and isinstance(desk.spent["initial"], Spent)


def test_a_model_that_leaves_a_question_out_is_caught(tmp_path):
    class Sleepy:
        name = "sleepy"

        def say(self, asks, done):
            done(0, Said("a", True, 1, 1))

    with pytest.raises(AssertionError, match="initial: the speaker left 1 question"):
        work(tmp_path).say("initial", Sleepy(), [ask("q0"), ask("q1")])


def test_an_answer_is_on_disk_before_the_next_one_is_made(tmp_path):
    kept, file = [], tmp_path / "initial-0.jsonl"

    def answer(one, question):
        kept.append(file.read_bytes().count(b"\n"))
        if len(kept) == 3:
            raise KeyboardInterrupt
        return "kept"

    asks = [ask(f"q{n}") for n in range(4)]
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path).say("initial", speaker(answer), asks)
    again = echo()
    work(tmp_path).say("initial", again, asks)
    assert kept == [0, 1, 2] and len(again.asked) == 2


@pytest.mark.parametrize(
    ("step", "role"),
    [
        ("initial", "generator"),
        ("samples", "generator"),
        ("contrast", "generator"),
        ("revision_2", "generator"),
        ("critique_1", "critic"),
        ("judge", "judge"),
        ("judge_thought", "judge"),
        ("judge_revision_1", "judge"),
        ("judge_best_thought", "judge"),
    ],
)
def test_a_step_says_who_is_asked(step, role):
    assert role_of(step) == role


def test_a_failure_has_no_tokens():
    assert not hasattr(Failed("timeout", ""), "new_tokens")


def test_choices_that_a_model_weighs_together_are_asked_together_or_not_at_all(tmp_path):
    def some(count):
        model = speaker()
        model.weighed_together, calls = 3, []
        ask_it, model.choose = (
            model.choose,
            lambda group, done: (calls.append([c.key for c in group]), ask_it(group, done)),
        )
        work(tmp_path).choose("judge", model, [choose(f"q{n}") for n in range(count)])
        return calls

    assert some(4) == [["q0", "q1", "q2"], ["q3"]]
    # The second group is another one now, and is asked whole, as it would have been without the first run.
    assert some(8) == [["q3", "q4", "q5"], ["q6", "q7"]]
    assert some(8) == []
