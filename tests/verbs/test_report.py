"""`do=report`, and what a chain leaves by itself: its page, its cards, its artifacts."""

import json
from pathlib import Path

import pytest
import yaml

from align import cli
from align.artifacts import digest_model, read_manifest
from align.config.errors import UserError
from align.config.store import compose_run
from align.tracking.lineage import lineage, tree_text
from align.tracking.run_folder import read_run
from align.verbs.report import page_path, run_folders
from tests.chain.runs import finish
from tests.tracking.runs_made import hand_run
from tests.tracking.wandb_file import read_runs

CHAIN = [
    "+recipe=sft_dpo", "run=[sft,dpo]", "stages.sft.max_steps=2", "stages.dpo.max_steps=2", "run_dir=out/run",
    "data.demonstrations=rows.jsonl", "data.preferences=pairs.jsonl", "log=wandb", "log.mode=offline",
]  # fmt: skip


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with a real chain in out/run, and what it printed."""
    folder = tmp_path_factory.mktemp("chain")
    asked = [{"role": "user", "content": f"Where is house {number}?"} for number in range(60)]
    answers = [{"role": "assistant", "content": f"At the mill, number {number}."} for number in range(60)]
    refused = {"role": "assistant", "content": "Who knows?"}
    rows = [{"messages": list(turns)} for turns in zip(asked, answers, strict=True)]
    pairs = [
        {"prompt": [ask], "chosen": [answer], "rejected": [refused]} for ask, answer in zip(asked, answers, strict=True)
    ]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        # Left by a run of another test in this process: its service would write the files, into a folder of its own.
        patch.delenv("WANDB_SERVICE", raising=False)
        return folder, finish(folder, *CHAIN)


def test_a_chain_leaves_its_page_and_says_where(chain):
    folder, output = chain
    page = (folder / "out" / "run" / "report.html").read_text()
    assert "report   out/run/report.html" in output
    assert "python -m align +recipe=sft_dpo" in page and "stages.dpo.max_steps=2" in page


def test_a_real_chain_is_followed_back_to_its_base_by_digests(chain):
    folder, _ = chain
    run = read_run(folder / "out" / "run")
    lines = tree_text(lineage(run)).split("\n")
    assert [line.lstrip("├─└│ ").split("  ")[0] for line in lines] == [
        "dpo/policy",
        "policy: sft/policy",
        "policy: tiny-base",
        "data.demonstrations: rows.jsonl",
        "data.preferences: pairs.jsonl",
    ]
    assert digest_model(run.folder / "dpo" / "policy").startswith(lines[0].split("  ")[1])


def test_the_cards_are_signed_for_and_stand_beside_the_weights(chain):
    folder, _ = chain
    for stage in ("sft", "dpo"):
        manifest = read_manifest(folder / "out" / "run" / stage)
        assert "policy/README.md" in {output["path"] for output in manifest.outputs}
        card = (folder / "out" / "run" / stage / "policy" / "README.md").read_text()
        assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
        assert f"| held-out loss | {manifest.metrics['before/loss']:.3f} |" in card
        assert str(folder) not in card and "out/run" not in card


def test_in_wandb_dpo_takes_in_the_model_that_sft_has_logged(chain):
    folder, _ = chain
    sft, dpo = sorted(read_runs(folder / "out" / "run"), key=lambda seen: seen["job_type"], reverse=True)
    (made,) = [one["name"] for one in sft["artifacts"] if one["type"] == "model"]
    (taken,) = [entry for entry in dpo["config"]["inputs"] if entry["name"] == "policy"]
    assert made == f"model-{taken['digest'][:12]}"


def test_the_verb_makes_the_page_again_and_prints_the_tree(chain, monkeypatch, capsys):
    folder, _ = chain
    monkeypatch.chdir(folder)
    page = Path("out/run/report.html")
    before = page.read_text()
    page.unlink()
    assert cli.main([*CHAIN, "do=report"]) == 0
    assert page.read_text() == before
    printed = capsys.readouterr().out
    assert "├─ policy: sft/policy" in printed and printed.endswith("report   out/run/report.html\n")


def config(*words: str):
    return compose_run(["+recipe=sft_dpo", "do=report", *words]).config


def test_several_runs_are_compared_beside_the_first(tmp_path, capsys):
    for name in ("a", "b"):
        hand_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "notes").mkdir()
    assert cli.main(["+recipe=sft_dpo", "do=report", f"report.runs=['{tmp_path}/sweep/*']"]) == 0
    output = capsys.readouterr()
    assert output.out.endswith(f"report   {tmp_path}/sweep/report.html\n") and output.out.count("dpo/policy") == 2
    assert "left out: notes" in output.err + output.out
    assert "2 runs compared" in (tmp_path / "sweep" / "report.html").read_text()
    assert not (tmp_path / "sweep" / "a" / "report.html").exists()


def test_runs_come_in_the_order_in_which_they_are_named_each_once(tmp_path):
    a, b = hand_run(tmp_path / "a"), hand_run(tmp_path / "b")
    assert run_folders(config(f"report.runs=['{b}','{tmp_path}/*']")) == [b, a]
    assert run_folders(config(f"run_dir={a}")) == [a]


def test_the_page_may_go_elsewhere_if_it_is_a_page(tmp_path):
    run = read_run(hand_run(tmp_path / "run"))
    assert page_path(config(f"out={tmp_path}/deep/mine.html"), [run]) == tmp_path / "deep" / "mine.html"
    with pytest.raises(UserError, match=r"name it mine\.html"):
        page_path(config(f"out={tmp_path}/mine.pdf"), [run])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["do=report", "report.runs=[nowhere]"], "report.runs: nowhere: no such folder"),
        (["do=report", "run_dir=nowhere"], "run_dir: nowhere: no such folder; run the chain first"),
        (["report.to=wandb"], "report.to would have no effect: only do=report reads it"),
        (["do=report", "log.project=x"], "log.project would have no effect: nothing is sent to wandb"),
        (["log.upload_models=true"], "log.upload_models would have no effect"),
    ],
)
def test_what_cannot_be_reported_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["+recipe=sft_dpo", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_manifest_of_another_version_is_refused_in_one_line(tmp_path, capsys):
    run = hand_run(tmp_path / "run")
    path = run / "sft" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    assert cli.main(["+recipe=sft_dpo", "do=report", f"run_dir={run}"]) == 2
    assert "schema version 99" in capsys.readouterr().err
