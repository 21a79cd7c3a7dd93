"""The constitutional stage between its files: which prompts it takes, what it refuses, and two ranks for one."""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from align.config.constitution import load_constitution
from align.config.errors import UserError
from align.config.schema import ConstitutionalStage, PairSource, SpeakerBackend, SpeakerConfig
from align.stages.constitutional import check_stage
from align.stages.speakers import speaker_configs
from tests.constitutional.making import by_kind, constitution, seen, speaker
from tests.constitutional.ranks import SETTINGS
from tests.constitutional.whole import contents, helpful_rows, lines, prompt_rows, run_whole, some_model
from tests.launching import REPO, free_port

LOCAL = SpeakerConfig(model="tiny-sft")


def question(text):
    return {"prompt": [{"role": "user", "content": text}]}


def content(speaker):
    return [ask.messages[-1]["content"] for ask in speaker.asked if seen(ask).kind == "reply"]


def test_each_different_prompt_is_taken_once_the_first_ones_first(tmp_path):
    model, texts = some_model(), ["a", "b", "a", "c", "b", "d"]
    stage_dir, manifest = run_whole(tmp_path, model, prompts=list(map(question, texts)), max_prompts=3)
    assert [line["conversation"][-1]["content"] for line in lines(stage_dir / "trace.jsonl")] == ["a", "b", "c"]
    assert sorted(content(model)) == ["a", "b", "c"]
    assert manifest.rows["kept"] == 3


def test_prompts_with_tools_are_left_out_with_the_reason(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    model = some_model()
    stage_dir, manifest = run_whole(
        tmp_path, model, prompts=[question("a") | {"tools": []}, question("b") | {"tools": [tool]}]
    )
    assert content(model) == ["a"]
    [line] = [line for line in lines(stage_dir / "bad_rows.jsonl") if line["what"] == "prompt"]
    assert (line["reason"], line["prompt"]) == ("has_tools", "b")
    assert manifest.rows["dropped"]["has_tools"] == 1


def test_the_order_of_prompts_and_other_prompts_change_nothing_of_a_prompt(tmp_path):
    def traces(folder, prompts):
        stage_dir, _ = run_whole(tmp_path / folder, some_model(), prompts=prompts, pairs=PairSource.all, samples=2)
        return {line["id"]: line for line in lines(stage_dir / "trace.jsonl")}

    every = traces("all", prompt_rows(12))
    assert traces("reversed", prompt_rows(12)[::-1]) == every
    some = traces("some", prompt_rows(12)[3:6])
    assert len(some) == 3 and some.items() <= every.items()


def test_a_helpful_set_that_is_too_small_is_used_whole_and_that_is_said(tmp_path, capsys):
    model = speaker(by_kind(reply="fine", critique="No flaw"))
    stage_dir, manifest = run_whole(tmp_path, model, helpful=helpful_rows(3), helpful_ratio=0.5)
    assert "WARN 3 helpful rows for 5 wanted" in capsys.readouterr().err
    assert len(lines(stage_dir / "demonstrations.jsonl")) == 10 + 3
    assert manifest.metrics["demonstrations/helpful_mixed_in"] == 3
    assert "data.helpful" in [one["name"] for one in manifest.inputs]


@pytest.mark.parametrize(("ratio", "mixed"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_helpful_rows_come_behind_what_was_made_as_many_as_asked(tmp_path, ratio, mixed):
    model = speaker(by_kind(reply="fine", critique="No flaw"))
    stage_dir, _ = run_whole(tmp_path, model, helpful=helpful_rows(40), helpful_ratio=ratio)
    replies = [line["messages"][-1]["content"] for line in lines(stage_dir / "demonstrations.jsonl")]
    assert replies[:10] == ["fine"] * 10 and len(replies) == 10 + mixed and "fine" not in replies[10:]


def test_a_prompt_without_a_target_may_still_give_pairs(tmp_path):
    say = by_kind(reply=lambda q: f"reply {len(q.conversation)}", critique="Flaw: bad", revision="")
    model = speaker(lambda ask, q: f"{say(ask, q)} {ask.seed}" if q.kind == "reply" else say(ask, q))
    settings = {"pairs": PairSource.all, "samples": 2, "filters": ["empty"], "prompts": [question("a")]}
    stage_dir, _ = run_whole(tmp_path, model, **settings)
    assert lines(stage_dir / "demonstrations.jsonl") == [] and len(lines(stage_dir / "preferences.jsonl")) == 1
    reasons = Counter(line["reason"] for line in lines(stage_dir / "bad_rows.jsonl"))
    assert reasons == {"no_revision_accepted": 1, "empty": 2}


def test_prices_are_those_of_the_role_that_each_step_asks(tmp_path):
    served = {"backend": SpeakerBackend.server, "url": "http://127.0.0.1:9/v1"}
    prices = {
        "generator": SpeakerConfig(model="g", prompt_price=1.0, completion_price=10.0, **served),
        "critic": SpeakerConfig(model="c", prompt_price=100.0, completion_price=1000.0, **served),
        "judge": SpeakerConfig(model="j", prompt_price=10_000.0, **served),
    }
    stage_dir, _ = run_whole(tmp_path, some_model(), **prices)
    report = json.loads((stage_dir / "report.json").read_text())
    expected = 0.0
    for step, spent in report["steps"].items():
        role = "judge" if step.startswith("judge") else "critic" if step.startswith("critique") else "generator"
        expected += spent["prompt_tokens"] * prices[role].prompt_price
        expected += spent["new_tokens"] * prices[role].completion_price
    assert report["price"] == pytest.approx(expected / 1e6) and report["price"] > 0


def checked(tmp_path, **changes):
    check_stage(ConstitutionalStage(**({"generator": LOCAL} | changes)), constitution("kind"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generator": SpeakerConfig()}, "generator.model is not set"),
        ({"judge": SpeakerConfig(backend=SpeakerBackend.server, model="m")}, "judge.backend=server needs"),
        ({"critic": SpeakerConfig(backend=SpeakerBackend.server)}, "critic.model is not set"),
        ({"filters": ["all", "polite"]}, "no filter is called polite; there are empty"),
        ({"pairs": PairSource.contrast}, "no principle of test has positive and negative prompts"),
        ({"rounds": 0}, "revision_vs_initial compares revisions, and rounds=0 makes none"),
    ],
)
def test_a_setting_that_cannot_be_served_is_refused(tmp_path, changes, words):
    checked(tmp_path)
    with pytest.raises(UserError, match=words):
        checked(tmp_path, **changes)


def test_contrast_is_served_by_a_constitution_that_has_both_prompts():
    stage = ConstitutionalStage(generator=LOCAL, pairs=PairSource.contrast)
    check_stage(stage, load_constitution("harmlessness"))


def test_the_critic_is_the_generator_and_the_judge_the_critic_unless_they_are_named():
    one, other = SpeakerConfig(model="a"), SpeakerConfig(model="b")
    roles = ("generator", "critic", "judge")
    assert speaker_configs(ConstitutionalStage(generator=one)) == dict.fromkeys(roles, one)
    found = speaker_configs(ConstitutionalStage(generator=one, critic=other))
    assert found == {"generator": one, "critic": other, "judge": other}
    found = speaker_configs(ConstitutionalStage(generator=one, judge=other))
    assert found == {"generator": one, "critic": one, "judge": other}


def launch(folder, ranks):
    """One process a rank, joined by gloo; returns how much each asked."""
    folder.mkdir(exist_ok=True)
    port, processes = free_port(), []
    for rank in range(ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
        environment |= {name: str(value) for name, value in names.items()}
        command = [sys.executable, "-m", "tests.constitutional.ranks", str(folder)]
        processes.append(
            subprocess.Popen(
                command, cwd=REPO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in processes:
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output
    return [json.loads((folder / f"asked-{rank}.json").read_text()) for rank in range(ranks)]


def test_two_ranks_share_the_questions_and_leave_the_files_of_one(tmp_path):
    alone = some_model()
    one, _ = run_whole(tmp_path / "one", alone, **SETTINGS)
    asked = launch(tmp_path / "two", 2)
    two = tmp_path / "two/run/constitutional"
    assert contents(two) == contents(one)
    total = len(alone.asked) + len(alone.weighed)
    assert sum(asked) == total and abs(asked[0] - asked[1]) < 0.1 * total
    assert {file.name[-8:] for file in (two / "journal").iterdir()} == {"-0.jsonl", "-1.jsonl"}
    # The files of two ranks are the journal of one.
    again = some_model()
    (tmp_path / "again/run").mkdir(parents=True)
    two.rename(tmp_path / "again/run/constitutional")
    resumed, _ = run_whole(tmp_path / "again", again, **SETTINGS)
    assert contents(resumed) == contents(one) and again.asked == again.weighed == []
