"""Rounds of critique and revision, turn by turn."""

import pytest

from align.config.schema import Draw, RevisionTarget
from align.constitutional.outputs import NO_TARGET, choose_targets, demonstrations
from align.constitutional.rows import going
from tests.constitutional.making import (
    LOST,
    Desk,
    by_kind,
    constitution,
    principle,
    row,
    rows,
    seen,
    speaker,
    stage,
)


def numbered(question):
    """bad0 -> bad1 -> bad2 ..."""
    return f"bad{int(question.reply[3:]) + 1}"


def flawed(**changes):
    """A model that finds a flaw each time; its replies are bad0, bad1, bad2."""
    return by_kind(**({"reply": "bad0", "critique": "Flaw: it is bad", "revision": numbered} | changes))


def desk(folder, say=None, weigh=None, names=("kind", "true", "brief"), **changes):
    return Desk(folder, stage(**({"draw": Draw.in_order} | changes)), constitution(*names), speaker(say, weigh))


def kinds(model):
    """How often each kind of question was asked to be answered."""
    asked = [seen(ask).kind for ask in model.asked]
    return {kind: asked.count(kind) for kind in dict.fromkeys(asked)}


def targets(one, works):
    return choose_targets(works, one.stage, one.constitution, one.judge)


def test_each_round_criticises_and_revises_the_reply_before_it(tmp_path):
    one = desk(tmp_path, flawed(), rounds=3)
    [work] = one.revise([row("p")])
    assert [(r.principle.id, r.reply, r.revision) for r in work.rounds] == [
        ("kind", "bad0", "bad1"), ("true", "bad1", "bad2"), ("brief", "bad2", "bad3"),
    ]  # fmt: skip
    revisions = [seen(ask) for ask in one.generator.asked if seen(ask).kind == "revision"]
    assert [(q.request, q.reply, q.critique) for q in revisions] == [
        ("kind", "bad0", "it is bad"), ("true", "bad1", "it is bad"), ("brief", "bad2", "it is bad"),
    ]  # fmt: skip
    critiques = [seen(ask) for ask in one.generator.asked if seen(ask).kind == "critique"]
    assert [(q.request, q.reply) for q in critiques] == [("kind", "bad0"), ("true", "bad1"), ("brief", "bad2")]
    assert work.current == "bad3" and not work.ended
    assert [asked.step for asked in work.asked] == [
        "initial", "critique_1", "revision_1", "critique_2", "revision_2", "critique_3", "revision_3",
    ]  # fmt: skip


def test_no_flaw_ends_the_rounds_of_that_prompt_alone(tmp_path):
    def critique(question):
        return "No flaw" if (question.conversation, question.request) == ("User: p0", "true") else "Flaw: bad"

    one = desk(tmp_path, flawed(critique=critique), rounds=3)
    ended, other = one.revise(rows(2))
    assert [r.critique.flaw for r in ended.rounds] == [True, False] and ended.ended
    assert ended.rounds[1].revision is None and ended.current == "bad1"
    assert len(other.rounds) == 3
    assert kinds(one.generator) == {"reply": 2, "critique": 5, "revision": 4}


def test_a_critique_without_a_mark_is_a_flaw_and_its_whole_text_is_the_critique(tmp_path):
    one = desk(tmp_path, flawed(critique="hm, could be better"), rounds=1)
    [work] = one.revise([row("p")])
    assert work.rounds[0].critique.flaw and not work.rounds[0].critique.marked
    assert seen(one.generator.asked[-1]).critique == "hm, could be better" and work.current == "bad1"


def test_a_filtered_revision_leaves_the_reply_before_it(tmp_path):
    def revision(question):
        return question.reply if question.request == "true" else numbered(question)

    one = desk(tmp_path, flawed(revision=revision), rounds=3, filters=["unchanged", "empty"])
    [work] = one.revise([row("p")])
    assert [r.fault for r in work.rounds] == [None, "unchanged", None]
    assert [(r.reply, r.revision) for r in work.rounds] == [("bad0", "bad1"), ("bad1", "bad1"), ("bad1", "bad2")]
    assert work.current == "bad2"


def test_a_revision_that_is_cut_by_the_limit_is_left_out(tmp_path):
    one = desk(tmp_path, flawed(revision="one two three four"), rounds=1, filters=["cut_by_limit"], max_new_tokens=3)
    [work] = one.revise([row("p")])
    assert work.rounds[0].fault == "cut_by_limit" and work.current == "bad0"


def test_filters_that_are_not_named_are_not_asked(tmp_path):
    one = desk(tmp_path, flawed(revision="bad0"), rounds=1, filters=["empty"])
    [work] = one.revise([row("p")])
    assert work.rounds[0].accepted


@pytest.mark.parametrize(("share", "fault"), [(0.9, None), (0.51, None), (0.5, "judged_worse"), (0.2, "judged_worse")])
def test_a_revision_that_is_judged_no_better_leaves_the_reply_before_it(tmp_path, share, fault):
    def weigh(choose, question):
        return (share, 1 - share) if question.first == "bad1" else (1 - share, share)

    one = desk(tmp_path, flawed(), weigh, rounds=1, judge_revisions=True)
    [work] = one.revise([row("p")])
    assert work.rounds[0].fault == fault and work.current == ("bad0" if fault else "bad1")
    assert {(seen(c).request, seen(c).first) for c in one.generator.weighed} == {("kind", "bad0"), ("kind", "bad1")}
    assert (work.rounds[0].verdict.p > 0.5) == (share > 0.5)
    assert [asked.step for asked in work.asked][-2:] == ["judge_revision_1"] * 2


def test_a_later_revision_is_judged_against_the_one_before_it(tmp_path):
    one = desk(
        tmp_path, flawed(), lambda _, q: (0, -1) if q.first > q.second else (-1, 0), rounds=2, judge_revisions=True
    )
    [work] = one.revise([row("p")])
    assert [r.accepted for r in work.rounds] == [True, True]
    last = {(q.first, q.second) for q in map(seen, one.generator.weighed) if q.request == "true"}
    assert last == {("bad2", "bad1"), ("bad1", "bad2")}


def test_a_failed_verdict_leaves_the_reply_before_it(tmp_path):
    one = desk(tmp_path, flawed(), lambda *_: LOST, rounds=1, judge_revisions=True)
    [work] = one.revise([row("p")])
    assert work.rounds[0].fault == "verdict_timeout" and work.rounds[0].verdict is None and work.current == "bad0"


def test_a_filtered_revision_is_not_put_before_the_judge(tmp_path):
    one = desk(tmp_path, flawed(revision="bad0"), rounds=1, filters=["unchanged"], judge_revisions=True)
    one.revise([row("p")])
    assert one.generator.weighed == []


def test_a_failed_critique_loses_its_round_alone(tmp_path):
    critique = {"kind": LOST, "true": "Flaw: bad", "brief": "No flaw"}
    one = desk(tmp_path, flawed(critique=lambda question: critique[question.request]), rounds=3)
    [work] = one.revise([row("p")])
    assert [r.fault for r in work.rounds] == ["critique_timeout", None, None]
    assert [r.criticised for r in work.rounds] == [False, True, True]
    assert [r.revision for r in work.rounds] == [None, "bad1", None] and work.current == "bad1"


def test_a_failed_revision_loses_its_round_alone(tmp_path):
    one = desk(tmp_path, flawed(revision=lambda q: LOST if q.request == "kind" else numbered(q)), rounds=2)
    [work] = one.revise([row("p")])
    assert [r.fault for r in work.rounds] == ["revision_timeout", None] and work.current == "bad1"
    assert work.rounds[0].criticised


@pytest.mark.parametrize(
    ("reply", "fault"), [(LOST, "initial_timeout"), ("", "initial_empty"), ("one two three", "initial_cut_by_limit")]
)
def test_a_prompt_without_a_sound_first_reply_goes_no_further(tmp_path, reply, fault):
    say = flawed(reply=lambda question: reply if question.conversation == "p0" else "bad0")
    one = desk(tmp_path, say, rounds=1, filters=["all"], max_new_tokens=2)
    broken, sound = one.revise(rows(2))
    assert broken.fault == fault and broken.rounds == [] and sound.fault is None
    assert kinds(one.generator)["critique"] == 1
    assert going([broken, sound]) == [sound]


def test_no_rounds_criticise_nothing(tmp_path):
    one = desk(tmp_path, flawed(), rounds=0)
    works = one.revise(rows(2))
    assert kinds(one.generator) == {"reply": 2} and targets(one, works) == {"p0": ["bad0"], "p1": ["bad0"]}


def test_generator_and_critic_may_be_two_models(tmp_path):
    generator, critic = speaker(flawed()), speaker(flawed())
    Desk(tmp_path, stage(rounds=1), constitution("kind"), generator, critic, speaker()).revise([row("p")])
    assert kinds(generator) == {"reply": 1, "revision": 1} and kinds(critic) == {"critique": 1}


def test_each_question_has_the_temperature_limit_and_seed_of_its_own(tmp_path):
    settings = {"temperature": 0.9, "revision_temperature": 0.2, "max_new_tokens": 77, "max_critique_tokens": 33}
    one = desk(tmp_path, flawed(), rounds=2, **settings)
    one.revise(rows(2))
    found = {(seen(ask).kind, ask.temperature, ask.max_new_tokens) for ask in one.generator.asked}
    assert found == {("reply", 0.9, 77), ("critique", 0.2, 33), ("revision", 0.2, 77)}
    assert len({ask.seed for ask in one.generator.asked}) == len(one.generator.asked) == 10


def test_multi_turn_prompts_are_whole_in_every_question(tmp_path):
    say = flawed(reply="bad0")
    one = desk(tmp_path, say, rounds=1, judge_revisions=True)
    one.revise([row("p", "Who are you?", "A helper.", "Help me.")])
    first, *others = [*one.generator.asked, *one.generator.weighed]
    assert [turn["content"] for turn in first.messages] == ["Who are you?", "A helper.", "Help me."]
    whole = "User: Who are you?\n\nAssistant: A helper.\n\nUser: Help me."
    assert len(others) == 4 and {seen(question).conversation for question in others} == {whole}


THREE = [("last", ["bad3"]), ("all", ["bad1", "bad2", "bad3"])]


@pytest.mark.parametrize(("target", "learnt"), THREE)
def test_targets_are_the_last_or_all_accepted_revisions(tmp_path, target, learnt):
    one = desk(tmp_path, flawed(), rounds=3, targets=RevisionTarget(target))
    works = one.revise([row("p")])
    assert targets(one, works) == {"p": learnt}
    assert [line["messages"][-1]["content"] for line in demonstrations(works, targets(one, works))] == learnt


def test_left_out_revisions_are_no_targets(tmp_path):
    def revision(question):
        return "" if question.request == "true" else numbered(question)

    one = desk(tmp_path, flawed(revision=revision), rounds=3, targets=RevisionTarget.all, filters=["empty"])
    assert targets(one, one.revise([row("p")])) == {"p": ["bad1", "bad2"]}


def prefers(*order):
    """A judge that likes earlier texts of `order` better."""

    def weigh(choose, question):
        return (0.0, -2.0) if order.index(question.first) < order.index(question.second) else (-2.0, 0.0)

    return weigh


@pytest.mark.parametrize("best", ["bad1", "bad2", "bad3"])
def test_the_best_target_is_the_revision_that_wins_most(tmp_path, best):
    order = (best, *(text for text in ("bad1", "bad2", "bad3") if text != best))
    settings = {"rounds": 3, "targets": RevisionTarget.best, "judge_principles": 2}
    one = desk(tmp_path, flawed(), prefers(*order), **settings)
    works = one.revise([row("p")])
    assert targets(one, works) == {"p": [best]}
    assert len(one.generator.weighed) == 3 * 2 * 2, "three pairs, two principles, two orders"
    assert [asked.step for asked in works[0].asked].count("judge_best") == 12


def test_where_a_verdict_on_the_best_fails_the_last_is_learnt(tmp_path):
    def weigh(choose, question):
        return LOST if {question.first, question.second} == {"bad1", "bad2"} else prefers("bad1", "bad2", "bad3")(
            choose, question
        )  # fmt: skip

    one = desk(tmp_path, flawed(), weigh, rounds=3, targets=RevisionTarget.best)
    assert targets(one, one.revise([row("p")])) == {"p": ["bad3"]}


def test_a_first_reply_without_a_flaw_is_kept(tmp_path):
    for number, target in enumerate(RevisionTarget):
        one = desk(tmp_path / str(number), flawed(critique="No flaw"), rounds=2, targets=target)
        works = one.revise([row("p")])
        assert targets(one, works) == {"p": ["bad0"]} and works[0].fault is None


def test_a_prompt_with_a_flaw_and_no_accepted_revision_gives_none_and_is_marked(tmp_path):
    critique = {"kind": "Flaw: bad", "true": "No flaw"}
    say = flawed(critique=lambda question: critique[question.request], revision="")
    one = desk(tmp_path, say, rounds=2, filters=["empty"])
    works = one.revise([row("p")])
    assert targets(one, works) == {}
    assert works[0].fault == NO_TARGET


@pytest.mark.parametrize(("answers", "kept"), [((LOST, "No flaw"), True), ((LOST, LOST), False)])
def test_a_lost_critique_is_no_flaw_but_no_verdict_either(answers, kept, tmp_path):
    critique = dict(zip(("kind", "true"), answers, strict=True))
    one = desk(tmp_path, flawed(critique=lambda question: critique[question.request]), rounds=2)
    works = one.revise([row("p")])
    assert targets(one, works) == ({"p": ["bad0"]} if kept else {})
    assert works[0].fault == (None if kept else NO_TARGET)


def test_texts_that_are_revised_to_the_same_are_learnt_once(tmp_path):
    say = flawed(revision=lambda question: {"bad0": "good", "good": "fine", "fine": "good"}[question.reply])
    one = desk(tmp_path, say, rounds=3, targets=RevisionTarget.all)
    assert targets(one, one.revise([row("p")])) == {"p": ["good", "fine"]}


def test_weights_of_principles_decide_what_is_drawn(tmp_path):
    names = (principle("rare", weight=1e-9), principle("often", weight=1.0))
    one = desk(tmp_path, flawed(), names=names, rounds=1, draw=Draw.with_replacement)
    assert {work.rounds[0].principle.id for work in one.revise(rows(20))} == {"often"}
