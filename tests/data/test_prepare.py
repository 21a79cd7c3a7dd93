"""A slot becomes tokenised rows, and every row is accounted for."""

import json
import shutil

import pytest

from align.config.errors import UserError
from align.config.schema import DataConfig, OnBadRows
from align.data import cache, prepare
from align.data.plain import PLAIN_TEMPLATE
from align.data.prepare import (
    check_slot,
    prepare_demonstrations,
    prepare_preferences,
    prepare_prompts,
    prepare_text,
    slot_digests,
)
from align.data.template import Template
from tests.data.chat_tokenizers import gemma, gpt2

PREPARE = {"demonstrations": prepare_demonstrations, "preferences": prepare_preferences, "text": prepare_text}


@pytest.fixture(scope="module")
def template():
    return Template(gpt2(PLAIN_TEMPLATE))


def pairs(count):
    return [{"prompt": f"Question {n}?", "chosen": f"Yes, {n}.", "rejected": f"No, {n}."} for n in range(count)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(prepared):
    return [dict(row) for row in prepared.train] + [dict(row) for row in prepared.held_out]


def test_pairs_have_the_columns_of_the_contract(tmp_path, template):
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", pairs(40)), held_out_fraction=0.1)
    prepared = prepare_preferences(data, template, 64, None)
    assert prepared.train.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "p", "margin"]
    assert len(prepared.train) + len(prepared.held_out) == 40
    row = prepared.train[0]
    decode = template.tokenizer.decode
    assert decode(row["prompt_ids"]) == "\n\nHuman: Question 0?\n\nAssistant:"
    assert decode(row["chosen_ids"]) == " Yes, 0.<|endoftext|>"
    assert decode(row["rejected_ids"]) == " No, 0.<|endoftext|>"
    assert (row["p"], row["margin"]) == (1.0, 0.0)


def test_demonstrations_come_from_pairs_as_their_chosen_answers(tmp_path, template):
    path = write(tmp_path / "pairs.jsonl", pairs(40))
    prepared = prepare_demonstrations(DataConfig(demonstrations=path), template, 64, None)
    assert prepared.train.column_names == ["input_ids", "labels"]
    text = template.tokenizer.decode(prepared.train[0]["input_ids"])
    assert text.startswith("\n\nHuman: Question ") and "Yes, " in text and "No, " not in text


def test_the_same_conversations_are_held_out_of_sft_and_dpo(tmp_path, template):
    path = write(tmp_path / "pairs.jsonl", pairs(200))
    data = DataConfig(demonstrations=path, preferences=path)
    sft = prepare_demonstrations(data, template, 64, None)
    dpo = prepare_preferences(data, template, 64, None)
    first = [row["input_ids"] for row in sft.held_out]
    assert first == [row["prompt_ids"] + row["chosen_ids"] for row in dpo.held_out]
    assert first


def test_near_copies_never_straddle_train_and_held_out(tmp_path, template):
    rows = [row | {"prompt": row["prompt"].upper() if n % 2 else row["prompt"]} for n, row in enumerate(pairs(50) * 4)]
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", rows), held_out_fraction=0.2)
    prepared = prepare_preferences(data, template, 64, None)
    decode = template.tokenizer.decode
    trained = {decode(row["prompt_ids"]).lower() for row in prepared.train}
    kept_out = {decode(row["prompt_ids"]).lower() for row in prepared.held_out}
    assert kept_out and trained and not trained & kept_out


def test_every_row_is_kept_held_out_or_dropped_with_a_reason(tmp_path, template):
    rows = pairs(30)
    rows[3]["rejected"] = ""
    rows[7]["rejected"] = rows[7]["chosen"]
    del rows[11]["chosen"]
    rows[20]["chosen"] = "long " * 100
    rows[25]["rejected"] = True
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", rows), on_bad_rows=OnBadRows.drop)
    report = prepare_preferences(data, template, 64, None).report
    reasons = ["empty_completion", "chosen_equals_rejected", "missing_field", "too_long", "wrong_type"]
    assert report.dropped == dict.fromkeys(reasons, 1)
    assert [str(bad.origin).rsplit(":", 1)[1] for bad in report.bad_rows] == ["4", "8", "12", "21", "26"]
    counts = report.counts()
    assert counts["read"] == counts["kept"] + counts["held_out"] + sum(counts["dropped"].values()) == 30
    assert report.tokens_lost > 100


def test_the_bad_rows_are_written_with_reason_and_origin(tmp_path, template):
    rows = pairs(30)
    rows[3]["rejected"] = ""
    path = write(tmp_path / "pairs.jsonl", rows)
    data = DataConfig(preferences=path, on_bad_rows=OnBadRows.drop)
    report = prepare_preferences(data, template, 64, None).report
    report.bad_rows.write(tmp_path / "bad_rows.jsonl")
    [line] = (tmp_path / "bad_rows.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "origin": f"{path}:4",
        "reason": "empty_completion",
        "detail": "'rejected' is empty",
        "row": rows[3],
    }
    sound = DataConfig(preferences=write(tmp_path / "sound.jsonl", pairs(30)))
    prepare_preferences(sound, template, 64, None).report.bad_rows.write(tmp_path / "bad_rows.jsonl")
    assert not (tmp_path / "bad_rows.jsonl").exists()


def test_too_many_bad_rows_stop_with_counts_lines_and_the_way_out(tmp_path, template):
    rows = pairs(100)
    rows[3]["rejected"] = ""
    rows[5]["rejected"] = rows[5]["chosen"]
    path = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(UserError) as refused:
        prepare_preferences(DataConfig(preferences=path), template, 64, None)
    message = str(refused.value)
    assert message.startswith("2 of 100 rows cannot be used (empty_completion 1, chosen_equals_rejected 1): ")
    assert f"{path}:4: empty_completion: 'rejected' is empty" in message
    assert "data.on_bad_rows=drop" in message
    assert "\n" not in message
    allowed = DataConfig(preferences=path, max_bad_fraction=0.02)
    assert sum(prepare_preferences(allowed, template, 64, None).report.dropped.values()) == 2


def test_rows_too_long_are_no_bad_rows(tmp_path, template):
    rows = pairs(20)
    for row in rows[:10]:
        row["chosen"] = "long " * 100
    report = prepare_preferences(DataConfig(preferences=write(tmp_path / "p.jsonl", rows)), template, 64, None).report
    assert report.dropped == {"too_long": 10}
    assert any("longer than max_tokens=64: 10 rows" in line for line in report.lines())


def test_rows_that_the_template_refuses_are_counted(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "Be kind."}] * (n == 4) + conversation(n)} for n in range(30)]
    path = write(tmp_path / "talk.jsonl", rows)
    data = DataConfig(demonstrations=path, on_bad_rows=OnBadRows.drop)
    report = prepare_demonstrations(data, Template(gemma()), 64, None).report
    assert report.dropped == {"template_refused": 1}
    assert str(next(iter(report.bad_rows)).origin) == f"{path}:5"
    assert "System role not supported" in report.bad_rows.first[0]["detail"]


def conversation(n):
    return [{"role": "user", "content": f"Question {n}?"}, {"role": "assistant", "content": f"Yes, {n}."}]


def test_text_longer_than_max_tokens_is_cut_into_pieces_with_nothing_lost(tmp_path, template):
    (tmp_path / "book.txt").write_text("the sky is blue today. " * 400)
    prepared = prepare_text(DataConfig(text=str(tmp_path / "book.txt"), held_out_fraction=0.1), template, 50, None)
    ids = [token for row in rows_of(prepared) for token in row["input_ids"]]
    assert ids == template.encode_text("the sky is blue today. " * 400)
    assert max(len(row["input_ids"]) for row in rows_of(prepared)) == 50
    assert 0 < len(prepared.held_out) < 0.2 * len(prepared.train)
    assert any("cut into" in line for line in prepared.report.lines())


def test_several_sources_are_read_in_order_each_in_its_format(tmp_path, template):
    first = write(tmp_path / "a.jsonl", [{"question": "Why?", "answer": "So."}] * 3)
    second = write(tmp_path / "b.jsonl", [{"instruction": "Say", "input": "yes", "output": "yes"}] * 3)
    slot = [first, {"path": second, "take": 2}]
    report = prepare_demonstrations(DataConfig(demonstrations=slot), template, 64, None).report
    assert report.formats == {first: "question_answer", second: "alpaca"}
    assert report.read == 5
    assert f"data.demonstrations: {second} read as alpaca" in report.lines()


def test_a_second_call_finds_the_rows_without_tokenising(tmp_path, template, monkeypatch):
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", pairs(40)))
    first = prepare_preferences(data, template, 64, tmp_path / "cache")
    monkeypatch.setattr(Template, "encode_pairs", None)
    second = prepare_preferences(data, template, 64, tmp_path / "cache")
    assert rows_of(first) == rows_of(second)
    assert first.report == second.report
    assert first.inputs == second.inputs


def test_rows_from_the_cache_equal_rows_without_it(tmp_path, template):
    rows = pairs(40)
    rows[3]["rejected"] = ""
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", rows), on_bad_rows=OnBadRows.drop)
    plain = prepare_preferences(data, template, 64, None)
    cached = prepare_preferences(data, template, 64, tmp_path / "cache")
    assert rows_of(plain) == rows_of(cached)
    assert plain.train.features == cached.train.features
    assert plain.report == cached.report


@pytest.mark.parametrize("change", ["file", "template", "max_tokens", "fraction"])
def test_whatever_decides_the_rows_decides_the_cache(tmp_path, template, change):
    path = write(tmp_path / "pairs.jsonl", pairs(40))
    before = prepare_preferences(DataConfig(preferences=path), template, 64, tmp_path / "cache").report
    if change == "file":
        write(tmp_path / "pairs.jsonl", pairs(39))
    fraction = 0.5 if change == "fraction" else 0.05
    data = DataConfig(preferences=path, held_out_fraction=fraction)
    other = Template(gpt2(PLAIN_TEMPLATE.replace("Human", "User"))) if change == "template" else template
    after = prepare_preferences(data, other, 10 if change == "max_tokens" else 64, tmp_path / "cache").report
    assert after.digest != before.digest


def test_the_digest_is_of_the_rows_not_of_their_file(tmp_path, template):
    rows = pairs(3000)
    first = prepare_preferences(DataConfig(preferences=write(tmp_path / "a.jsonl", rows)), template, 64, None)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    second = prepare_preferences(DataConfig(preferences=str(tmp_path / "b.json")), template, 64, tmp_path / "cache")
    assert first.report.digest == second.report.digest


def test_a_half_written_cache_is_no_cache(tmp_path, template, monkeypatch):
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", pairs(40)))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", full)
        with pytest.raises(UserError, match=r"cache_dir=.*/cache: .* cannot be written there .No space left"):
            prepare_preferences(data, template, 64, tmp_path / "cache")
    assert list((tmp_path / "cache" / "rows").iterdir()) == []
    assert len(prepare_preferences(data, template, 64, tmp_path / "cache").train) > 0


def test_the_faster_of_two_writers_stays(tmp_path, template, monkeypatch):
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", pairs(40)))
    prepare_preferences(data, template, 64, tmp_path / "other")
    replace = cache.os.replace

    def second(partial, target):
        shutil.copytree(next((tmp_path / "other" / "rows").iterdir()), target)
        replace(partial, target)

    monkeypatch.setattr(cache.os, "replace", second)
    assert len(prepare_preferences(data, template, 64, tmp_path / "cache").train) > 0
    assert len(list((tmp_path / "cache" / "rows").iterdir())) == 1


def test_prompts_come_from_any_rows_in_file_order_with_the_row_itself(tmp_path):
    rows = pairs(10)
    prompts = prepare_prompts(DataConfig(prompts=write(tmp_path / "pairs.jsonl", rows)), 4)
    assert [prompt.messages[-1].content for prompt in prompts.rows] == [f"Question {n}?" for n in range(4)]
    assert [prompt.row for prompt in prompts.rows] == rows[:4]
    assert prompts.read == 4


def test_embedded_rows_of_every_kind_can_be_prepared(template):
    for slot in PREPARE:
        sources = [{"path": f"tiny:{slot}", "take": 50}]
        data = DataConfig(**{slot: sources})
        prepared = PREPARE[slot](data, template, 512, None)
        assert len(prepared.train) + len(prepared.held_out) == 50
        assert prepared.report.dropped == {}
    assert len(prepare_prompts(DataConfig(prompts="tiny:prompts"), 8).rows) == 8


def test_a_slot_is_checked_without_reading_rows(tmp_path, monkeypatch):
    path = write(tmp_path / "pairs.jsonl", pairs(3))
    monkeypatch.setattr(prepare, "walk", None)
    check_slot(DataConfig(preferences=path), "preferences")
    with pytest.raises(UserError, match="did you mean"):
        check_slot(DataConfig(preferences=path + "l"), "preferences")
    with pytest.raises(UserError, match="there is no format preferenc "):
        check_slot(DataConfig(preferences=path, format="preferenc"), "preferences")
    with pytest.raises(UserError, match=r"data\.text is not set"):
        check_slot(DataConfig(preferences=path), "text")


def test_slot_digests_are_the_inputs_of_what_was_prepared(tmp_path, template):
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", pairs(30)))
    assert slot_digests(data, "preferences") == prepare_preferences(data, template, 64, None).inputs


def test_nothing_left_to_train_on_shows_in_the_counts(tmp_path, template):
    data = DataConfig(preferences=write(tmp_path / "pairs.jsonl", pairs(30)))
    prepared = prepare_preferences(data, template, 3, None)
    assert len(prepared.train) == len(prepared.held_out) == 0
    assert prepared.report.counts() == {"read": 30, "kept": 0, "held_out": 0, "dropped": {"too_long": 30}}
