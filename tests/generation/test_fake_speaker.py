"""The fake speaker: what tests of the stages above may rely on."""

import math

import pytest

from align.generation.fake_speaker import FakeSpeaker
from align.generation.speakers import Ask, Choose, Chosen, Failed, Said, cut_at_stop


def ask(key, content, **changes):
    settings = {"seed": 0, "temperature": 1.0, "max_new_tokens": 5} | changes
    return Ask(key, ({"role": "user", "content": content},), **settings)


def choose(key):
    return Choose(key, ({"role": "user", "content": "which of them"},), ("first", "second"), 0)


def results_of(call, places):
    results = []
    call(lambda place, result: results.append((place, result)))
    assert sorted(place for place, _ in results) == list(range(places))
    return dict(results), [place for place, _ in results]


def echo(question):
    return question.messages[-1]["content"]


def test_it_answers_each_question_once_and_counts_it():
    speaker, asks = FakeSpeaker(echo, lambda c: (0.0, 0.0)), [ask(str(i), f"question {i}") for i in range(20)]
    results, order = results_of(lambda done: speaker.say(asks, done), 20)
    assert results == {i: Said(f"question {i}", True, 2, 2) for i in range(20)}
    assert order != sorted(order)
    assert [one.key for one in speaker.asked] == [str(place) for place in order]
    assert results_of(lambda done: speaker.say(asks, done), 20) == (results, order)
    assert len(speaker.asked) == 40 and speaker.weighed == []


def test_limits_and_stop_texts_cut_an_answer():
    asks = [
        ask("a", "one two three four five six"),
        ask("b", "one two three four five"),
        ask("c", " one two STOP three END", stop=("END", "STOP")),
        ask("d", "STOP", stop=("STOP",)),
    ]
    results, _ = results_of(lambda done: FakeSpeaker(echo, lambda c: ()).say(asks, done), 4)
    assert results[0] == Said("one two three four five", False, 6, 5)
    assert results[1] == Said("one two three four five", True, 5, 5)
    assert results[2] == Said("one two", True, 5, 2)
    assert results[3] == Said("", True, 1, 0)


def test_it_weighs_as_told_and_fails_as_told():
    broken = Failed("malformed", "as told")
    speaker = FakeSpeaker(
        lambda a: broken if a.key == "1" else "yes", lambda c: broken if c.key == "1" else (math.log(0.25), -1)
    )
    said, _ = results_of(lambda done: speaker.say([ask(str(i), "x") for i in range(3)], done), 3)
    assert [said[i] for i in range(3)] == [Said("yes", True, 1, 1), broken, Said("yes", True, 1, 1)]
    chosen, _ = results_of(lambda done: speaker.choose([choose(str(i)) for i in range(3)], done), 3)
    assert chosen == {0: Chosen((math.log(0.25), -1.0), 3), 1: broken, 2: Chosen((math.log(0.25), -1.0), 3)}
    assert {one.key for one in speaker.weighed} == {"0", "1", "2"}


def test_too_few_log_probabilities_are_a_mistake_of_the_test():
    with pytest.raises(AssertionError, match="1 log-prob"):
        FakeSpeaker(echo, lambda c: (0.5,)).choose([choose("a")], lambda *_: None)


def test_the_prompt_is_its_messages():
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "größer?"}]
    speaker = FakeSpeaker(echo, lambda c: ())
    assert speaker.prompt_tokens(messages) == 3
    assert speaker.prompt_text(messages) == (
        '[{"role": "system", "content": "be brief"}, {"role": "user", "content": "größer?"}]'
    )


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("a b c", ("c", "b"), ("a ", True)),
        ("a b c", ("d", ""), ("a b c", False)),
        ("a b c", (), ("a b c", False)),
        ("abc", ("a",), ("", True)),
    ],
)
def test_a_text_is_cut_before_the_first_stop_text_in_it(text, stop, expected):
    assert cut_at_stop(text, stop) == expected
