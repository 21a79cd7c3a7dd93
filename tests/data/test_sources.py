"""Every kind of file gives the same rows; every broken one is named in one line."""

import csv
import gzip
import json

import datasets
import pytest
import zstandard

from align.config.errors import UserError
from align.data import sources
from align.data.sources import expected_rows, parse_slot, read_rows, source_inputs

ROWS = [{"question": "Why?", "answer": 'A "quoted",\nbroken line'}, {"question": "Où ça — 漢字?", "answer": "Là."}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def source_of(path, **keys):
    [source] = parse_slot({"path": str(path), **keys}, "demonstrations", format="auto", split="train")
    return source


def rows_of(path, **keys):
    return [row for _, row in read_rows(source_of(path, **keys))]


def write_csv(path, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_file(path):
    name = path.name
    if name.endswith(".jsonl"):
        path.write_text(JSONL, encoding="utf-8")
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(JSONL.encode()))
    elif name.endswith(".jsonl.zst"):
        path.write_bytes(zstandard.compress(JSONL.encode()))
    elif name.endswith(".json"):
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif name.endswith(".csv"):
        write_csv(path)
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


FILES = ["rows.jsonl", "rows.jsonl.gz", "rows.jsonl.zst", "rows.json", "rows.csv", "rows.parquet", "saved_to_disk"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    assert rows_of(write_file(tmp_path / name)) == ROWS


def test_an_arrow_file_alone_is_read(tmp_path):
    folder = write_file(tmp_path / "saved_to_disk")
    [file] = folder.glob("*.arrow")
    assert rows_of(file) == ROWS


def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path):
    write_csv(tmp_path / "excel.csv", encoding="utf-8-sig")
    assert rows_of(tmp_path / "excel.csv") == ROWS
    (tmp_path / "bom.jsonl").write_text(JSONL, encoding="utf-8-sig")
    assert rows_of(tmp_path / "bom.jsonl") == ROWS


def test_origins_are_lines_counted_from_one_over_blank_lines_and_quoted_breaks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    write_csv(tmp_path / "b.csv")
    (tmp_path / "c.json").write_text(json.dumps(ROWS))
    found = {
        name: [str(o) for o, _ in read_rows(source_of(tmp_path / name))] for name in ("a.jsonl", "b.csv", "c.json")
    }
    assert found["a.jsonl"] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]
    assert found["b.csv"] == [f"{tmp_path}/b.csv:2", f"{tmp_path}/b.csv:4"]
    assert found["c.json"] == [f"{tmp_path}/c.json row 1", f"{tmp_path}/c.json row 2"]


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "one\u2028two\x85three"}\n'.encode())
    assert rows_of(tmp_path / "a.jsonl") == [{"text": "one\u2028two\x85three"}]


def test_a_folder_is_its_data_files_in_order_without_the_notes_beside_them(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"n": 2}\n')
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n')
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "SOURCE.txt").write_text("notes")
    (tmp_path / ".hidden.jsonl").write_text('{"n": 0}\n')
    assert rows_of(tmp_path) == [{"n": 1}, {"n": 2}]


def test_a_folder_of_texts_is_one_document_a_file(tmp_path):
    (tmp_path / "b.txt").write_text("two\n\nlines\n")
    (tmp_path / "a.txt").write_text("one")
    assert rows_of(tmp_path) == [{"text": "one"}, {"text": "two\n\nlines\n"}]


def test_a_glob_is_its_files_in_order(tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "other.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    assert rows_of(tmp_path / "part-*.jsonl") == [{"name": "part-1.jsonl"}, {"name": "part-2.jsonl"}]
    with pytest.raises(UserError, match="no file matches"):
        rows_of(tmp_path / "nothing-*.jsonl")


def test_take_keeps_the_first_rows_over_all_files(tmp_path):
    for n in (1, 2):
        (tmp_path / f"{n}.jsonl").write_text(f'{{"n": {n}}}\n' * 3)
    assert rows_of(tmp_path, take=4) == [{"n": 1}] * 3 + [{"n": 2}]


def test_embedded_rows_are_read_by_name():
    assert len(rows_of("tiny:prompts", take=3)) == 3
    with pytest.raises(UserError, match=r"tiny:prompt: the embedded data has tiny:text, .*tiny:prompts"):
        rows_of("tiny:prompt")


def test_a_hub_id_is_loaded_only_where_no_such_path_exists(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, *, split):
        asked.append((path, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert rows_of("org/name", split="test") == ROWS
    assert asked == [("org/name", "test")]
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "a.jsonl").write_text('{"local": 1}\n')
    assert rows_of("org/name") == [{"local": 1}]
    assert len(asked) == 1


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    def load_dataset(path, *, split):
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        rows_of("org/name")
    assert "data.demonstrations=org/name: no such local file" in str(refused.value)
    assert "Couldn't reach the Hub" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_hub_revision_is_the_commit_that_was_read(monkeypatch):
    data = datasets.Dataset.from_list(ROWS)
    data.info.download_checksums = {f"hf://datasets/org/name@{'ab12' * 10}/a.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda path, split: data)
    [found] = source_inputs(source_of("org/name"))
    assert found.digest == "hub:" + "ab12" * 10
    assert list(source_inputs(source_of("org/name"), with_hub=False)) == []


def test_the_digest_of_a_file_follows_its_bytes(tmp_path):
    path = write_file(tmp_path / "rows.jsonl")
    [before] = source_inputs(source_of(path))
    path.write_text(JSONL.replace("Why", "How"), encoding="utf-8")
    [after] = source_inputs(source_of(path))
    assert before.path == after.path == str(path)
    assert before.digest != after.digest


def refusal(path, **keys):
    with pytest.raises(UserError) as refused:
        rows_of(path, **keys)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_missing_file_names_its_nearest_neighbour(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    assert refusal(tmp_path / "pears.jsonl").endswith(f"no such file; did you mean {tmp_path}/pairs.jsonl?")
    assert "no such file (nothing like it in" in refusal(tmp_path / "quite_other.csv")
    assert f"did you mean {tmp_path}?" in refusal(tmp_path.with_name(tmp_path.name + "x") / "pairs.jsonl")


def test_a_missing_relative_file_is_not_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no such file" in refusal("data/pairs.jsonl")


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zstandard.compress)])
def test_a_truncated_archive_is_named(tmp_path, suffix, compress):
    path = tmp_path / f"rows.jsonl{suffix}"
    lines = "".join(json.dumps({"n": n, "text": f"{n * 7919 % 1000003:x}" * 20}) + "\n" for n in range(5000))
    path.write_bytes(compress(lines.encode())[:-2000])
    message = refusal(path)
    assert message.startswith(f"{path}: the file is truncated: it ends after line ")
    line = int(message.split("after line ")[1].split(";")[0])
    assert 0 < line < 5000


def test_an_archive_that_is_none_is_named(tmp_path):
    (tmp_path / "rows.jsonl.gz").write_text(JSONL)
    assert "not a sound .gz file" in refusal(tmp_path / "rows.jsonl.gz")


def test_a_line_that_is_not_json_is_named_with_its_number(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 3,\n')
    assert refusal(tmp_path / "rows.jsonl").startswith(f"{tmp_path}/rows.jsonl:3: not JSON: ")


def test_jsonl_named_json_says_what_it_is(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert refusal(tmp_path / "rows.json").endswith("one object a line is JSONL: rename it to .jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    assert refusal(tmp_path / name) == f"{tmp_path / name}: the file is empty: it holds no rows"


def test_a_line_that_is_a_string_is_a_row_with_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('"just text"\n')
    [(_, row)] = read_rows(source_of(tmp_path / "a.jsonl"))
    assert row == {"text": "just text"}


def test_columns_are_renamed_by_name_or_by_path_and_what_is_missing_stays_missing(tmp_path):
    rows = [{"Goal": "Go", "instances": [{"output": "Gone"}]}, {"Goal": "Stay", "instances": []}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "Goal", "completion": "instances.0.output"}
    renamed = rows_of(tmp_path / "a.jsonl", columns=columns)
    assert renamed == [{"prompt": "Go", "completion": "Gone"}, {"prompt": "Stay"}]


def test_rows_are_counted_ahead_where_that_needs_no_parsing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n' * 7)
    (tmp_path / "a.json").write_text("[1]")
    assert expected_rows(source_of(tmp_path / "a.jsonl")) == 7
    assert expected_rows(source_of(tmp_path / "a.json")) is None


def test_rows_that_are_no_objects_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('["just a list"]\n')
    assert refusal(tmp_path / "a.jsonl").startswith(f"{tmp_path}/a.jsonl:1: a row must be an object")


def test_text_in_another_encoding_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n')
    assert refusal(tmp_path / "a.jsonl").startswith(f"{tmp_path}/a.jsonl:2: not UTF-8 text")


def test_a_csv_row_with_too_many_cells_is_named(tmp_path):
    (tmp_path / "a.csv").write_text('q,a\n"one\ntwo",2\n1,2,3\n')
    assert refusal(tmp_path / "a.csv") == f"{tmp_path}/a.csv:4: 3 cells where the header has 2 columns"


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    assert refusal(tmp_path / "a.parquet").startswith(f"{tmp_path}/a.parquet: not a sound Parquet file")


def test_markdown_is_a_document_when_named_and_a_note_in_a_folder(tmp_path):
    (tmp_path / "README.md").write_text("# Read me\n")
    assert rows_of(tmp_path / "README.md") == [{"text": "# Read me\n"}]
    (tmp_path / "a.jsonl").write_text('{"text": "row"}\n')
    assert rows_of(tmp_path) == [{"text": "row"}]


def test_an_unknown_file_type_lists_the_known_ones(tmp_path):
    (tmp_path / "a.docx").write_text("x")
    assert ".jsonl" in refusal(tmp_path / "a.docx")


@pytest.mark.parametrize(
    ("slot", "message"),
    [
        (None, "data.prompts is not set; give a file, a folder, a hub id or tiny:prompts"),
        ({"pat": "x"}, "data.prompts: a source has no key 'pat' .*; did you mean path"),
        (["a.jsonl", {"path": "b", "fromat": "text"}], r"data.prompts\[1\]: .*did you mean format"),
        ({"path": "x", "wait": 2}, "no key 'wait'.*did you mean weight"),
        ({"path": "x", "weight": 0}, "weight=0: passes over its rows in an epoch, above 0"),
        ({"path": "x", "weight": "twice"}, "weight='twice': passes over its rows"),
        ({"path": "x", "columns": ["prompt"]}, r"columns=\['prompt'\]: a field of these rows for each name"),
        ({"format": "text"}, "needs a path"),
        ({"path": "x", "take": 0}, "take=0: a number of rows from 1 up"),
        (7, "found int"),
        ([7], r"data.prompts\[0\]: .*found int"),
    ],
)
def test_a_slot_that_names_no_source_is_refused(slot, message):
    with pytest.raises(UserError, match=message):
        parse_slot(slot, "prompts", format="auto", split="train")


def test_a_source_keeps_its_own_format_over_the_slots():
    first, second = parse_slot(["a", {"path": "b", "format": "text"}], "text", format="messages", split="train")
    assert (first.format, second.format) == ("messages", "text")
    assert sources.SLOTS == ("text", "demonstrations", "preferences", "prompts", "helpful")
