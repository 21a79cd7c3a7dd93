"""The server speaker against a real server on this machine: whatever it does, no question is lost."""

import math
import threading
import time
import traceback
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from align.config.errors import UserError
from align.generation import server_speaker
from align.generation.chat_server import ChatServer
from align.generation.server_choices import first_token_logps, log_shares, vote_of
from align.generation.server_speaker import ServerSpeaker
from align.generation.speakers import PASSING_REASONS, Ask, Choose, Chosen, Failed, Said
from tests.generation.chat_test_server import DRIP, DROP, DROP_HALFWAY, STALL, Reply, chat_server, said

KEY = "sk-secret-0123456789"
BETTER = ("the first one is better", "the second one is better")


@pytest.fixture(autouse=True)
def directly(monkeypatch):
    """No proxy of this machine stands between."""
    monkeypatch.setenv("no_proxy", "*")


def ask(text, **changes):
    settings = {"seed": 7, "temperature": 0.7, "max_new_tokens": 32} | changes
    return Ask(text, ({"role": "system", "content": "Be kind."}, {"role": "user", "content": text}), **settings)


def choose(text="which?", candidates=BETTER, seed=7):
    return Choose(text, ({"role": "user", "content": text},), candidates, seed)


def speaker_of(server, **changes):
    settings = {"concurrency": 8, "timeout_seconds": 5.0, "retries": 3, "backoff_seconds": 0.001} | changes
    return ServerSpeaker(server.url, "tiny", **settings)


def collected(call, questions):
    results, thread = {}, threading.get_ident()

    def done(place, result):
        assert place not in results and threading.get_ident() == thread
        results[place] = result

    call(questions, done)
    assert sorted(results) == list(range(len(questions)))
    return [results[place] for place in range(len(questions))]


def content(request):
    return request["messages"][-1]["content"]


def pauses_of(speaker, monkeypatch):
    """The seconds that it would pause."""
    pauses = []
    monkeypatch.setattr(speaker._server, "_pause", pauses.append)
    return pauses


def test_a_question_is_put_as_the_interface_wants_it():
    with chat_server(lambda request, before: said("  Good day. ")) as server:
        results = collected(speaker_of(server).say, [ask("Hello", stop=("END",), seed=2**31 + 5)])
    assert results == [Said("Good day.", True, 11, 2)]
    assert server.requests == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}],
            "temperature": 0.7,
            "max_tokens": 32,
            "seed": 5,
            "stop": ["END"],
        }
    ]
    assert server.paths == ["/v1/chat/completions"] and "Authorization" not in server.headers[0]


def test_an_answer_says_whether_it_ended_by_itself():
    replies = {
        "limit": said("so far", "length"),
        "stop text left in": said("said END and more", "length"),
        "unknown end": said("so far", None),
        "other word": said("done", "eos_token"),
        "filter": Reply({"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}),
        "refusal": Reply({"choices": [{"message": {"content": None, "refusal": "No."}, "finish_reason": "stop"}]}),
    }
    with chat_server(lambda request, before: replies[content(request)]) as server:
        results = collected(speaker_of(server).say, [ask(text, stop=("END",)) for text in replies])
    assert [(one.text, one.finished) if isinstance(one, Said) else one.reason for one in results] == [
        ("so far", False),
        ("said", True),
        ("so far", False),
        ("done", True),
        "filtered_by_server",
        ("No.", True),
    ]


MOODS = {
    "429": Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "0"}),
    "500": Reply(b"<html>oops</html>", 500),
    "503": Reply({"error": "starting"}, 503),
    "drop": DROP,
    "half": DROP_HALFWAY,
    "no json": Reply(b"what?"),
    "no choices": Reply({"object": "chat.completion"}),
    "empty choices": Reply({"choices": []}),
    "no text": Reply({"choices": [{"message": {"content": None}}]}),
    "a list": Reply([1, 2]),
    "text as number": Reply({"choices": [{"message": {"content": 5}, "finish_reason": "stop"}]}),
    "counts as words": Reply({"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": "many"}}),
}


def test_no_question_is_lost_to_a_server_in_a_bad_mood():
    moods = [mood for mood in MOODS for _ in range(4)]
    asks = [ask(f"{mood}: question {i}", seed=i) for i, mood in enumerate(moods)]

    def behave(request, before):
        mood = MOODS[content(request).partition(":")[0]]
        return mood if before < 2 else said(f"answer to {content(request)}")

    with chat_server(behave) as server:
        results = collected(speaker_of(server).say, asks)
    assert [one.text for one in results] == [f"answer to {one.messages[-1]['content']}" for one in asks]
    assert set(server.tries.values()) == {3}
    # All tries of a question ask the same.
    assert len({(content(r), r["seed"]) for r in server.requests}) == len(asks)


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        ("429", "rate_limited"),
        ("500", "server_error"),
        ("drop", "unreachable"),
        ("half", "malformed"),
        ("no json", "malformed"),
        ("no choices", "malformed"),
        ("counts as words", "malformed"),
    ],
)
def test_a_mood_that_lasts_is_a_failure_with_a_name_and_the_others_are_answered(mood, reason):
    with chat_server(lambda r, before: MOODS[mood] if content(r) == "bad" else said("fine")) as server:
        one, other = collected(speaker_of(server, retries=2).say, [ask("bad"), ask("good")])
    assert isinstance(one, Failed) and one.reason == reason and reason in PASSING_REASONS
    assert server.url in one.detail and "\n" not in one.detail
    assert other.text == "fine" and server.tries == {"bad": 3, "good": 1}


@pytest.mark.parametrize("slow", [STALL, DRIP])
def test_an_answer_that_takes_too_long_is_asked_for_again(slow):
    with chat_server(lambda request, before: slow if before == 0 else said("at last")) as server:
        results = collected(speaker_of(server, timeout_seconds=0.3).say, [ask("a"), ask("b")])
        assert [one.text for one in results] == ["at last"] * 2
        server.tries.clear()
        [failed] = collected(speaker_of(server, timeout_seconds=0.3, retries=0).say, [ask("a")])
    assert failed.reason == "timeout" and "0.3 s" in failed.detail


def test_nobody_there_is_a_failure_with_a_name():
    with chat_server(lambda request, before: said("x")) as server:
        pass
    [failed] = collected(speaker_of(server, retries=1).say, [ask("a")])
    assert failed.reason == "unreachable" and "ConnectionRefused" in failed.detail


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_question_that_is_refused_fails_at_once_with_the_servers_words(status):
    reply = Reply({"error": {"message": "too many\ntokens"}}, status)
    with chat_server(lambda r, before: reply if content(r) == "bad" else said("fine")) as server:
        one, other = collected(speaker_of(server).say, [ask("bad"), ask("good")])
    assert one == Failed("refused_by_server", f"HTTP {status} from {server.url}/chat/completions: too many tokens")
    assert one.reason not in PASSING_REASONS and other.text == "fine" and server.tries["bad"] == 1


@pytest.mark.parametrize(("status", "match"), [(401, "key"), (402, "paid"), (404, "path or model"), (307, "redirects")])
def test_what_would_meet_every_question_stops_the_run(status, match):
    reply = Reply({"error": {"message": "no"}}, status, {"Location": "http://127.0.0.1:1/other"})
    with chat_server(lambda request, before: reply) as server:
        speaker = speaker_of(server, concurrency=2)
        with pytest.raises(UserError, match=match):
            collected(speaker.say, [ask(str(i)) for i in range(100)])
    assert len(server.requests) < 50 and set(server.tries.values()) == {1}


def test_no_more_questions_are_under_way_than_allowed():
    gate = threading.Barrier(3, timeout=5)

    def behave(request, before):
        gate.wait()
        return said("x")

    with chat_server(behave) as server:
        results = collected(speaker_of(server, concurrency=3).say, [ask(str(i)) for i in range(12)])
    # The barrier opens only for three at once, and never were there four.
    assert len(results) == 12 and server.most_at_once == 3


def test_an_answer_is_handed_on_before_the_last_one_is_there():
    known = threading.Event()

    def behave(request, before):
        if content(request) == "slow":
            assert known.wait(5)
        return said("x")

    order = []

    def done(place, result):
        order.append(place)
        known.set()

    with chat_server(behave) as server:
        speaker_of(server).say([ask("slow"), ask("quick")], done)
    assert order == [1, 0]


def test_pauses_double_at_most_and_are_drawn_from_the_seed(monkeypatch):
    with chat_server(lambda request, before: MOODS["500"]) as server:
        drawn = []
        for seed in (1, 1, 2):
            speaker = speaker_of(server, retries=9, backoff_seconds=1.0)
            drawn.append(pauses_of(speaker, monkeypatch))
            collected(speaker.say, [ask("a", seed=seed)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 9
    for attempt, (one, other) in enumerate(zip(drawn[0], drawn[2], strict=True)):
        assert 0 <= one <= min(60, 2**attempt) and 0 <= other <= min(60, 2**attempt)
    assert max(*drawn[0], *drawn[2]) > 16


def in_seconds(seconds):
    return format_datetime(datetime.now(timezone.utc) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        (lambda: "17", 17, 17),
        (lambda: "0.25", 0.25, 0.25),
        (lambda: in_seconds(30), 25, 30),
        (lambda: in_seconds(-30), 0, 0.001),
        (lambda: "100000", 600, 600),
        (lambda: "soon", 0, 0.001),
        (lambda: "nan", 0, 0.001),
        (lambda: "-3", 0, 0.001),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_server_may_say_how_long_to_wait(header, least, most, status, monkeypatch):
    def behave(request, before):
        return said("x") if before else Reply({}, status, {"Retry-After": header()})

    with chat_server(behave) as server:
        speaker = speaker_of(server)
        pauses = pauses_of(speaker, monkeypatch)
        assert collected(speaker.say, [ask("a")])[0].text == "x"
    assert len(pauses) == 1 and least <= pauses[0] <= most


def test_a_real_pause_is_as_long_as_asked_for():
    with chat_server(lambda r, before: said("x") if before else Reply({}, 429, {"Retry-After": "0.3"})) as server:
        started = time.monotonic()
        collected(speaker_of(server).say, [ask("a")])
    assert 0.3 <= time.monotonic() - started < 3


def test_an_error_above_ends_the_waiting_and_comes_through():
    def behave(request, before):
        return said("x") if content(request) == "quick" else Reply({}, 429, {"Retry-After": "500"})

    with chat_server(behave) as server:
        speaker = speaker_of(server)
        with pytest.raises(KeyError, match="disk"):
            speaker.say([ask("waits"), ask("quick")], lambda place, result: {}["disk"])
        assert collected(speaker.say, [ask("quick")])[0].text == "x"


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, capfd, caplog):
    monkeypatch.setenv("TINY_KEY", f" {KEY}\n")
    echo = Reply({"error": {"message": f"bad: {'x' * 370} {KEY} {KEY}"}}, 400)
    parrot = Reply(f"not json, but {KEY}".encode())
    replies = {"400": echo, "parrot": parrot, "429": Reply({"error": KEY}, 429), "text": Reply(KEY.encode(), 500)}
    caplog.set_level(0)
    with chat_server(lambda request, before: replies[content(request)]) as server:
        speaker = speaker_of(server, key_env="TINY_KEY", retries=1)
        results = collected(speaker.say, [ask(text) for text in replies])
        assert all(isinstance(one, Failed) for one in results)
        assert not any(KEY[:12] in one.detail for one in results)
        assert all("<key>" in one.detail for one in results if "bad:" not in one.detail)
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
    with chat_server(lambda r, before: Reply({"error": {"message": f"Incorrect key: {KEY}"}}, 401)) as server:
        with pytest.raises(UserError, match="TINY_KEY") as caught:
            collected(speaker_of(server, key_env="TINY_KEY").say, [ask("a")])
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    shown += repr(speaker) + repr(speaker._server) + repr(vars(speaker))
    assert "Incorrect key: <key>" in shown and KEY not in shown


def test_a_redirect_is_not_followed_with_the_key(monkeypatch):
    monkeypatch.setenv("TINY_KEY", KEY)
    with chat_server(lambda request, before: said("x")) as other:
        reply = Reply({}, 302, {"Location": other.url})
        with chat_server(lambda request, before: reply) as server, pytest.raises(UserError, match="redirects"):
            collected(speaker_of(server, key_env="TINY_KEY").say, [ask("a")])
        assert other.requests == [] and other.headers == []


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "line\nbreak", "schlüssel"])
def test_a_key_that_is_none_is_refused_and_not_shown(value, monkeypatch):
    monkeypatch.delenv("TINY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TINY_KEY", value)
    with pytest.raises(UserError, match="TINY_KEY") as caught:
        ServerSpeaker("http://127.0.0.1:1", "tiny", key_env="TINY_KEY")
    assert not value or not value.strip() or value not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("https://h/api/v1/", "https://h/api/v1/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
        ("https://h/deployments/x?api-version=2", "https://h/deployments/x/chat/completions?api-version=2"),
    ],
)
def test_the_url_may_be_as_long_as_one_likes(url, expected):
    assert ChatServer(url, key_env=None, timeout_seconds=1, retries=0, backoff_seconds=0).url == expected


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "ftp://h", "http://", "", "https://me:pw@h/v1"]
)
def test_what_is_no_url_of_a_server_is_refused(url):
    with pytest.raises(UserError, match="server") as caught:
        ServerSpeaker(url, "tiny")
    assert "pw@" not in str(caught.value)


def test_what_was_spent_is_what_the_server_says_and_an_estimate_where_it_does_not():
    def behave(request, before):
        reply = said("one two three")
        return reply if content(request) == "counted" else Reply({"choices": reply.body["choices"]})

    with chat_server(behave) as server:
        speaker = speaker_of(server, prompt_price=2.0, completion_price=10.0)
        counted, estimated = collected(speaker.say, [ask("counted"), ask("estimated")])
    assert (counted.prompt_tokens, counted.new_tokens) == (11, 3)
    # "Be kind." and "estimated" by their bytes, with 4 a turn; 13 bytes of answer.
    assert (estimated.prompt_tokens, estimated.new_tokens) == (2 + 4 + 3 + 4, 4)
    assert (speaker.spent_prompt_tokens, speaker.spent_new_tokens) == (24, 7)
    assert speaker.price(1_000_000, 500_000) == 7.0
    assert speaker_of(server, prompt_price=2.0).price(1, 1) is None
    assert speaker_of(server, count_tokens=len).prompt_tokens(ask("abc").messages) == 8 + 3 + 8
    assert speaker.prompt_text([{"role": "user", "content": "ü"}]) == '[{"role": "user", "content": "ü"}]'


def step(token, logp, *others):
    listed = [(token, logp), *others]
    return {"token": token, "logprob": logp, "top_logprobs": [{"token": t, "logprob": p} for t, p in listed]}


def with_logprobs(*steps):
    return said("the first", "length", logprobs={"content": list(steps)})


def test_a_choice_is_read_from_the_log_probabilities_of_the_first_tokens():
    reply = with_logprobs(
        step("The", -0.1, ("I", -3.0)), step(" first", math.log(0.5), (" second", math.log(0.2)), (" two", -4.0))
    )
    with chat_server(lambda request, before: reply) as server:
        [result] = collected(speaker_of(server).choose, [choose()])
    assert result.votes == 0 and result.prompt_tokens == 11
    assert result.logps == pytest.approx((-0.1 + math.log(0.5), -0.1 + math.log(0.2)))
    [request] = server.requests
    assert (request["logprobs"], request["top_logprobs"], request["temperature"]) == (True, 20, 0.0)
    assert request["max_tokens"] >= len("the ") + 1 and "stop" not in request


@pytest.mark.parametrize(
    ("candidates", "steps", "expected"),
    [
        (("A", "B"), [step("A", -0.5, ("B", -1.0))], (-0.5, -1.0)),
        (("A", "B"), [step(" A", -0.5, ("B", -1.0))], (-0.5, -1.0)),
        # Another word that begins alike is no vote for a candidate.
        (("A", "B"), [step("As", -0.5, ("B", -1.0), ("A", -2.0))], (-2.0, -1.0)),
        (("A", "B"), [step("As", -0.5, ("B", -1.0))], None),
        (("A", "B"), [step("A.", -0.5, ("B)", -1.0))], (-0.5, -1.0)),
        # All tokens that begin a candidate count for it.
        (("yes", "no"), [step("no", math.log(0.3), ("No", math.log(0.1)), ("y", math.log(0.5)))],
         (math.log(0.5), math.log(0.4))),
        (("yes", "no"), [step("no", -0.5, (" Yes", math.log(0.2)), ("ye", math.log(0.3)))], (math.log(0.5), -0.5)),
        # Neither is answered, both are listed.
        (("yes", "no"), [step("Hm", -0.1, ("yes", -3.0), ("no", -4.0))], (-3.0, -4.0)),
        (("yes", "no"), [step("yes", -0.1, ("Yes", -3.0))], None),
        (("yes", "no"), [step("\n\n", -0.25), step("yes", -0.5, ("no", -1.0))], (-0.75, -1.25)),
        (BETTER, [step("the", -0.5)], None),
        (BETTER, [step("I", -0.5, ("the", -1.0))], None),
        (BETTER, [step("the", -0.5), step(" ", -0.5), step("se", -1.0, ("fi", -2.0))], (-3.0, -2.0)),
        # "the" is open between two of three.
        ((*BETTER, "neither"), [step("the", -0.5, ("neither", -1.0))], None),
        (("one", "two", "three"), [step("one", -1.0, ("two", -2.0), ("three", -3.0))], (-1.0, -2.0, -3.0)),
        (("one", "two", "three"), [step("one", -1.0, ("t", -2.0), ("three", -3.0), ("two", -4.0))], None),
        (("yes", "no"), [], None),
    ],
)  # fmt: skip
def test_candidates_are_told_apart_at_the_first_token_where_they_part(candidates, steps, expected):
    logps = first_token_logps({"content": steps}, candidates)
    assert logps == (expected if expected is None else pytest.approx(expected))


def voting(request, before):
    """One in four votes is for the second, by the seed; no log-probabilities."""
    if "logprobs" in request:
        return said("hm", "length")
    return said("The second one is better." if request["seed"] % 4 == 0 else "**the first one is better**, for")


def test_without_log_probabilities_answers_are_sampled_and_counted():
    with chat_server(voting) as server:
        speaker = speaker_of(server, votes=40, concurrency=1)
        results = collected(speaker.choose, [choose("a"), choose("b"), choose("c", seed=8)])
    asked = [request for request in server.requests if "logprobs" not in request]
    assert len(asked) == 120 and len(server.requests) == 121, "log-probabilities are asked for once, and not again"
    assert {request["temperature"] for request in asked} == {1.0}
    seeds = {text: [r["seed"] for r in asked if content(r) == text] for text in "abc"}
    assert seeds["a"] == seeds["b"] != seeds["c"] and len(set(seeds["a"])) == 40
    second = sum(seed % 4 == 0 for seed in seeds["a"])
    assert 0 < second < 20
    assert results[0] == results[1] == Chosen((math.log(1 - second / 40), math.log(second / 40)), 11, votes=40)


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_refuses_log_probabilities_is_asked_for_votes(status):
    def behave(request, before):
        return Reply({"error": {"message": "logprobs: no"}}, status) if "logprobs" in request else voting(request, 0)

    with chat_server(behave) as server:
        results = collected(speaker_of(server, votes=4, concurrency=1).choose, [choose("a"), choose("b")])
    assert [one.votes for one in results] == [4, 4] and len(server.requests) == 9


def test_a_choice_that_its_log_probabilities_do_not_show_is_voted_on_and_the_next_is_not():
    shown = with_logprobs(step("the", -0.5), step(" first", -0.5, (" second", -1.0)))
    hidden = with_logprobs(step("Well", -0.5))

    def behave(request, before):
        if "logprobs" not in request:
            return voting(request, before)
        return hidden if content(request) == "a" else shown

    with chat_server(behave) as server:
        results = collected(speaker_of(server, votes=4, concurrency=1).choose, [choose("a"), choose("b")])
        [without] = collected(speaker_of(server, votes=0).choose, [choose("a")])
    assert [one.votes for one in results] == [4, 0]
    assert without.reason == "no_log_probs"


@pytest.mark.parametrize(
    "logprobs",
    [
        {"content": [{"logprob": -1.0}]},
        {"content": [step("yes", "high")]},
        {"content": [step("yes", 0.5, ("no", -1.0))]},
        {"content": [step("yes", math.nan, ("no", -1.0))]},
        {"content": 5},
        [1],
    ],
)
def test_log_probabilities_that_are_none_are_asked_for_again(logprobs):
    good = with_logprobs(step("yes", -0.5, ("no", -1.0)))
    bad = said("yes", logprobs=logprobs)
    with chat_server(lambda request, before: good if before else bad) as server:
        [result] = collected(speaker_of(server).choose, [choose(candidates=("yes", "no"))])
    assert result == Chosen((-0.5, -1.0), 11)


def test_choices_survive_a_bad_mood_and_a_lasting_one_has_a_name():
    good = with_logprobs(step("the", -0.5), step(" first", -0.5, (" second", -1.0)))
    moods = [mood for mood in MOODS if mood not in ("text as number", "no text")]

    def behave(request, before):
        mood, _, lasts = content(request).partition(":")
        return MOODS[mood] if before < 2 or lasts else good

    with chat_server(behave) as server:
        results = collected(speaker_of(server).choose, [choose(mood) for mood in moods])
        assert results == [Chosen((-1.0, -1.5), 11)] * len(moods)
        lasting = collected(speaker_of(server).choose, [choose(f"{mood}: lasts") for mood in moods])
    assert {one.reason for one in lasting} <= PASSING_REASONS


def test_a_vote_that_cannot_be_had_fails_the_choice_instead_of_counting_fewer():
    def behave(request, before):
        return said("hm") if "logprobs" in request else (MOODS["500"] if before > 3 else said(BETTER[0]))

    with chat_server(behave) as server:
        [failed] = collected(speaker_of(server, votes=8).choose, [choose()])
    assert failed.reason == "server_error"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the first one is better", 0),
        (' "The Second one is better", because', 1),
        ("**the first one is better**", 0),
        ("the first one", None),
        ("I say the first one is better", None),
        ("the first one is betterish", None),
        ("", None),
    ],
)
def test_a_vote_is_the_candidate_that_the_answer_begins_with(text, expected):
    assert vote_of(text, BETTER) == expected


def test_a_vote_for_a_letter_in_brackets_counts():
    assert vote_of("(B) is better", ("(A)", "(B)")) == 1 and vote_of("A", ("(A)", "(B)")) is None


def test_shares_of_votes_have_a_floor_of_half_a_vote():
    assert log_shares([0, 0, 0, 1], 2) == (math.log(0.75), math.log(0.25))
    assert log_shares([0] * 8, 2) == (0.0, math.log(0.5 / 8))
    assert log_shares([0, 1, None, None], 2) == (math.log(0.5), math.log(0.5))
    assert log_shares([0, None, None], 2).reason == "no_verdict"
    assert log_shares([None] * 4, 2).reason == "no_verdict"


def test_the_limit_is_called_what_the_server_calls_it():
    with chat_server(lambda request, before: said("x")) as server:
        collected(speaker_of(server, limit_field="max_completion_tokens").say, [ask("a")])
    assert server.requests[0]["max_completion_tokens"] == 32 and "max_tokens" not in server.requests[0]


def test_nothing_asked_is_nothing_done():
    with chat_server(lambda request, before: said("x")) as server:
        assert collected(speaker_of(server).say, []) == [] and server.requests == []
    assert server_speaker.TOP_LOGPROBS == 20
