"""do=convert writes any input in one form, which is read back as what it was; nothing is lost without a word."""

import gzip
import json

import pytest

from align import cli
from align.config.schema import Ties
from align.data.canonical import canonical
from align.data.formats import as_records, find_format
from align.data.records import (
    Demonstration,
    Message,
    PreferencePair,
    PromptRow,
    Ranking,
    TextDocument,
    ToolCall,
    Unpaired,
)

ASK = (Message("system", "Be brief."), Message("user", "Où ça?"))
YES, NO, MAYBE = (Message("assistant", text) for text in ("Là.", "Nowhere", "Perhaps"))
CALL = Message("assistant", "", (ToolCall("find", '{"place": "there"}', "c1"),), reasoning="Look it up.")
TOOL = Message("tool", '{"found": true}', name="find", tool_call_id="c1")
TOOLS = ('{"type": "function", "function": {"name": "find"}}',)
RECORDS = [
    TextDocument("Once upon a time\nthere was"),
    Demonstration((*ASK, YES)),
    Demonstration((*ASK, CALL, TOOL, YES), TOOLS),
    PreferencePair(ASK, YES, NO),
    PreferencePair(ASK, YES, NO, p=0.75, margin=1.5),
    PreferencePair(ASK, YES, NO, p=0.5, tie=True),
    PreferencePair(ASK, YES, NO, p=2 / 3, tie=True),
    PreferencePair((*ASK, CALL, TOOL), YES, NO, tools=TOOLS),
    Ranking(ASK, (YES, NO, MAYBE), (0.0, 1.0, 1.0)),
    Ranking(ASK, (YES, NO, MAYBE), (-4.5, -1.0, -1.0), scores=(4.5, 1.0, 1.0)),
    PreferencePair(ASK, YES, NO, scores=(4.5, -1.0)),
    PreferencePair(ASK, YES, NO, p=0.5, tie=True, scores=(2.0, 2.0)),
    Demonstration((*ASK, YES), score=3.0),
    Unpaired(ASK, YES, True),
    Unpaired(ASK, NO, False),
    PromptRow(ASK),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_the_canonical_form_of_a_record_is_read_back_as_that_record(record):
    row = json.loads(json.dumps(canonical(record)))
    found = find_format([row], None, "here")
    [again] = as_records(found, None, row, ties=Ties.keep)
    if isinstance(record, PromptRow):
        assert (again.messages, again.tools) == (record.messages, record.tools)
    else:
        assert again == record


def convert(*arguments):
    return cli.main(["+recipe=convert", *map(str, arguments)])


def pairs_file(folder, bad=0):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(20)]
    for row in rows[:bad]:
        row["rejected"] = row["chosen"]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_is_written_whole_and_says_what_became_of_every_row(tmp_path, capsys):
    path, out = pairs_file(tmp_path, bad=2), tmp_path / "made" / "rows.jsonl.gz"
    assert convert(f"data.preferences={path}", f"out={out}", "data.on_bad_rows=drop") == 0
    rows = [json.loads(line) for line in gzip.open(out, "rt")]
    assert [row["chosen"][0]["content"] for row in rows] == [f"Yes {n}." for n in range(2, 20)]
    said = capsys.readouterr().out
    assert f"20 rows read, 2 left out (chosen_equals_rejected 2): see {out}.bad_rows.jsonl" in said
    assert f"{out}: 18 PreferencePair" in said
    assert len((out.parent / "rows.jsonl.gz.bad_rows.jsonl").read_text().splitlines()) == 2
    assert not list(out.parent.glob("*.partial"))


def test_too_many_bad_rows_leave_no_file_but_their_list(tmp_path, capsys):
    path, out = pairs_file(tmp_path, bad=2), tmp_path / "rows.jsonl"
    assert convert(f"data.preferences={path}", f"out={out}") == 2
    assert "2 of 20 rows cannot be used" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pairs.jsonl", "rows.jsonl.bad_rows.jsonl"]


def test_rankings_are_kept_whole_or_written_as_pairs(tmp_path):
    path = tmp_path / "ranked.jsonl"
    path.write_text(json.dumps(canonical(RECORDS[8])) + "\n")
    for choice, count in (("keep", 1), ("pairs", 3)):
        out = tmp_path / f"{choice}.jsonl"
        assert convert(f"data.preferences={path}", f"out={out}", f"data.rankings={choice}") == 0
        assert len(out.read_text().splitlines()) == count


def test_ties_are_kept_or_dropped_as_asked(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(canonical(record)) + "\n" for record in RECORDS[3:7]))
    for choice, count in (("keep", 4), ("drop", 2)):
        out = tmp_path / f"{choice}.jsonl"
        assert convert(f"data.preferences={path}", f"out={out}", f"data.ties={choice}") == 0
        assert len(out.read_text().splitlines()) == count
    assert "2 left out (tie 2)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.preferences={pairs}"], "out is not set; name the file to write"),
        (["data.preferences={pairs}", "out={folder}/rows.csv"], "canonical rows are JSONL; name it rows.jsonl"),
        (["data.preferences={pairs}", "out={pairs}"], "exists already and is not overwritten"),
        (["out={folder}/rows.jsonl"], "no slot is set; name the one input to convert"),
        (
            ["data.preferences={pairs}", "data.text={folder}/other.txt", "out={folder}/rows.jsonl"],
            "data.preferences, data.text are",
        ),
        (["data.preferences={pairs}", "out={folder}/rows.jsonl", "do=train"], "only do=convert and do=report write it"),
    ],
)
def test_what_cannot_be_converted_is_said_in_one_line(tmp_path, capsys, arguments, said):
    pairs = pairs_file(tmp_path)
    before = pairs.read_bytes()
    assert convert(*(argument.format(pairs=pairs, folder=tmp_path) for argument in arguments)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert pairs.read_bytes() == before
