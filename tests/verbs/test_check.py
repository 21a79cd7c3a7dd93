"""`do=check` says what training would make of the data, and writes its reports whatever it finds."""

import json
import os

import pytest

from align.config.errors import UserError
from align.config.store import compose_run
from align.verbs.check import run_check


def pairs(count, start=0):
    turns = [f"Is {n} a lucky number, do you think, my friend?" for n in range(start, start + count)]
    return [{"prompt": turn, "chosen": f"Yes, it is {turn[3:6]}.", "rejected": "It is not."} for turn in turns]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check(folder, *overrides):
    """The report in JSON, and the refusal if there was one."""
    base = [f"run_dir={folder}/run", f"cache_dir={folder}/cache", "do=check"]
    refusal = None
    try:
        run_check(compose_run([*base, *overrides], None).config)
    except UserError as error:
        refusal = str(error)
    return json.loads((folder / "run" / "check" / "data_report.json").read_text()), refusal


def by_name(slot):
    return {finding["name"]: finding for finding in slot["findings"]}


def test_a_clean_file_is_usable_and_every_row_is_accounted_for(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", pairs(60))
    report, refusal = check(tmp_path, "+recipe=dpo", f"data.preferences={path}", "data.held_out_fraction=0.2")
    [slot] = report["slots"]
    assert refusal is None and report["schema"] == 1
    assert slot["read"] == 60 == slot["kept"] + slot["held_out"] and slot["held_out"] > 0
    assert set(slot["lengths"]) == {"prompt", "chosen", "rejected", "row"}
    row = slot["lengths"]["row"]
    assert row["rows"] == 60 == sum(row["bins"])
    assert row["p50"] <= row["p95"] <= row["p99"] <= row["max"] <= slot["limit"]["max_tokens"]
    assert by_name(slot)["overlap_prompts/the held-out rows"]["count"] == 0
    printed = capsys.readouterr().out
    assert printed.startswith(report["verdict"]["text"])
    assert "60 rows: " in printed and str(tmp_path / "run" / "check" / "data_report.html") in printed
    assert len(printed.splitlines()) < 40


def test_bad_rows_are_listed_and_refused_after_the_report_is_written(tmp_path):
    rows = pairs(60)
    rows[4]["chosen"] = ""
    rows[9]["rejected"] = rows[9]["chosen"]
    path = write(tmp_path / "pairs.jsonl", rows)
    report, refusal = check(tmp_path, "+recipe=dpo", f"data.preferences={path}")
    assert "2 of 60 rows cannot be used" in refusal and "empty_completion 1" in refusal
    assert report["verdict"]["level"] == "bad"
    [slot] = report["slots"]
    reasons = {reason["reason"]: reason["rows"] for reason in slot["left_out"]}
    assert reasons == {"empty_completion": [f"{path}:5"], "chosen_equals_rejected": [f"{path}:10"]}
    folder = tmp_path / "run" / "check"
    listed = [json.loads(line) for line in (folder / slot["bad_rows_file"]).read_text().splitlines()]
    assert [line["row"] for line in listed] == [rows[4], rows[9]]
    lenient, refusal = check(tmp_path, "+recipe=dpo", f"data.preferences={path}", "data.on_bad_rows=drop")
    assert refusal is None and lenient["verdict"]["level"] != "bad"
    assert sorted(os.listdir(folder)) == ["bad_rows.preferences.jsonl", "data_report.html", "data_report.json"]
    write(path, pairs(60))
    check(tmp_path, "+recipe=dpo", f"data.preferences={path}")
    assert sorted(os.listdir(folder)) == ["data_report.html", "data_report.json"]


def test_planted_duplicates_and_overlap_are_found(tmp_path):
    rows = pairs(60)
    long = " ".join(f"word{n}" for n in range(60))
    rows += [{"prompt": f"Tell me about the {long}", "chosen": "a b", "rejected": "c d"}]
    rows += [{"prompt": f"Tell us about the {long}", "chosen": "a b", "rejected": "c d"}, rows[3]]
    exam = write(tmp_path / "exam.jsonl", [{"prompt": rows[7]["prompt"].upper()}, {"prompt": f"Say: {long}"}])
    path = write(tmp_path / "pairs.jsonl", rows)
    report, _ = check(
        tmp_path, "+recipe=dpo", f"data.preferences={path}", f"data.evaluation_sets={exam}", "data.held_out_fraction=0"
    )
    findings = by_name(report["slots"][0])
    assert findings["exact_duplicates"]["rows"] == [f"{path}:63"]
    assert findings["near_duplicates"]["rows"][0].startswith(f"{path}:62 ~ 61 (0.9")
    name = f"{tmp_path.name}/exam.jsonl"
    assert findings[f"overlap_prompts/{name}"]["rows"] == [f"{path}:8"]
    assert findings[f"overlap_grams/{name}"]["rows"] == [f"{path}:61", f"{path}:62"]
    assert report["verdict"]["level"] == "warn"


def test_what_the_limit_costs_is_a_warning(tmp_path):
    rows = pairs(40)
    for row in rows[:10]:
        row["chosen"] = "yes " * 300
    path = write(tmp_path / "pairs.jsonl", rows)
    report, _ = check(tmp_path, "+recipe=dpo", f"data.preferences={path}", "stages.dpo.max_tokens=100")
    limit = report["slots"][0]["limit"]
    assert (limit["max_tokens"], limit["rows"], limit["level"]) == (100, 10, "warn")
    assert limit["tokens_lost"] > 3000 and limit["share_of_tokens"] > 0.5
    assert report["verdict"]["level"] == "warn"


def test_check_fills_the_cache_that_training_uses(tmp_path, monkeypatch):
    path = write(tmp_path / "pairs.jsonl", pairs(30))
    check(tmp_path, "+recipe=dpo", f"data.preferences={path}")
    monkeypatch.setattr("align.data.prepare._tokenise", lambda *_: pytest.fail("the rows are not in the cache"))
    from align.stages.rows import load_template, prepare_rows, starting_model

    config = compose_run(
        ["+recipe=dpo", f"data.preferences={path}", f"run_dir={tmp_path}/other", f"cache_dir={tmp_path}/cache"], None
    ).config
    prepared = prepare_rows(config, "dpo", load_template(config, starting_model(config, "dpo")), tmp_path)
    assert len(prepared.train) + len(prepared.held_out) == 30


def test_a_slot_that_an_earlier_stage_writes_is_skipped_aloud(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", pairs(30))
    later = f"{tmp_path}/run/sft/preferences.jsonl"
    report, refusal = check(tmp_path, "+recipe=sft_dpo", f"data.demonstrations={path}", f"data.preferences={later}")
    assert refusal is None
    assert [entry["slot"] for entry in report["not_checked"]] == ["preferences"]
    assert [slot["slot"] for slot in report["slots"]] == ["demonstrations", "prompts"]
    assert f"dpo: skipped, {later} is not there yet" in capsys.readouterr().err


def test_a_slot_that_cannot_be_read_does_not_hide_the_others(tmp_path):
    path, odd = write(tmp_path / "pairs.jsonl", pairs(30)), write(tmp_path / "odd.jsonl", [{"colour": "red"}] * 30)
    report, refusal = check(tmp_path, "+recipe=sft_dpo", f"data.demonstrations={path}", f"data.preferences={odd}")
    assert "no format fits rows with the fields colour" in refusal
    assert report["verdict"]["level"] == "bad"
    assert [slot["slot"] for slot in report["slots"]] == ["demonstrations", "prompts"]


def test_no_stages_and_a_missing_evaluation_set_are_refused(tmp_path):
    path = write(tmp_path / "pairs.jsonl", pairs(30))
    with pytest.raises(UserError, match="run is empty"):
        run_check(compose_run(["+recipe=dpo", "run=[]", f"run_dir={tmp_path}"], None).config)
    missing = ["+recipe=dpo", f"data.preferences={path}", f"data.evaluation_sets={tmp_path}/none.jsonl"]
    _, refusal = check(tmp_path, *missing)
    assert "none.jsonl: no such file" in refusal
