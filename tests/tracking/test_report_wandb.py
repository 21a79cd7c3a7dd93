"""The W&B Report: the payload that would be sent, and the sending of it to a stand-in for the server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from align.config.schema import LogConfig
from align.tracking.run_folder import read_run
from tests.conftest import REPO
from tests.tracking.runs_made import RUN_DIR, hand_run, policy_digest, write_dpo
from tests.tracking.wandb_server import ENTITY, KEY, PROJECT, StandIn

pytest.importorskip("wandb_workspaces", reason="needs wandb-workspaces (pip install 'align-train[reports]')")
import wandb_workspaces.reports.v2 as wr

from align.tracking.wandb_report import build_report, send_report, spec_of

LOG = LogConfig(project=PROJECT)


def logged(folder: Path, prefix: str = "id") -> Path:
    run = hand_run(folder)
    for stage in ("sft", "dpo", "evaluate"):
        (run / stage / "wandb_id").write_text(f"{prefix}{stage}\n")
    return run


def spec_for(*folders: Path) -> dict:
    """The spec, after a look at whether wandb-workspaces reads it back."""
    report = build_report(wr, LOG, [read_run(folder) for folder in folders], entity="")
    assert len(type(report)._from_model(report._to_model()).blocks) == len(report.blocks)
    return spec_of(report)


def sections(spec: dict) -> dict[str, list[dict]]:
    """Heading -> the blocks below it."""
    found: dict[str, list[dict]] = {"": []}
    for block in spec["spec"]["blocks"]:
        if block["type"] == "heading":
            found[block["children"][0]["text"]] = []
        else:
            found[list(found)[-1]].append(block)
    return found


def grid(blocks: list[dict]) -> tuple[dict, list[dict]]:
    (block,) = [block for block in blocks if block["type"] == "panel-grid"]
    (run_set,) = block["metadata"]["runSets"]
    return run_set, block["metadata"]["panelBankSectionConfig"]["panels"]


def test_a_report_says_the_verdict_first_and_has_every_part(tmp_path):
    spec = spec_for(logged(tmp_path / "run"))
    parts = sections(spec)
    assert list(parts) == ["", "Verdict", "Runs", "Figures", "sft", "dpo", "evaluate", "Rows", "Lineage", "Commands"]
    assert spec["displayName"] == "hand report"
    assert "helpful 25.0% → 87.5%" in parts["Verdict"][0]["children"][0]["text"]
    assert spec["description"] in parts["Verdict"][0]["children"][0]["text"]
    assert "| dpo | reward accuracy | 50.0% | 90.0% |" in parts["Figures"][0]["content"]
    assert "| sft | 1,200 | 1,000 | 50 | 149 too_long, 1 empty |" in parts["Rows"][0]["content"]
    assert policy_digest("sft")[:12] in json.dumps(parts["Lineage"])


def test_curves_are_of_these_runs_only_by_the_names_under_which_they_were_logged(tmp_path):
    parts = sections(spec_for(logged(tmp_path / "run")))
    run_set, panels = grid(parts["dpo"])
    assert "iddpo" in json.dumps(run_set["filters"]) and "idsft" not in json.dumps(run_set["filters"])
    plots = {panel["config"]["chartTitle"]: panel["config"] for panel in panels}
    assert plots["Loss"]["metrics"] == ["loss", "eval_loss"]
    assert plots["Loss"]["xAxis"] == "train/global_step"
    assert plots["Speed"]["metrics"] == ["tokens_per_second"]
    comparer = grid(parts["Runs"])[1]
    assert [panel["viewType"] for panel in comparer] == ["Run Comparer"]
    assert "replies/step_00000" in json.dumps(grid(parts["evaluate"])[1])


def test_several_runs_have_parallel_coordinates_over_what_differs(tmp_path):
    first, second = logged(tmp_path / "a", "a"), tmp_path / "b"
    write_dpo(second, settings={"seed": 7, "beta": 0.3, "policy": f"{RUN_DIR}/sft/policy"})
    (second / "dpo" / "wandb_id").write_text("bdpo")
    parts = sections(spec_for(first, second))
    _, panels = grid(parts["Runs"])
    assert [panel["viewType"] for panel in panels] == ["Run Comparer", "Parallel Coordinates Plot"]
    columns = json.dumps(panels[1]["config"])
    assert "stages.dpo.beta" in columns and "after/loss" in columns
    assert "| b | 0.9 | `0.3` |" in parts["Ranking"][0]["content"]
    assert "| `stages.dpo.beta` | `0.1` | `0.3` |" in parts["Settings that differ"][0]["content"]
    assert {"adpo", "bdpo"} <= set(json.dumps(grid(parts["dpo"])[0]["filters"]).replace('"', " ").split())


def test_runs_that_were_not_logged_have_tables_and_no_panels(tmp_path):
    parts = sections(spec_for(hand_run(tmp_path / "run")))
    assert list(parts) == ["", "Verdict", "Figures", "Rows", "Lineage", "Commands"]


def test_offline_the_spec_is_a_file_and_the_way_to_send_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = logged(tmp_path / "run")
    lines = send_report(LOG, [read_run(run)], run / "report.html")
    assert lines[-1].strip() == "log.mode=offline: not sent; the same command with log.mode=online sends it"
    spec = json.loads((run / "report.wandb_spec.json").read_text())
    assert spec == spec_for(run) | {"spec": spec["spec"]}
    assert not (run / "report.wandb_report.json").exists()


def report(run: Path, home: Path, url: str, **environment: str) -> str:
    """What the command prints in a process of its own: wandb reads keys and servers once a process."""
    lost = ("WANDB_MODE", "WANDB_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in lost}
    private = {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_BASE_URL": url}
    words = ["+recipe=sft_dpo", "do=report", f"run_dir={run}", "report.to=wandb", f"log.project={PROJECT}"]
    done = subprocess.run(
        [sys.executable, "-m", "align", *words],
        env={**kept, **private, **environment},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_report_is_made_once_and_updated_after_that(tmp_path):
    run = logged(tmp_path / "run")
    with StandIn() as server:
        first = report(run, tmp_path, server.url, WANDB_API_KEY=KEY)
        second = report(run, tmp_path, server.url, WANDB_API_KEY=KEY)
        assert server.refused == [] and server.elsewhere == []
    saved = [given for name, given in server.asked if name == "upsertView"]
    (view,) = server.views.values()
    assert [given.get("id") for given in saved] == [None, view["id"]]
    assert view["project"]["entityName"] == ENTITY and view["type"] == "runs"
    assert sections({"spec": json.loads(view["spec"])}).keys() == sections(spec_for(run)).keys()
    run_set, _ = grid(sections({"spec": json.loads(view["spec"])})["sft"])
    assert run_set["project"]["entityName"] == ENTITY
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert first.splitlines()[-1].endswith(view["id"]) and f"{server.url}/{ENTITY}/{PROJECT}/reports/" in first


def test_without_a_key_the_spec_is_written_and_the_run_is_not_failed(tmp_path):
    run = logged(tmp_path / "run")
    with StandIn() as server:
        said = report(run, tmp_path, server.url)
    assert "not sent: no API key for wandb on this machine" in said
    assert (run / "report.wandb_spec.json").is_file() and (run / "report.html").is_file()
    assert server.views == {}
