"""`-m`: every combination, each in a folder of its own, checked before the first runs."""

from pathlib import Path

import pytest

from align import cli
from align.config.errors import UserError
from align.config.schema import Verb
from tests.tracking.runs_made import write_dpo


@pytest.fixture
def members(monkeypatch, tmp_path):
    """The runs that a sweep started, instead of running them."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", started.append)
    return started


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(members, tmp_path):
    assert cli.main(["-m", "+recipe=sft", "peft=lora", "peft.r=4,8", "stages.sft.seed=1,2"]) == 0
    assert [(m.peft.r, m.stages.sft.seed) for m in members] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert members[0].run_dir == "runs/sft/peft.r=4,stages.sft.seed=1"
    assert len({m.run_dir for m in members}) == 4
    assert list(tmp_path.iterdir()) == [], "Hydra left files"


def test_a_members_wires_lie_in_its_own_folder(members):
    assert cli.main(["-m", "+recipe=sft_dpo", "run_dir=out", "stages.dpo.beta=0.1,0.2"]) == 0
    assert [m.stages.dpo.policy for m in members] == [
        "out/stages.dpo.beta=0.1/sft/policy",
        "out/stages.dpo.beta=0.2/sft/policy",
    ]


def test_a_swept_path_makes_no_folders_within_folders(members):
    assert cli.main(["-m", "+recipe=sft", "model.path=tiny-base,/models/b"]) == 0
    assert [m.run_dir for m in members] == ["runs/sft/model.path=tiny-base", "runs/sft/model.path=_models_b"]
    assert members[0].stages.sft.learning_rate > members[1].stages.sft.learning_rate


def test_recipes_can_be_swept(members):
    assert cli.main(["-m", "+recipe=sft,dpo"]) == 0
    assert [m.name for m in members] == ["sft", "dpo"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["peft=lora", "peft.r=4,x"], "peft.r=x: a whole number was expected"),
        (["peft=lora", "peft.r=4,0"], "must be 1 or more"),
        (["peft=lora,lroa"], "did you mean lora?"),
        (["peft.r=4,8"], "add peft=lora"),
        (["stages.sft.betta=1,2"], "is not a key"),
        (["peft=lora", "peft.dropout=interval(0,1)"], "name the values"),
    ],
)
def test_a_sweep_with_one_bad_member_runs_none(members, capsys, arguments, says):
    assert cli.main(["-m", "+recipe=sft", *arguments]) == 2
    assert says in capsys.readouterr().err
    assert members == []


def test_a_member_that_fails_does_not_stop_the_others(monkeypatch, tmp_path, capsys):
    started = []

    def run(config):
        started.append(config.peft.r)
        if config.peft.r == 4:
            raise UserError("out of luck")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["-m", "+recipe=sft", "peft=lora", "peft.r=4,8"]) == 2
    assert started == [4, 8]
    assert "1 failed: peft.r=4" in capsys.readouterr().err


def test_a_sweep_ends_in_its_ranking_and_a_page(monkeypatch, tmp_path, capsys):
    def run(config):
        if config.do is not Verb.train:
            return
        folder = Path(config.run_dir)
        settings = {"seed": 7, "beta": config.stages.dpo.beta, "policy": "tiny-sft"}
        write_dpo(folder, settings=settings, metrics={"before/loss": 0.7, "after/loss": config.stages.dpo.beta})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", run)
    assert cli.main(["-m", "+recipe=dpo", "run_dir=out", "stages.dpo.beta=0.3,0.1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["dpo:", "held-out", "loss", "stages.dpo.beta", "run"]
    assert [line.split()[0] for line in said[2:4]] == ["0.1", "0.3"]
    assert said[4] == "report   out/sweep_report.html"
    assert '<path class="way first"' in (tmp_path / "out/sweep_report.html").read_text()
    capsys.readouterr()
    assert cli.main(["-m", "+recipe=dpo", "run_dir=out", "stages.dpo.beta=0.3,0.1", "do=plan"]) == 0
    assert "sweep_report" not in capsys.readouterr().out
