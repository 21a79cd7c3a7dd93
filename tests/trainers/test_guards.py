"""The guards of PPO: silent on sound runs, one line where a run goes wrong, and the same lines after a resume."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest

from align.config.schema import Guard, PPOStage
from align.trainers import guards
from align.trainers.guards import Alarm, Guards

UPDATES = 120


def sound(update, draw):
    """Figures of a run that learns: reward rises, KL settles, entropy halves, completions grow by a sixth."""
    progress = 1 - math.exp(-update / 30)
    tokens = 40 + 7 * progress + draw.normal(0, 1.0)
    a_token = 0.15 * progress + draw.normal(0, 0.005)
    score = 1.5 * progress + draw.normal(0, 0.1)
    return {
        "reward/score": score,
        "reward/total": score - 0.1,
        "kl/nats_per_completion": a_token * tokens,
        "kl/nats_per_token": a_token,
        "completion/tokens": tokens,
        "completion/unfinished": 0.02,
        "policy/entropy": 1.2 - 0.6 * progress + draw.normal(0, 0.02),
        "policy/clipped": 0.1,
        "policy/ratio_max": 1.5 + abs(draw.normal(0, 0.8)),
        "policy/ratio_first": 1e-6,
        "policy/approx_kl": 0.01,
        # A value model that starts from nothing is worse than a constant at first.
        "value/explained_variance": 0.7 - 1.5 * math.exp(-update / 6) + draw.normal(0, 0.1),
        "value/loss": 0.2,
        "policy/loss": 0.0,
        "rollout/mismatch_kl": 1e-9,
    }


def course(changes=None, updates=UPDATES, seed=5):
    """A sound run with figures replaced: `changes` maps a name to a function of update and sound value."""
    draw = np.random.default_rng(seed)
    for update in range(1, updates + 1):
        figures = sound(update, draw)
        yield update, figures | {name: change(update, figures[name]) for name, change in (changes or {}).items()}


def alarms(run, watching=None):
    watching = watching or Guards(bf16=False)
    return [(update, alarm) for update, figures in run for alarm in watching.observe(update, figures)]


def only_alarm(run, watching=None):
    """The one alarm of a run, with its update."""
    (found,) = alarms(run, watching)
    return found


def after(start, value):
    """A figure that takes a value from an update on; the value may be a function of the updates since."""
    return lambda update, usual: (
        usual if update < start else value(update - start + 1) if callable(value) else float(value)
    )


def during(first, last, value):
    return lambda update, usual: float(value) if first <= update <= last else usual


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_run_is_silent(seed):
    assert alarms(course(updates=200, seed=seed)) == []


def test_figures_that_are_not_logged_are_not_missed():
    watching = Guards(bf16=False)
    assert [watching.observe(update, {"reward/score": 1.0}) for update in (1, 2)] == [[], []]


def test_policy_far_from_the_reference_at_each_token_is_said():
    far = {"kl/nats_per_token": after(50, 1.3), "kl/nats_per_completion": after(50, 13)}
    update, alarm = only_alarm(course(far))
    assert (update, alarm.guard) == (50, Guard.kl)
    assert "kl/nats_per_token is 1.3, above 1" in alarm.text and "stages.ppo.kl_coefficient" in alarm.text


def test_a_short_completion_may_change_wholly():
    assert alarms(course({"kl/nats_per_token": after(50, 3), "kl/nats_per_completion": after(50, 9)})) == []


def test_kl_that_runs_away_is_said_before_it_reaches_the_ceiling():
    nats = {
        "kl/nats_per_completion": after(60, lambda since: 6 * 1.25**since),
        "kl/nats_per_token": after(60, lambda since: 0.006 * 1.25**since),
    }
    update, alarm = only_alarm(course(nats, updates=80))
    assert 65 < update < 75 and "while its median over the 20 updates before is" in alarm.text
    assert alarm.text.startswith(f"update {update}: kl/nats_per_completion is ")


def test_kl_that_grows_as_sound_kl_may_is_no_runaway():
    def squared(update, usual):
        return 0.1 * update**2

    assert (
        alarms(course({"kl/nats_per_completion": squared, "kl/nats_per_token": lambda u, _: squared(u, 0) / 2000}))
        == []
    )


def test_a_policy_may_move_at_once_in_the_first_updates():
    moves = {
        "kl/nats_per_completion": lambda update, _: 0.1 if update == 1 else 20.0,
        "kl/nats_per_token": after(2, 0.5),
    }
    assert alarms(course(moves)) == []


def test_kl_spread_thinly_over_a_long_completion_is_no_runaway():
    jump = {"kl/nats_per_completion": after(60, 90), "kl/nats_per_token": after(60, 0.09)}
    assert alarms(course(jump)) == []


def test_reward_that_rises_with_length_is_said_and_again_after_as_much_more():
    growing = {
        "completion/tokens": lambda update, _: 40 + 0.3 * update + math.sin(3 * update),
        "reward/score": lambda update, _: 0.01 * update + 0.05 * math.sin(3 * update),
    }
    found = alarms(course(growing, updates=200))
    assert {alarm.guard for _, alarm in found} == {Guard.reward_by_length}
    (first, alarm), (second, again) = found[:2]
    said, level = map(float, re.search(r"is ([\d.]+), more than 25% above ([\d.]+)", alarm.text).groups())
    assert level == pytest.approx(40, abs=1) and said > 1.25 * level and "length_penalty_per_token" in alarm.text
    assert 34 < first < 50 and second > first + guards.CLEAR_UPDATES and f"more than 25% above {said:.3g}" in again.text


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"reward/score": lambda *_: 1.0}, id="reward stands"),
        pytest.param({"reward/score": lambda update, _: -0.01 * update}, id="reward falls"),
        pytest.param({"reward/score": lambda update, _: math.sin(2.5 * update)}, id="reward is noise"),
    ],
)
def test_length_without_reward_is_silent(changes):
    grows = {"completion/tokens": lambda update, _: 40 + 0.3 * update}
    assert alarms(course(grows | changes)) == []


@pytest.mark.parametrize("seed", range(5))
def test_reward_that_follows_length_without_a_trend_is_silent(seed):
    """Reward may be paid for length, but neither rises: the step up was made at once, and long ago."""
    wave = np.random.default_rng(seed).normal(0, 1, UPDATES + 1)
    follows = {
        "completion/tokens": lambda update, _: 40.0 if update == 1 else 60 + 5 * wave[update],
        "reward/score": lambda update, _: float(wave[update]),
    }
    assert alarms(course(follows)) == []


def test_reward_must_rise_clearly_itself():
    wave = np.random.default_rng(1).normal(0, 1, 22)
    lengths = {"completion/tokens": lambda update, _: 40.0 if update == 1 else 55 + 0.6 * update + 3 * wave[update]}
    clear, unclear = (
        {"reward/score": lambda update, _, more=more: wave[update] + more * update} for more in (0.3, 0.08)
    )
    assert [alarm.guard for _, alarm in alarms(course(lengths | clear, updates=21))] == [Guard.reward_by_length]
    assert alarms(course(lengths | unclear, updates=21)) == []


def test_length_that_comes_back_to_where_it_was_is_silent():
    back = {"completion/tokens": lambda update, _: 40 - 25 * math.exp(-(((update - 20) / 12) ** 2))}
    assert alarms(course(back | {"reward/score": lambda update, _: 0.01 * update})) == []


def test_an_update_without_scores_leaves_reward_and_length_aligned():
    watching = Guards(bf16=False)
    for update, figures in course(updates=60):
        gone = {"reward/score": math.nan} if update % 7 == 0 else {}
        assert watching.observe(update, figures | gone) == []
    assert len(watching.recent["reward/score"]) == len(watching.recent["completion/tokens"]) == 60 - 60 // 7


def test_entropy_that_collapses_is_said():
    update, alarm = only_alarm(course({"policy/entropy": after(40, 0.05)}))
    assert (update, alarm.guard) == (41, Guard.entropy)
    assert "policy/entropy is 0.05 nats a token, below 0.1" in alarm.text and "entropy_weight" in alarm.text


def test_one_update_of_low_entropy_and_a_certain_start_are_silent():
    assert alarms(course({"policy/entropy": during(40, 40, 0.01)})) == []
    assert alarms(course({"policy/entropy": lambda update, _: 0.015 / update})) == []


def test_a_value_model_that_misleads_for_long_is_said():
    update, alarm = only_alarm(course({"value/explained_variance": after(60, -0.3)}))
    assert (update, alarm.guard) == (69, Guard.value)
    assert "value/explained_variance is -0.3, below 0 for 10 updates" in alarm.text


def test_a_value_model_gets_its_first_updates():
    assert alarms(course({"value/explained_variance": during(1, 19, -2)}, updates=100)) == []
    update, _ = only_alarm(course({"value/explained_variance": lambda *_: -2.0}, updates=100))
    assert update == 20


def test_a_value_model_as_good_as_a_constant_is_silent():
    assert alarms(course({"value/explained_variance": lambda *_: -1e-3})) == []
    assert alarms(course({"value/explained_variance": lambda update, _: -0.5 if update % 10 else 0.01})) == []


def test_a_ratio_far_outside_the_clip_is_said():
    update, alarm = only_alarm(course({"policy/ratio_max": during(30, 40, 11)}))
    assert (update, alarm.guard) == (32, Guard.ratio) and "policy/ratio_max is 11, above 10" in alarm.text
    assert only_alarm(course({"policy/ratio_max": lambda *_: 600.0}))[0] == 5


def test_a_rare_token_now_and_then_is_no_alarm():
    assert alarms(course({"policy/ratio_max": lambda update, usual: 600.0 if update % 5 in (0, 1) else usual})) == []
    assert alarms(course({"policy/ratio_max": during(1, 2, 600)})) == []


def test_off_policy_by_accident_is_said_by_what_precision_allows():
    rounded, wrong = ({"policy/ratio_first": lambda *_, figure=figure: figure} for figure in (0.02, 0.06))
    update, alarm = only_alarm(course(rounded))
    assert (update, alarm.guard) == (1, Guard.ratio) and "policy/ratio_first is 0.02, above 0.001" in alarm.text
    assert alarms(course(rounded), Guards(bf16=True)) == []
    assert "above 0.05" in only_alarm(course(wrong), Guards(bf16=True))[1].text


@pytest.mark.parametrize("figure", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name, guard",
    [
        ("kl/nats_per_completion", Guard.kl),
        ("kl/nats_per_token", Guard.kl),
        ("policy/entropy", Guard.entropy),
        ("value/explained_variance", Guard.value),
        ("policy/ratio_max", Guard.ratio),
        ("policy/ratio_first", Guard.ratio),
    ],
)
def test_a_figure_that_is_no_number_is_said(name, guard, figure):
    update, alarm = only_alarm(course({name: during(33, 40, figure)}))
    assert (update, alarm.guard) == (33, guard) and f"{name} is {figure}" in alarm.text


def test_an_alarm_comes_again_only_after_it_has_cleared():
    def ratio(update, usual):
        return 0.01 if update in (20, 22, 24, 30, 36, 60, 61, 62) else 0.0

    assert [update for update, _ in alarms(course({"policy/ratio_first": ratio}))] == [20, 30, 36, 60]


def test_a_figure_near_its_limit_does_not_clear_the_alarm():
    def ratio(update, usual):
        return 1.2e-3 if update % 20 == 0 else 0.9e-3

    assert [update for update, _ in alarms(course({"policy/ratio_first": ratio}))] == [20]


def failing():
    """A run in which every guard speaks, some of them twice."""
    return list(
        course(
            {
                "completion/tokens": lambda update, _: 40 + 0.4 * update + math.sin(3 * update),
                "policy/ratio_max": lambda update, _: 12.0 if update % 26 > 20 else 2.0,
                "policy/entropy": lambda update, usual: 0.01 if update % 40 > 30 else usual,
                "value/explained_variance": after(70, -0.4),
                "kl/nats_per_completion": lambda update, usual: usual if update % 50 < 46 else 60.0,
                "policy/ratio_first": during(90, 92, math.nan),
            }
        )
    )


@pytest.mark.parametrize("stop", range(1, UPDATES, 7))
def test_a_resumed_run_gives_the_same_alarms(stop):
    run = failing()
    whole = Guards(bf16=False)
    expected = alarms(run, whole)
    first = Guards(bf16=False)
    found = alarms(run[:stop], first)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))
    alarms(run[stop:], first)
    second = Guards(bf16=False)
    second.load_state_dict(state)
    found += alarms(run[stop:], second)
    assert found == expected and {alarm.guard for _, alarm in found} == set(Guard)
    assert second.raised == whole.raised == [alarm.line(update) for update, alarm in expected]


def test_state_does_not_grow_with_the_run():
    watching = Guards(bf16=False)
    alarms(course(updates=150), watching)
    size = len(json.dumps(watching.state_dict()))
    alarms(course(updates=600), watching)
    assert len(json.dumps(watching.state_dict())) < 1.1 * size


def test_an_alarm_is_one_line_and_names_settings_that_exist():
    names = {field.name for field in dataclasses.fields(PPOStage)}
    said = [alarm.text for _, alarm in alarms(failing())]
    said.append(only_alarm(course({"policy/ratio_first": lambda *_: 0.5}))[1].text)
    far = {"kl/nats_per_token": after(50, 1.3), "kl/nats_per_completion": after(50, 13)}
    said.append(only_alarm(course(far))[1].text)
    for text in said:
        settings = re.findall(r"stages\.ppo\.(\w+)", text)
        assert "\n" not in text and settings and set(settings) <= names
        assert any(name in text for name in guards.REMEMBERED)


def test_an_alarm_as_a_line_holds_step_guard_and_text():
    assert Alarm(Guard.kl, "far").line(7) == {"step": 7, "guard": "kl", "text": "far"}
