"""Real rows with real dirt: what is known to be wrong with them comes out, by number and by line."""

import gzip
import json
import os
from pathlib import Path

import pytest

from align.config.errors import UserError
from align.config.schema import DataConfig, OnBadRows
from align.data.plain import PLAIN_TEMPLATE
from align.data.prepare import prepare_demonstrations, prepare_preferences, prepare_prompts, prepare_text
from align.data.template import Template
from tests.data.chat_tokenizers import chatml, gemma, gpt2

DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL_DATA = Path(os.environ.get("ALIGN_REAL_DATA", DEFAULT))
pytestmark = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no real data at {REAL_DATA}; name its folder with ALIGN_REAL_DATA"
)

HH = REAL_DATA / "hh_rlhf_harmless_test" / "test.jsonl.gz"
LLAMAFACTORY = REAL_DATA / "llamafactory_demo"
RASBT = REAL_DATA / "rasbt_instruction"
NO_LIMIT = 1_000_000


@pytest.fixture(scope="module")
def template():
    return Template(gpt2(PLAIN_TEMPLATE))


@pytest.fixture(scope="module")
def hh(template):
    return prepare_preferences(DataConfig(preferences=str(HH)), template, NO_LIMIT, None)


def rows_by_reason(report, reason):
    """0-based rows left out for a reason."""
    return [bad.origin.number - 1 for bad in report.bad_rows if bad.reason == reason]


def answers(text):
    return text.rsplit("\n\nAssistant:", 1)[1].strip()


def test_hh_bad_rows_are_the_known_ones(hh):
    report = hh.report
    assert list(report.formats.values()) == ["hh_rlhf"]
    assert report.read == 2312
    assert rows_by_reason(report, "empty_completion") == [86, 516, 925, 1103]
    assert rows_by_reason(report, "prompts_differ") == [1254, 1688, 1950, 1952, 2036]
    assert rows_by_reason(report, "roles_do_not_alternate") == [667, 763, 1319, 1849]
    assert len(report.bad_rows) == 13
    assert report.kept + report.held_out == 2299


def test_no_hh_answer_loses_its_opening_to_the_prompt(hh, template):
    with gzip.open(HH, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    bad = {row.origin.number - 1 for row in hh.report.bad_rows}
    expected = {(answers(row["chosen"]), answers(row["rejected"])) for n, row in enumerate(rows) if n not in bad}
    decode = template.tokenizer.decode
    found = set()
    for part in (hh.train, hh.held_out):
        for row in part:
            assert decode(row["prompt_ids"]).endswith("\n\nAssistant:")
            pair = [decode(row[name]).removesuffix("<|endoftext|>").strip() for name in ("chosen_ids", "rejected_ids")]
            found.add(tuple(pair))
    assert found == expected


def test_hh_conversations_with_one_first_turn_stay_together(hh, template):
    def first_turns(part):
        texts = [template.tokenizer.decode(row["prompt_ids"]) for row in part]
        return {" ".join(text.split("\n\nHuman:")[1].split("\n\nAssistant:")[0].lower().split()) for text in texts}

    trained, kept_out = first_turns(hh.train), first_turns(hh.held_out)
    assert not {turn.removesuffix("<|endoftext|>") for turn in trained} & kept_out
    assert 0.03 < len(hh.held_out) / 2299 < 0.07


def test_hh_demonstrations_are_the_chosen_answers_with_sound_masks(template):
    prepared = prepare_demonstrations(DataConfig(demonstrations=str(HH)), template, 2048, None)
    stop = template.tokenizer.eos_token_id
    for row in prepared.train.select(range(0, len(prepared.train), 7)):
        ids, labels = row["input_ids"], row["labels"]
        text = template.tokenizer.decode([label for label in labels if label != -100])
        assert labels[-1] == ids[-1] == stop
        assert "\n\nHuman:" not in text
        assert sum(label == stop for label in labels) == sum(token == stop for token in ids)


def test_hh_rows_are_counted_at_a_limit_and_none_is_cut(hh, template):
    limit = 300
    short = prepare_preferences(DataConfig(preferences=str(HH)), template, limit, None)

    def tokens(row):
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))

    rows = [*hh.train, *hh.held_out]
    too_long = [row for row in rows if tokens(row) > limit]
    assert short.report.dropped["too_long"] == len(too_long) > 100
    assert short.report.tokens_lost == sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in too_long)
    kept = [row["prompt_ids"] for row in short.train] + [row["prompt_ids"] for row in short.held_out]
    assert sorted(kept) == sorted(row["prompt_ids"] for row in rows if tokens(row) <= limit)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_llamafactory_pairs_are_read_as_sharegpt_preferences(language):
    data = DataConfig(preferences=str(LLAMAFACTORY / f"dpo_{language}_demo.json"))
    report = prepare_preferences(data, Template(chatml()), NO_LIMIT, None).report
    assert list(report.formats.values()) == ["preference_sharegpt"]
    assert report.counts()["read"] == report.kept + report.held_out == 300


@pytest.mark.parametrize(("language", "with_system"), [("en", 80), ("zh", 64)])
def test_rows_with_a_system_turn_are_refused_by_a_template_that_has_none(language, with_system):
    path = str(LLAMAFACTORY / f"dpo_{language}_demo.json")
    with pytest.raises(UserError, match=f"{with_system} of 300 rows cannot be used .*System role not supported"):
        prepare_preferences(DataConfig(preferences=path), Template(gemma()), NO_LIMIT, None)
    data = DataConfig(preferences=path, on_bad_rows=OnBadRows.drop)
    report = prepare_preferences(data, Template(gemma()), NO_LIMIT, None).report
    assert report.dropped == {"template_refused": with_system}


def test_llamafactory_typed_content_is_read():
    data = DataConfig(
        demonstrations=str(LLAMAFACTORY / "v1_sft_demo.jsonl"), preferences=str(LLAMAFACTORY / "v1_dpo_demo.jsonl")
    )
    chat = Template(chatml())
    sft, dpo = prepare_demonstrations(data, chat, NO_LIMIT, None), prepare_preferences(data, chat, NO_LIMIT, None)
    assert (list(sft.report.formats.values()), sft.report.read) == (["messages"], 500)
    assert (list(dpo.report.formats.values()), dpo.report.read) == (["preference_implicit"], 10)
    assert sft.report.dropped == dpo.report.dropped == {}


def test_tool_calls_and_unpaired_rows_are_read_for_what_they_are():
    chat = Template(chatml())
    path = str(LLAMAFACTORY / "kto_en_demo.json")
    unpaired = DataConfig(demonstrations=path, on_bad_rows=OnBadRows.drop)
    assert prepare_demonstrations(unpaired, chat, NO_LIMIT, None).report.dropped == {"undesirable": 150}
    with pytest.raises(UserError, match=r"the rows are unpaired: .* They teach KTO, not pairs"):
        prepare_preferences(DataConfig(preferences=path), chat, NO_LIMIT, None)
    tools = prepare_prompts(DataConfig(prompts=str(LLAMAFACTORY / "glaive_toolcall_en_demo.json")))
    assert len(tools.rows) == tools.read == 300
    assert sum(bool(prompt.tools) for prompt in tools.rows) == 191


def test_plain_text_rows_and_files_are_documents(template):
    rows = prepare_text(DataConfig(text=str(LLAMAFACTORY / "c4_demo.jsonl")), template, 1024, None)
    assert rows.report.read == rows.report.kept + rows.report.held_out == 300
    file = LLAMAFACTORY / "wiki_demo.txt"
    prepared = prepare_text(DataConfig(text=str(file)), template, 1024, None)
    ids = [t for part in (prepared.train, prepared.held_out) for row in part for t in row["input_ids"]]
    assert template.tokenizer.decode(ids) == file.read_text(encoding="utf-8") + "<|endoftext|>"
    assert len(prepared.held_out) > 0


def test_rasbt_identical_pairs_are_the_known_ones(template):
    path = str(RASBT / "instruction-data-with-preference.json")
    data = DataConfig(preferences=path)
    report = prepare_preferences(data, template, NO_LIMIT, None).report
    assert list(report.formats.values()) == ["preference_alpaca"]
    assert rows_by_reason(report, "chosen_equals_rejected") == [122, 226, 400, 566, 628, 676]
    assert len(report.bad_rows) == 6
    with pytest.raises(UserError, match="alpaca or preference_alpaca"):
        prepare_demonstrations(DataConfig(demonstrations=path), template, NO_LIMIT, None)


@pytest.mark.parametrize(
    ("path", "row_format", "rows"),
    [
        ("rasbt_instruction/instruction-data.json", "alpaca", 1100),
        ("rasbt_instruction/instruction-examples.json", "alpaca", 200),
        ("gsm8k/test.jsonl", "question_answer", 1319),
        ("mt_bench/dummy_conversation.json", "sharegpt", 500),
    ],
)
def test_clean_demonstrations_lose_no_row(template, path, row_format, rows):
    report = prepare_demonstrations(DataConfig(demonstrations=str(REAL_DATA / path)), template, NO_LIMIT, None).report
    assert list(report.formats.values()) == [row_format]
    assert report.read == report.kept + report.held_out == rows


@pytest.mark.parametrize(
    ("path", "rows"),
    [("ifeval/en_input_data.jsonl", 541), ("xstest/xstest_prompts.csv", 450), ("gsm8k/test.jsonl", 1319)],
)
def test_prompts_are_read_from_prompt_files_and_from_demonstrations(path, rows):
    prompts = prepare_prompts(DataConfig(prompts=str(REAL_DATA / path)))
    assert len(prompts.rows) == prompts.read == rows
    assert all(prompt.messages[-1].role == "user" for prompt in prompts.rows)


def test_a_folder_with_notes_and_licences_is_its_data_file(template):
    report = prepare_prompts(DataConfig(prompts=str(HH.parent)), 10).report
    assert report.formats == {str(HH.parent): "hh_rlhf"}
