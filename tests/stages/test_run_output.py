"""What a run says and leaves: our own lines only, every figure in its place, and no secret."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.errors import UserError
from align.tracking.local import read_metrics
from tests.stages.runs import overrides, run
from tests.tracking.wandb_file import read_runs

REPO = Path(__file__).resolve().parents[2]
KEY = "0123456789abcdef" * 3
SAID = re.compile(r"(align|sft|dpo|evaluate|reference)(:|  )")


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """`python -m align` with log=wandb and a key, as a user would start it."""
    folder = tmp_path_factory.mktemp("launched")
    line = overrides(folder, "run=[sft,dpo,evaluate]", "stages.evaluate.max_prompts=2", "log=wandb", "log.mode=offline")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HF_", "TOKENIZERS"))}
    done = subprocess.run(
        [sys.executable, "-m", "align", *line],
        cwd=REPO,
        env={**clean, "WANDB_API_KEY": KEY},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", done


def test_no_library_talks_over_the_run(launched):
    _, done = launched
    assert [line for line in done.stderr.splitlines() if not SAID.match(line)] == []
    assert done.stdout.startswith("\nsft_dpo: sft, dpo, evaluate complete in ")
    assert done.stdout.splitlines()[-1].startswith("next ")


def test_each_stage_has_one_first_and_one_last_progress_line(launched):
    _, done = launched
    lines = [line for line in done.stderr.splitlines() if line.startswith("sft  step")]
    assert lines[0].startswith("sft  step 1/3  loss ")
    assert re.fullmatch(r"sft  step 3/3  loss \d\.\d{4}  [\d,]+ tokens/s  took \d:\d\d", lines[-1])


def test_wandb_has_a_run_a_stage_in_one_group_with_before_and_after(launched):
    run_dir, _ = launched
    runs = {seen["job_type"]: seen for seen in read_runs(run_dir)}
    assert runs.keys() == {"sft", "dpo", "evaluate"}
    assert {seen["group"] for seen in runs.values()} == {"sft_dpo"}
    for stage in ("sft", "dpo"):
        seen = runs[stage]
        assert seen["id"] == (run_dir / stage / "wandb_id").read_text().strip()
        losses = [(row["train/global_step"], row["loss"]) for row in seen["rows"] if "loss" in row]
        logged = [line for line in read_metrics(run_dir / stage / "metrics.jsonl") if "loss" in line]
        assert losses == [(line["step"], line["loss"]) for line in logged]
        assert seen["summary"]["after/loss"] < seen["summary"]["before/loss"]
        assert seen["config"]["stages"][stage]["max_steps"] == 3
        assert {entry["name"] for entry in seen["config"]["inputs"]} >= {"policy"}
        assert all(entry["digest"] for entry in seen["config"]["inputs"])


def test_no_file_of_the_run_folder_holds_the_key(launched):
    run_dir, _ = launched
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


def test_stage_folders_hold_only_what_the_architecture_names(launched):
    run_dir, _ = launched
    trained = {"config.yaml", "started.json", "metrics.jsonl", "policy", "manifest.json", "wandb_id"}
    assert {path.name for path in (run_dir / "sft").iterdir()} == trained
    assert {path.name for path in (run_dir / "dpo").iterdir()} == trained
    assert {path.name for path in run_dir.iterdir()} == {"sft", "dpo", "evaluate", "wandb", "report.html"}


def test_every_logged_step_has_a_line_and_evaluations_have_theirs(tmp_path):
    run(tmp_path, "run=[sft]", "stages.sft.max_steps=6", "stages.sft.eval_every=3", "log.every=2")
    lines = read_metrics(tmp_path / "run/sft/metrics.jsonl")
    seen = [(line["step"], "eval_loss" if "eval_loss" in line else "loss") for line in lines]
    assert seen == [(0, "eval_loss"), (2, "loss"), (3, "eval_loss"), (4, "loss"), (6, "loss"), (6, "eval_loss")]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)


def test_an_evaluation_done_after_the_last_checkpoint_is_not_logged_twice(tmp_path, monkeypatch):
    from align.stages import training

    line = ("run=[sft]", "stages.sft.save_every=3", "log.every=1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "save_model", interrupt)
        run(tmp_path, *line)
    before = read_metrics(tmp_path / "run/sft/metrics.jsonl")
    assert [entry["step"] for entry in before] == [0, 1, 2, 3, 3]
    run(tmp_path, *line)
    after = read_metrics(tmp_path / "run/sft/metrics.jsonl")
    assert [entry["step"] for entry in after] == [0, 1, 2, 3, 3]
    assert after[-1]["eval_loss"] == before[-1]["eval_loss"]


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(tmp_path):
    line = ("run=[sft]", "stages.sft.learning_rate=1e25", "stages.sft.max_steps=9")
    with pytest.raises(UserError, match=r"sft: step \d: the loss .* not finite; .*Lower stages\.sft\.learning_rate"):
        run(tmp_path, *line)
    assert not list((tmp_path / "run" / "sft").rglob("*.safetensors"))
    lines = [line for line in read_metrics(tmp_path / "run/sft/metrics.jsonl") if "eval_loss" not in line]
    assert [line.get("skipped_steps", 0) for line in lines[-3:]] == [1, 1, 1] and len(lines) < 9
