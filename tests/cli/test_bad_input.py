"""Bad rows, models and settings, through the command line: one line that says what, where and what to do; exit 2."""

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from align import cli
from align.artifacts import read_manifest
from tests.chain.runs import environment
from tests.cli.own_files import command, finished, looks_complete, pairs, refusal, save_model, write_rows

SOUND = pairs(30)
NO_REJECTED = {"prompt": "Why?", "chosen": "So."}
EMPTY = {"prompt": "Why?", "chosen": "So.", "rejected": " "}
EQUAL = {"prompt": "Why?", "chosen": "So.", "rejected": "So."}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("own") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", SOUND)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory, model, rows) -> Path:
    """The folder of a run that is complete; take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(command(model, rows, folder)) == 0
    return folder


def truncated_archive(folder: Path) -> Path:
    whole = gzip.compress(write_rows(folder / "pairs.jsonl", SOUND * 20).read_bytes())
    path = folder / "cut.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    return path


def not_json(folder: Path) -> Path:
    path = write_rows(folder / "torn.jsonl", SOUND)
    path.write_text(path.read_text() + '{"prompt": "Why?", "chosen\n')
    return path


def misspelt(folder: Path) -> Path:
    write_rows(folder / "preferences.jsonl", SOUND)
    return folder / "preference.jsonl"


def bad_rows(*bad: dict) -> Callable[[Path], Path]:
    return lambda folder: write_rows(folder / "rows.jsonl", [*SOUND[:4], *bad])


BAD_DATA = {
    "a missing file": (misspelt, "no such file; did you mean {folder}/preferences.jsonl?"),
    "a truncated .gz": (truncated_archive, "cut.jsonl.gz: the file is truncated: it ends after line"),
    "a line that is not JSON": (not_json, "torn.jsonl:31: not JSON"),
    "a missing field": (bad_rows(NO_REJECTED), "rows.jsonl:5: missing_field: 'rejected' is missing"),
    "an empty completion": (bad_rows(EMPTY), "rows.jsonl:5: empty_completion: 'rejected' is empty"),
    "chosen equal to rejected": (bad_rows(EQUAL), "rows.jsonl:5: chosen_equals_rejected"),
    "a field that no row has": (lambda f: write_rows(f / "rows.jsonl", [NO_REJECTED] * 3), "the fields prompt, chosen"),
    "an empty file": (lambda f: write_rows(f / "rows.jsonl", []), "rows.jsonl: the file is empty"),
    "a folder without data": (lambda f: f, "the folder holds no data files"),
}


@pytest.mark.parametrize(("make", "words"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_one_line(make, words, model, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    path = make(tmp_path / "data")
    assert words.format(folder=tmp_path / "data") in refusal(capsys, command(model, path, tmp_path))
    assert looks_complete(tmp_path) == []


def test_a_few_bad_rows_are_dropped_counted_and_listed(model, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [*SOUND, NO_REJECTED, EMPTY, EQUAL])
    out, _ = finished(capsys, command(model, path, tmp_path, "data.max_bad_fraction=0.1"))
    for reason in ("missing_field", "empty_completion", "chosen_equals_rejected"):
        assert re.search(rf"\b{reason} 1\b|\b1 {reason}\b", out), out
    listed = [json.loads(line) for line in (tmp_path / "run/dpo/bad_rows.jsonl").read_text().splitlines()]
    assert [row["origin"] for row in listed] == [f"{path}:{line}" for line in (31, 32, 33)]
    assert [row["row"] for row in listed] == [NO_REJECTED, EMPTY, EQUAL]
    manifest = read_manifest(tmp_path / "run/dpo")
    assert manifest.rows["dropped"] == {"missing_field": 1, "empty_completion": 1, "chosen_equals_rejected": 1}


def test_too_many_bad_rows_are_all_listed_in_a_file(model, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [*SOUND, *[EMPTY] * 5])
    file = tmp_path / "run/dpo/bad_rows.jsonl"
    line = refusal(capsys, command(model, path, tmp_path))
    assert "5 of 35 rows cannot be used (empty_completion 5)" in line and str(file) in line
    assert len(file.read_text().splitlines()) == 5


def keep_out(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names]


def config_of(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))

    return change


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def only_an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def one_shard_of_two(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def one_token_too_many(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)


BAD_MODEL = {
    "no folder": (shutil.rmtree, "no such folder, and not a hub id (organisation/model); did you mean {near}?"),
    "no config": (keep_out("config.json"), "no config.json in it; give a folder written by save_pretrained"),
    "an adapter": (only_an_adapter, "an adapter, not a whole model; merge it with +recipe=export model.path="),
    "no tokenizer": (
        keep_out("tokenizer.json", "tokenizer_config.json"),
        "no tokenizer in it; save the model's tokenizer there with tokenizer.save_pretrained",
    ),
    "no weights": (keep_out("model.safetensors"), "no weights (*.safetensors) in it"),
    "garbage for weights": (lambda f: (f / "model.safetensors").write_text("x" * 99), "not a sound safetensors file"),
    "truncated weights": (cut_weights, "{folder}/model.safetensors: not a sound safetensors file"),
    "a missing shard": (one_shard_of_two, "1 of 2 weight files are missing, model-00002-of-00002.safetensors first"),
    "a torn config": (lambda f: (f / "config.json").write_text('{"model'), "{folder}/config.json: cannot be read"),
    "an unknown architecture": (config_of(model_type="nonesuch"), "the model cannot be loaded"),
    "a layer without weights": (config_of(num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
    "weights of another shape": (config_of(intermediate_size=64), "is (32, 48) in the file, (32, 64) by the config"),
    "a torn tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
    "a token without embedding": (one_token_too_many, "(<pad>), but the model has"),
    "no chat template": (
        keep_out("chat_template.jinja"),
        "give one with model.chat_template=<file.jinja>, or use model.chat_template=plain",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_MODEL.values(), ids=BAD_MODEL.keys())
def test_a_bad_model_is_one_line(spoil, words, model, rows, tmp_path, capsys):
    folder = tmp_path / "models" / "mine"
    shutil.copytree(model, folder)
    shutil.copytree(model, folder.with_name("mine2"))
    spoil(folder)
    line = refusal(capsys, command(folder, rows, tmp_path))
    assert words.format(folder=folder, near=folder.with_name("mine2")) in line
    assert str(folder) in line
    assert looks_complete(tmp_path) == []


@pytest.mark.parametrize("given", ["plain", "own.jinja"])
def test_a_chat_template_can_be_given(given, model, rows, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "chat_template.jinja").rename(tmp_path / "own.jinja")
    choice = given if given == "plain" else tmp_path / given
    finished(capsys, command(bare, rows, tmp_path, f"model.chat_template={choice}"))
    trained = AutoTokenizer.from_pretrained(tmp_path / "run/dpo/policy")
    assert ("Human:" in trained.chat_template) == (given == "plain")
    assert ("<|im_start|>" in trained.chat_template) == (given == "own.jinja")


BAD_SETTING = {
    "stages.dpo.max_steps=0": "stages.dpo.max_steps=0: must be 1 or more",
    "stages.dpo.max_steps=-1": "stages.dpo.max_steps=-1: must be 1 or more",
    "stages.dpo.batch_size=6": "not a multiple of stages.dpo.micro_batch_size=4",
    "stages.dpo.max_tokens=512": "has 256 positions; use stages.dpo.max_tokens=256",
    "stages.dpo.max_tokens=4": "none of 30 rows is left to train on (too_long 30)",
    "model.chat_template=mine.jinja": "model.chat_template=mine.jinja: no such file; give a .jinja file, or `plain`",
    "run_dir=${data.preferences}": "something else is in its place",
    "run_dir=${data.preferences}/run": "something else is in its place",
    "cache_dir=${data.preferences}": "the tokenised rows cannot be written there",
}


@pytest.mark.parametrize(("override", "words"), BAD_SETTING.items(), ids=BAD_SETTING.keys())
def test_a_bad_setting_is_one_line(override, words, model, rows, tmp_path, capsys):
    assert words in refusal(capsys, command(model, rows, tmp_path, override))
    assert looks_complete(tmp_path) == []


def test_a_stage_folder_that_is_a_file_is_one_line(model, rows, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/dpo").write_text("mine")
    assert "something else is in its place" in refusal(capsys, command(model, rows, tmp_path))
    assert (tmp_path / "run/dpo").read_text() == "mine"


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


CHANGED_RUN = {
    "another config": (lambda dpo: None, "stages.dpo.beta was 0.1, is 0.3", ["stages.dpo.beta=0.3"]),
    "a deleted output": (lambda dpo: (dpo / "policy/config.json").unlink(), "policy/config.json is missing", []),
    "a shortened output": (lambda dpo: cut_weights(dpo / "policy"), "policy/model.safetensors has", []),
    "an altered output": (lambda dpo: flip_last_byte(dpo / "policy/model.safetensors"), "was changed after", []),
    "a torn manifest": (lambda dpo: (dpo / "manifest.json").write_text("{"), "manifest.json:1: not JSON", []),
}


@pytest.mark.parametrize(("change", "words", "more"), CHANGED_RUN.values(), ids=CHANGED_RUN.keys())
def test_a_run_folder_that_does_not_fit_is_refused(change, words, more, finished_run, model, rows, tmp_path, capsys):
    run_dir = tmp_path / "copy"
    shutil.copytree(finished_run / "run", run_dir)
    change(run_dir / "dpo")
    before = sorted(path.name for path in run_dir.rglob("*"))
    line = refusal(capsys, command(model, rows, finished_run, f"run_dir={run_dir}", *more))
    assert words in line and str(run_dir / "dpo") in line and "delete" in line
    assert sorted(path.name for path in run_dir.rglob("*")) == before


def test_changed_rows_are_refused_by_name(finished_run, model, rows, tmp_path, capsys):
    mine = shutil.copy(rows, tmp_path / "mine.jsonl")
    finished(capsys, command(model, mine, tmp_path))
    write_rows(Path(mine), SOUND[:-1])
    assert f"was made from other inputs: {mine} changed since" in refusal(capsys, command(model, mine, tmp_path))


def test_align_debug_shows_where_a_refusal_comes_from(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ALIGN_DEBUG", "1")
    assert cli.main(command(model, tmp_path / "none.jsonl", tmp_path)) == cli.USER_ERROR
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "source_files" in errors
    assert errors.splitlines()[-1].startswith("align: data.preferences=")


def python_m_align(folder: Path, arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "align", *arguments],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_of_its_own_says_one_line_and_exits_2(model, tmp_path):
    process = python_m_align(tmp_path, command(model, tmp_path / "none.jsonl", tmp_path))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.startswith("align: data.preferences=") and len(errors.splitlines()) == 1


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(model, rows, tmp_path, capsys):
    arguments = command(model, rows, tmp_path, "stages.dpo.max_steps=120", "stages.dpo.save_every=20")
    # A shell that runs the tests in the background has them ignore SIGINT, and a child would inherit that.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = python_m_align(tmp_path, arguments)
    finally:
        signal.signal(signal.SIGINT, handler)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/dpo/checkpoints/checkpoint-20/sealed.json").is_file():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the moment to interrupt it never came"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(
        "align: interrupted; the same command resumes: python -m align +recipe=dpo"
    )
    assert looks_complete(tmp_path / "run") == []
    _, errors = finished(capsys, arguments)
    assert "dpo: going on from step" in errors
    assert read_manifest(tmp_path / "run/dpo").steps == 120
