"""What the stage leaves: rows that train as they are, each of which can be traced back, and numbers that recount."""

import json
from collections import Counter

import pytest

from align.config.schema import DataConfig, PairSource, RevisionTarget, Ties
from align.constitutional.judging import Pair
from align.constitutional.outputs import append_lines, mixed_in, preferences, unpaired, write_lines
from align.constitutional.verdicts import Order, Verdict
from align.data.formats import as_records, find_format
from align.data.prepare import prepare_comparisons, prepare_demonstrations, prepare_preferences
from align.data.quality import check_record
from align.data.records import Demonstration, Message, Unpaired
from align.data.template import Template
from align.generation.speakers import Ask
from tests.constitutional.making import LOST, constitution, principle, revised, row, seen
from tests.constitutional.whole import helpful_rows, lines, prompt_rows, run_whole, some_answer, some_choice, some_model
from tests.data.chat_tokenizers import chatml

ROOM = 100_000
CASES = {
    "revisions": {"pairs": PairSource.revision_vs_initial, "targets": RevisionTarget.all, "rounds": 3},
    "best": {"pairs": PairSource.none, "targets": RevisionTarget.best, "rounds": 3, "judge_revisions": False},
    "all": {"pairs": PairSource.all, "samples": 3, "filters": ["all"]},
    "best_worst": {"pairs": PairSource.best_worst, "samples": 3},
    "contrast": {"pairs": PairSource.contrast},
    "thoughts": {"pairs": PairSource.random, "samples": 2},
}


def lossy(model_answer=some_answer):
    """Some of all questions fail."""

    def say(ask, question):
        return LOST if ask.seed % 9 == 0 else model_answer(ask, question)

    def weigh(choose, question):
        return LOST if choose.seed % 31 == 0 else some_choice(choose, question)

    return some_model(say, weigh)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Case -> (stage folder, report, lines of each file), made as asked for."""
    done = {}

    def run(case):
        if case not in done:
            names = [principle(name, positive=f"Be {name}.", negative=f"Be not {name}.") for name in ("kind", "true")]
            settings = {"prompts": prompt_rows(24), "helpful": helpful_rows(9), "helpful_ratio": 0.25} | CASES[case]
            made = constitution(*names, "brief", cot=case == "thoughts")
            stage_dir, _ = run_whole(tmp_path_factory.mktemp(case), lossy(), made=made, **settings)
            names = ("demonstrations", "preferences", "unpaired", "trace", "bad_rows")
            found = {name: lines(stage_dir / f"{name}.jsonl") for name in names}
            done[case] = (stage_dir, json.loads((stage_dir / "report.json").read_text()), found)
        return done[case]

    return run


@pytest.fixture(scope="module")
def template():
    return Template(chatml())


every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_demonstrations_train_as_they_are(runs, template, case):
    stage_dir, report, files = runs(case)
    data = DataConfig(demonstrations=str(stage_dir / "demonstrations.jsonl"), held_out_fraction=0.0)
    prepared = prepare_demonstrations(data, template, ROOM, None)
    assert len(prepared.report.bad_rows) == 0
    made = report["demonstrations"]
    assert len(prepared.train) == made["made"] + made["helpful_mixed_in"] == len(files["demonstrations"])
    assert made["helpful_mixed_in"] == round(0.25 * made["made"]) > 0


@every_case
def test_preferences_train_as_they_are_with_the_judges_p(runs, template, case):
    stage_dir, report, files = runs(case)
    if case == "best":
        assert files["preferences"] == [] and report["pairs"]["judged"] == 0
        return
    data = DataConfig(preferences=str(stage_dir / "preferences.jsonl"), held_out_fraction=0.0)
    for prepare in (prepare_preferences, prepare_comparisons):
        prepared = prepare(data, template, ROOM, None)
        assert len(prepared.report.bad_rows) == 0
        assert [item["p"] for item in prepared.train] == [line["p"] for line in files["preferences"]]
    assert len(files["preferences"]) == report["pairs"]["judged"] > 3
    assert all(0.5 <= line["p"] <= 1 for line in files["preferences"])


@every_case
def test_unpaired_rows_are_read_back_without_a_bad_one(runs, case):
    _, _, files = runs(case)
    found = files["unpaired"]
    row_format = find_format(found[:100], None, "unpaired.jsonl")
    for line in found:
        [record] = as_records(row_format, None, line, ties=Ties.keep)
        check_record(record)
        assert isinstance(record, Unpaired)
    assert Counter(line["label"] for line in found).keys() == {True, False}
    verdicts = Counter((json.dumps(line["prompt"]), json.dumps(line["completion"])) for line in found)
    assert set(verdicts.values()) == {1}, "one answer, two verdicts"


@every_case
def test_every_demonstration_can_be_traced_back_to_the_question_that_made_it(runs, case):
    _, report, files = runs(case)
    traced = {json.dumps(line["conversation"]): line for line in files["trace"]}
    assert len(traced) == report["prompts"] == 24
    for line in files["demonstrations"][: report["demonstrations"]["made"]]:
        *conversation, reply = line["messages"]
        trace = traced[json.dumps(conversation)]
        assert reply["content"] in trace["targets"] and trace["left_out"] is None
        [answer, *_] = [one for one in trace["answers"] if one.get("text") == reply["content"]]
        assert answer["step"] == "initial" or answer["step"].startswith("revision_")
        again = Ask("", tuple(json.loads(answer["prompt"])), answer["seed"], 1.0, ROOM)
        assert some_answer(again, seen(again)).strip() == reply["content"]
        assert (
            answer["model"] == "fake" and answer["finished"] and answer["new_tokens"] == len(reply["content"].split())
        )


@every_case
def test_every_verdict_can_be_traced_back_to_its_log_probabilities(runs, case):
    _, _, files = runs(case)
    p = {
        (json.dumps(trace["conversation"]), frozenset((pair["first"], pair["second"]))): pair
        for trace in files["trace"]
        for pair in trace["pairs"]
        if pair["verdict"]
    }
    assert len(p) == len(files["preferences"])
    for line in files["preferences"]:
        texts = (line["chosen"][0]["content"], line["rejected"][0]["content"])
        pair = p[json.dumps(line["prompt"]), frozenset(texts)]
        verdict = pair["verdict"]
        assert line["p"] == (verdict["p"] if pair["first"] == texts[0] else 1 - verdict["p"])
        weighed = [answer for answer in pair["answers"] if "logps" in answer]
        assert len(weighed) == 2 * len(verdict["principles"])
        assert all(answer["candidates"] == ["A", "B"] and answer["votes"] == 0 for answer in weighed)


@every_case
def test_the_trace_has_every_answer_that_was_paid_for(runs, case):
    _, report, files = runs(case)
    answers = [
        answer
        for trace in files["trace"]
        for answer in [*trace["answers"], *(one for pair in trace["pairs"] for one in pair["answers"])]
    ]
    for step, spent in report["steps"].items():
        of_step = [answer for answer in answers if answer["step"] == step]
        assert len(of_step) == spent["calls"] - sum(spent["failed"].values()), step
        assert sum(answer["prompt_tokens"] for answer in of_step) == spent["prompt_tokens"]
        assert sum(answer.get("new_tokens", 0) for answer in of_step) == spent["new_tokens"]
    assert {answer["step"] for answer in answers} == report["steps"].keys()
    assert all(answer["prompt"].startswith("[{") and answer["seed"] >= 0 for answer in answers)


@every_case
def test_the_numbers_of_the_report_recount_from_the_files(runs, case):
    _, report, files = runs(case)
    left_out = {
        what: dict(Counter(line["reason"] for line in files["bad_rows"] if line["what"] == what))
        for what in ("prompt", "revision", "reply", "pair")
    }
    assert left_out["prompt"] == report["left_out"]
    assert left_out["revision"] == report["rounds"]["left_out"]
    assert left_out["reply"] == report["replies_left_out"]
    assert left_out["pair"] == report["pairs"]["failed"]
    rounds = [one for trace in files["trace"] for one in trace["rounds"]]
    heard = [one for one in rounds if not (one["left_out"] or "").startswith("critique_")]
    assert report["rounds"]["critiques"] == len(heard)
    assert report["rounds"]["flaws"] == sum(one["flaw"] for one in heard)
    assert report["rounds"]["without_verdict"] == sum(not one["marked"] for one in heard) > 0
    accepted = [one for one in rounds if one["revision"] is not None and one["left_out"] is None]
    assert report["rounds"]["accepted"] == len(accepted) > 0
    targets = [text for trace in files["trace"] for text in trace["targets"]]
    assert report["demonstrations"]["made"] == len(targets)
    assert report["words"]["targets"] == pytest.approx(sum(len(text.split()) for text in targets) / len(targets))
    of_pairs = [pair["verdict"]["p"] for trace in files["trace"] for pair in trace["pairs"] if pair["verdict"]]
    assert report["pairs"]["p"] == [round(p, 4) for p in of_pairs]
    certain = sum(line["p"] for line in files["preferences"]) / max(len(files["preferences"]), 1)
    assert report["pairs"]["p_chosen"] == pytest.approx(certain)
    judged = Counter(
        one["id"] for t in files["trace"] for p in t["pairs"] if p["verdict"] for one in p["verdict"]["principles"]
    )
    assert judged == Counter({name: one["judged"] for name, one in report["principles"].items() if one["judged"]})


def test_the_cases_above_have_losses_of_every_kind(runs):
    """Else they would show little."""
    reasons = Counter(line["reason"] for case in CASES for line in runs(case)[2]["bad_rows"])
    wanted = (
        "initial_timeout critique_timeout revision_timeout verdict_timeout thought_timeout judged_worse "
        "no_revision_accepted reply_timeout"
    )
    assert set(wanted.split()) <= reasons.keys(), reasons


def judged(p, first="one", second="two"):
    return Pair(row("p"), first, second, "all", (), Verdict((Order("kind", p, 1 - p),)))


def test_the_likelier_reply_is_chosen_and_p_is_always_written():
    found = list(preferences([judged(0.75), judged(0.25), judged(0.5), judged(1.0), judged(0.0)]))
    assert [line["p"] for line in found] == [0.75, 0.75, 0.5, 1.0, 1.0]
    assert [line["chosen"][0]["content"] for line in found] == ["one", "two", "one", "one", "two"]
    assert [line["rejected"][0]["content"] for line in found] == ["two", "one", "two", "two", "one"]


def test_a_pair_without_a_verdict_is_no_preference():
    failed = Pair(row("p"), "one", "two", "all", (), fault="verdict_timeout")
    assert list(preferences([failed])) == []


def test_a_revised_first_reply_is_undesirable_and_a_kept_one_desirable():
    works = [revised("p0", "bad", "good"), revised("p1", "fine"), revised("p2", "a", "b", "a"), revised("p3", "lost")]
    found = list(unpaired(works, {"p0": ["good"], "p1": ["fine"], "p2": ["a"]}))
    texts = [(line["prompt"][0]["content"], line["completion"][0]["content"], line["label"]) for line in found]
    assert texts == [("p0", "good", True), ("p0", "bad", False), ("p1", "fine", True), ("p2", "a", True)]


def demonstrations(count):
    return [Demonstration((Message("user", f"q{n}"), Message("assistant", f"a{n}"))) for n in range(count)]


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 1.0, 1.9])
@pytest.mark.parametrize("made", [0, 1, 7, 40])
def test_helpful_rows_are_mixed_in_to_the_nearest_row(ratio, made):
    found = mixed_in(demonstrations(100), made, ratio, 7)
    assert abs(len(found) - ratio * made) <= 0.5
    assert len({line["messages"][0]["content"] for line in found}) == len(found)


def test_helpful_rows_are_drawn_by_the_seed_from_all_of_them():
    one, same, other = (mixed_in(demonstrations(50), 10, 1.0, seed) for seed in (7, 7, 8))
    assert one == same != other
    drawn = [int(line["messages"][0]["content"][1:]) for line in one]
    assert drawn != sorted(drawn) and max(drawn) > 25
    assert len(mixed_in(demonstrations(3), 10, 1.0, 7)) == 3


def test_a_file_is_written_complete_or_not_at_all(tmp_path):
    file = tmp_path / "lines.jsonl"
    assert write_lines(file, [{"text": "größer \ud83d\u2028"}, {"n": 2}]) == 2
    before = file.read_bytes()
    assert [json.loads(line.decode("utf-8", "surrogatepass")) for line in before.split(b"\n")[:-1]] == [
        {"text": "größer \ud83d\u2028"}, {"n": 2},
    ]  # fmt: skip

    def torn():
        yield {"n": 3}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(file, torn())
    assert file.read_bytes() == before
    append_lines(file, [{"n": 4}])
    assert file.read_bytes() == before + b'{"n": 4}\n'
