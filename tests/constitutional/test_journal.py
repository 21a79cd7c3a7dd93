"""Killed at any byte of its journal, the stage ends as if it never was, and asks again only for what was lost."""

import json
import random
import shutil
from collections import Counter

import pytest

from align.config.schema import PairSource
from align.constitutional.journal import Journal, cut_torn_line, key_of, whole_lines
from tests.constitutional.making import constitution, seen
from tests.constitutional.whole import contents, run_whole, some_model

HOSTILE = {"text": "größer\u2028 than \ud83d\r\n\x00 \x85 it was"}
KILLS = 20
REPLIES, REVISIONS = (
    ["initial"],
    ["critique_1", "revision_1", "judge_revision_1", "critique_2", "revision_2", "judge_revision_2"],
)
SETTINGS = {"pairs": PairSource.all, "samples": 2, "judge_revisions": True}


def test_an_answer_is_in_the_file_as_soon_as_it_is_added(tmp_path):
    journal = Journal(tmp_path, "initial", 0)
    journal.add("k1", {"text": "one"})
    assert list(whole_lines(tmp_path / "initial-0.jsonl")) == [{"key": "k1", "text": "one"}]
    assert journal.known == {"k1": {"text": "one"}}


def test_any_text_comes_back_as_it_was(tmp_path):
    first = Journal(tmp_path, "initial", 0)
    first.add("k1", HOSTILE)
    first.close()
    assert Journal(tmp_path, "initial", 0).known == {"k1": HOSTILE}


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path):
    whole = b'{"key": "a", "text": "one"}\n'
    torn = json.dumps({"key": "b", "text": "größer"}, ensure_ascii=False).encode()
    for place in range(len(torn) + 1):
        file = tmp_path / f"cut{place}-0.jsonl"
        file.write_bytes(whole + torn[:place])
        journal = Journal(tmp_path, f"cut{place}", 0)
        assert journal.known == {"a": {"text": "one"}}
        journal.add("b", {"text": "größer"})
        journal.close()
        assert file.read_bytes() == whole + torn + b"\n"


def test_a_file_that_is_torn_in_its_first_line_is_empty_and_one_that_is_not_there_stays_so(tmp_path):
    torn = tmp_path / "torn.jsonl"
    torn.write_bytes(b'{"key": "a"')
    cut_torn_line(torn)
    cut_torn_line(tmp_path / "none.jsonl")
    assert torn.read_bytes() == b"" and not (tmp_path / "none.jsonl").exists()


def test_files_of_other_ranks_are_read_and_left_alone(tmp_path):
    for rank in (0, 1, 12):
        journal = Journal(tmp_path, "initial", rank)
        journal.add(f"of {rank}", {"text": str(rank)})
        journal.close()
    torn = (tmp_path / "initial-12.jsonl").read_bytes() + b'{"key": "to'
    (tmp_path / "initial-12.jsonl").write_bytes(torn)
    journal = Journal(tmp_path, "initial", 1)
    assert journal.known.keys() == {"of 0", "of 1", "of 12"}
    assert (tmp_path / "initial-12.jsonl").read_bytes() == torn
    assert journal.path.name == "initial-1.jsonl"


def test_steps_have_journals_of_their_own(tmp_path):
    Journal(tmp_path, "judge_revision_1", 0).add("k", {"text": "revision"})
    assert Journal(tmp_path, "judge", 0).known == {}
    assert Journal(tmp_path, "judge_revision", 0).known == {}


def test_a_key_is_a_digest_of_every_part_of_a_question():
    keys = [
        key_of("fake", {"seed": 1, "messages": [{"role": "user", "content": text}]})
        for text in ("a", "b", "\ud800", "a ")
    ]
    assert len(set(keys)) == 4
    assert key_of("fake", {"a": 1, "b": 2}) == key_of("fake", {"b": 2, "a": 1})
    assert key_of("fake", {"a": (1, 2)}) == key_of("fake", {"a": [1, 2]})
    assert key_of("fake", 1) != key_of("fake", "1")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    model = some_model()
    stage_dir, _ = run_whole(tmp_path_factory.mktemp("whole"), model, **SETTINGS)
    return stage_dir, model


def journals(stage_dir):
    """The files in the order in which they were written, with their bytes."""
    steps = json.loads((stage_dir / "report.json").read_text())["steps"]
    files = [stage_dir / "journal" / f"{step}-0.jsonl" for step in steps]
    assert {file.name for file in files} == {file.name for file in (stage_dir / "journal").iterdir()}
    return {file.name: file.read_bytes() for file in files}


def calls(model):
    return len(model.asked) + len(model.weighed)


def test_the_uninterrupted_run_has_much_to_lose(uninterrupted):
    stage_dir, model = uninterrupted
    written = journals(stage_dir)
    assert len(written) == 9 and calls(model) == sum(text.count(b"\n") for text in written.values()) > 100
    files = contents(stage_dir)
    assert all(files.values())
    assert b'"principle": "true"' in files["trace.jsonl"] and b'"judged_worse"' in files["bad_rows.jsonl"]


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_stage_killed_at_any_byte_ends_as_if_it_never_was(uninterrupted, tmp_path, kill):
    stage_dir, model = uninterrupted
    written = journals(stage_dir)
    left = random.Random(kill).randrange(sum(map(len, written.values())))
    folder, kept = tmp_path / "run/constitutional/journal", 0
    folder.mkdir(parents=True)
    for name, text in written.items():
        if left > 0:
            (folder / name).write_bytes(text[:left])
            kept += text[:left].count(b"\n")
            left -= len(text)
    again = some_model()
    resumed, _ = run_whole(tmp_path, again, **SETTINGS)
    assert contents(resumed) == contents(stage_dir)
    assert calls(again) == calls(model) - kept
    assert {name: sorted(text.splitlines()) for name, text in journals(resumed).items()} == {
        name: sorted(text.splitlines()) for name, text in written.items()
    }


def test_a_finished_stage_asks_nothing_again(uninterrupted, tmp_path):
    stage_dir, _ = uninterrupted
    shutil.copytree(stage_dir / "journal", tmp_path / "run/constitutional/journal")
    again = some_model()
    resumed, _ = run_whole(tmp_path, again, **SETTINGS)
    assert calls(again) == 0 and contents(resumed) == contents(stage_dir)


@pytest.mark.parametrize(
    ("changes", "asked_again"),
    [
        ({"seed": 8}, [*REPLIES, *REVISIONS, "samples", "judge"]),
        ({"temperature": 0.5}, REPLIES),
        ({"temperatures": [0.5]}, ["samples"]),
        ({"revision_temperature": 0.1}, ["critique_1", "revision_1", "critique_2", "revision_2"]),
        ({"max_critique_tokens": 99}, ["critique_1", "critique_2"]),
        ({"max_new_tokens": 99}, ["initial", "revision_1", "revision_2", "samples"]),
    ],
)
def test_changed_settings_are_asked_anew(uninterrupted, tmp_path, changes, asked_again):
    """The scripted answers follow the seed and the words alone: what is asked after a step may well be the same."""
    stage_dir, _ = uninterrupted
    shutil.copytree(stage_dir / "journal", tmp_path / "run/constitutional/journal")
    run_whole(tmp_path, some_model(), **(SETTINGS | changes))
    before, after = journals(stage_dir), journals(tmp_path / "run/constitutional")
    grown = [name.rsplit("-", 1)[0] for name in before if len(after[name]) > len(before[name])]
    assert grown == asked_again


def test_another_model_or_constitution_is_asked_anew(uninterrupted, tmp_path):
    stage_dir, model = uninterrupted
    for name in ("model", "constitution"):
        shutil.copytree(stage_dir / "journal", tmp_path / name / "run/constitutional/journal")
    other = some_model(name="other")
    run_whole(tmp_path / "model", other, **SETTINGS)
    assert calls(other) == calls(model)
    again = some_model()
    run_whole(tmp_path / "constitution", again, made=constitution("kinder", "truer", "briefer"), **SETTINGS)
    kinds = Counter(seen(ask).kind for ask in again.asked)
    assert kinds["reply"] == 0, "first replies and samples have nothing to do with the constitution"
    assert kinds["critique"] >= 10 and len(again.weighed) >= 10
