"""`do=check` and `do=preview` of the prompts that PPO samples after: shown and judged, though none is learnt."""

import json
import re

import datasets
import pytest

from align.config.errors import UserError
from align.config.schema import ModelConfig
from align.config.store import compose_run
from align.data.bad_rows import BadRows
from align.data.prepare import Prepared
from align.data.report import RowReport
from align.data.template import Template
from align.models.load import load_tokenizer
from align.verbs import preview as verb
from align.verbs.check import run_check
from tests.data.chat_tokenizers import gemma

LONG = " and so on" * 60


def config(folder, *overrides, recipe="ppo"):
    base = [f"+recipe={recipe}", f"run_dir={folder}/run", f"cache_dir={folder}/cache"]
    return compose_run([*base, *overrides], None).config


def prompts_file(folder, count=60, *more):
    turns = [f"Is {n} a lucky number, do you think, my friend?" for n in range(count)]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": turn}) + "\n" for turn in (*turns, *more)))
    return path


def check(folder, *overrides, recipe="ppo"):
    """The report in JSON, what was printed is left to the caller."""
    run_check(config(folder, "do=check", *overrides, recipe=recipe))
    return json.loads((folder / "run/check/data_report.json").read_text())


def test_prompts_are_counted_measured_and_held_against_the_room_that_a_completion_leaves(tmp_path, capsys):
    path = prompts_file(tmp_path, 60, LONG)
    sizes = ("stages.ppo.max_tokens=100", "stages.ppo.max_new_tokens=40", "data.held_out_fraction=0.2")
    [slot] = check(tmp_path, f"data.prompts={path}", *sizes)["slots"]
    tokenizer = load_tokenizer("tiny-sft", ModelConfig(), None)
    chats = [[{"role": "user", "content": json.loads(line)["prompt"]}] for line in path.read_text().splitlines()]
    rendered = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats
    ]
    lengths = [len(ids) for ids in rendered]
    assert sorted(lengths)[-1] > 60 >= sorted(lengths)[-2], "the limit must leave out the long one alone"
    assert slot["read"] == 61 and slot["kept"] + slot["held_out"] == 60 and slot["held_out"] > 5
    assert slot["lengths"].keys() == {"row"}
    assert slot["lengths"]["row"]["rows"] == 60 and slot["lengths"]["row"]["max"] == sorted(lengths)[-2]
    assert (slot["limit"]["max_tokens"], slot["limit"]["rows"], slot["limit"]["level"]) == (60, 1, "info")
    out = capsys.readouterr().out
    assert f"61 rows: {slot['kept']} prompts, {slot['held_out']} held out, 1 left out" in out
    assert "max_tokens - max_new_tokens = 60 leaves room for a completion; it leaves out 1 longer prompts (1.6%)" in out
    assert "answer tokens" not in out
    assert "max_tokens - max_new_tokens = 60" in (tmp_path / "run/check/data_report.html").read_text()


def test_many_prompts_that_are_too_long_are_a_warning(tmp_path):
    path = prompts_file(tmp_path, 20, *(f"{n}{LONG}" for n in range(10)))
    report = check(tmp_path, f"data.prompts={path}", "stages.ppo.max_tokens=100", "stages.ppo.max_new_tokens=40")
    assert report["slots"][0]["limit"]["level"] == "warn" == report["verdict"]["level"]


def test_overlap_of_prompts_with_an_evaluation_set_is_found(tmp_path):
    path = prompts_file(tmp_path)
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"prompt": "is 7 a LUCKY number, do you think, my friend"}) + "\n")
    given = (f"data.prompts={path}", f"data.evaluation_sets={exam}", "data.held_out_fraction=0")
    [slot] = check(tmp_path, *given)["slots"]
    found = {finding["name"]: finding for finding in slot["findings"]}
    assert found[f"overlap_prompts/{tmp_path.name}/exam.jsonl"]["rows"] == [f"{path}:8"]


def test_the_embedded_prompts_of_training_are_compared_with_those_of_evaluate(tmp_path):
    report = check(tmp_path, "run=[ppo,evaluate]", "stages.ppo.policy=tiny-sft", recipe="rlhf")
    ppo, evaluate = report["slots"]
    assert [list(slot["formats"]) for slot in (ppo, evaluate)] == [["tiny:training_prompts"], ["tiny:prompts"]]
    found = {finding["name"]: finding for finding in ppo["findings"]}
    assert found["overlap_prompts/the prompts of evaluate"]["of"] == ppo["kept"]
    assert found["near_duplicates"]["of"] == ppo["read"]


def test_a_preview_of_prompts_shows_them_rendered_and_says_what_is_sampled_after_them(tmp_path, capsys):
    path = prompts_file(tmp_path, 3, LONG)
    sizes = ["stages.ppo.max_tokens=100", "stages.ppo.max_new_tokens=40", "stages.ppo.completions_per_prompt=2"]
    rewards = "stages.ppo.rewards.brevity={function: 'own:brevity'}"
    verb.run_preview(config(tmp_path, f"data.prompts={path}", *sizes, rewards))
    out = capsys.readouterr().out
    note = (
        "prompts, of which nothing is learnt; after each, 2 completions of at most max_new_tokens=40 tokens will be "
        "sampled at temperature 1 and scored by preference, brevity. A prompt has at most max_tokens - max_new_tokens "
        "= 60 tokens"
    )
    assert f"ppo: {note}\n" in out and "⟦" not in out and "longer side" not in out
    first = "Is 0 a lucky number, do you think, my friend?"
    tokens = len(load_tokenizer("tiny-sft", ModelConfig(), None)(f"<|user|>{first}<|end|><|assistant|>").input_ids)
    assert re.search(
        rf"── first[^─]*, tokens: prompt {tokens} ──\n<\|user\|>{re.escape(first)}<\|end\|><\|assistant\|>\n", out
    )
    assert "── left out as too long (" in out and "PROBLEM" not in out
    page = (tmp_path / "run/preview/ppo.html").read_text()
    assert f"<p>{note}.</p>" in page and "ppo: what is sampled after data.prompts" in page
    assert f"&lt;|user|&gt;{first}" in page


def test_the_longest_and_the_shortest_prompt_are_named(tmp_path, capsys):
    verb.run_preview(
        config(
            tmp_path, f"data.prompts={prompts_file(tmp_path, 5, 'Hi?', 'Is it true' * 5)}", "data.held_out_fraction=0"
        )
    )
    out = capsys.readouterr().out
    assert re.search(r"longest \(row 7 of 7\)", out) and re.search(r"shortest \(row 6 of 7\)", out)


def test_a_prompt_that_begins_twice_is_a_problem_and_one_without_an_answer_is_none():
    template = Template(gemma())
    bos = template.tokenizer.bos_token_id

    def problems(ids):
        rows = datasets.Dataset.from_dict({"prompt_ids": [ids], "record": ["{}"]})
        prepared = Prepared(rows, rows.select([]), RowReport("prompts", BadRows(None), max_tokens=64), [])
        return verb.preview("ppo", prepared, template, "note").problems

    assert problems([bos, 9]) == [[]]
    assert problems([bos, bos, 9]) == [["two BOS tokens follow each other"]]


def test_a_preview_without_a_prompt_left_is_refused(tmp_path):
    path = prompts_file(tmp_path, 0, LONG)
    given = (f"data.prompts={path}", "stages.ppo.max_tokens=100", "stages.ppo.max_new_tokens=40")
    with pytest.raises(UserError, match="ppo: there is no row to train on"):
        verb.run_preview(config(tmp_path, *given))
