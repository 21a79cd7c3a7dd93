"""`-m`: every combination, each in a folder of its own, checked before the first runs."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from align import cli
from align.config import command_line
from align.config.errors import Pruned, UserError
from align.config.schema import RunConfig, Verb
from align.tracking.members import Member, State, read_member
from align.verbs import sweep
from tests.tracking.runs_made import write_dpo


@pytest.fixture
def members(monkeypatch, tmp_path):
    """The runs that a sweep started, instead of running them."""
    started = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", started.append)
    monkeypatch.setattr(sweep, "leave_comparison", lambda *_: ["nothing to compare"])
    return started


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(members, tmp_path):
    assert cli.main(["-m", "+recipe=sft", "peft=lora", "peft.r=4,8", "stages.sft.seed=1,2"]) == 0
    assert [(m.peft.r, m.stages.sft.seed) for m in members] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert members[0].run_dir == "runs/sft/peft.r=4,stages.sft.seed=1"
    assert len({m.run_dir for m in members}) == 4
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"member.json"}, "Hydra left files"


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


def trained(config: RunConfig, loss: float) -> None:
    """Leave what a DPO stage leaves, in place of what was there."""
    shutil.rmtree(f"{config.run_dir}/dpo", ignore_errors=True)
    settings = {"seed": 7, "beta": config.stages.dpo.beta, "policy": "tiny-sft"}
    write_dpo(Path(config.run_dir), settings=settings, metrics={"before/loss": 0.7, "after/loss": loss})


@pytest.fixture
def sweeping(monkeypatch, tmp_path):
    """Sweeps the beta of DPO with a function of it in place of training: returns its loss, or raises."""

    def start(loss_of, *arguments: str) -> int:
        monkeypatch.setattr(cli, "run", lambda config: config.do is Verb.train and trained(config, loss_of(config)))
        return cli.main(["-m", "+recipe=dpo", "run_dir=out", *arguments])

    monkeypatch.chdir(tmp_path)
    return start


def test_a_member_that_fails_does_not_stop_the_others(sweeping, capsys):
    def loss_of(config):
        if config.stages.dpo.beta == 0.1:
            raise UserError("out of luck")
        if config.stages.dpo.beta == 0.2:
            raise ValueError("a bug\nof two lines")
        return config.stages.dpo.beta

    assert sweeping(loss_of, "stages.dpo.beta=0.1,0.2,0.3,0.4") == 2
    found = capsys.readouterr()
    assert "2 failed: stages.dpo.beta=0.1; stages.dpo.beta=0.2" in found.err
    lines = found.out.splitlines()
    assert [line.split()[0] for line in lines[2:4]] == ["0.3", "0.4"]
    assert lines[4:6] == [
        "failed    stages.dpo.beta=0.1: out of luck", "failed    stages.dpo.beta=0.2: ValueError: a bug"
    ]  # fmt: skip
    page = Path("out/sweep_report.html").read_text()
    assert "failed    stages.dpo.beta=0.1: out of luck" in page


def test_a_sweep_ends_in_its_ranking_and_a_page(sweeping, capsys):
    def loss_of(config):
        return config.stages.dpo.beta

    assert sweeping(loss_of, "stages.dpo.beta=0.3,0.1") == 0
    said = capsys.readouterr().out.splitlines()
    header = ["dpo:", "held-out", "loss", "stages.dpo.beta", "trained", "memory", "time", "run"]
    assert said[1].split() == header
    assert [line.split()[0] for line in said[2:4]] == ["0.1", "0.3"]
    assert said[4] == "report   out/sweep_report.html"
    assert '<path class="way first"' in Path("out/sweep_report.html").read_text()
    assert sweeping(loss_of, "stages.dpo.beta=0.3,0.1", "do=plan") == 0
    assert "sweep_report" not in capsys.readouterr().out


def test_a_crash_of_the_command_leaves_a_member_that_is_not_done(sweeping, capsys):
    def loss_of(config):
        if config.stages.dpo.beta == 0.3:
            raise KeyboardInterrupt
        return config.stages.dpo.beta

    assert sweeping(loss_of, "stages.dpo.beta=0.1,0.3") == 130
    states = {member.name: member.state for member in found()}
    assert states == {"stages.dpo.beta=0.1": State.done, "stages.dpo.beta=0.3": State.running}
    assert sweeping(lambda config: config.stages.dpo.beta, "stages.dpo.beta=0.1,0.3") == 0
    assert all(member.state is State.done for member in found())


def found() -> list[Member]:
    return [read_member(path.parent) for path in sorted(Path("out").glob("*/member.json"))]


SEARCH = ("hydra/sweeper=optuna", "hydra.sweeper.n_trials=8", "stages.dpo.beta=interval(0.01,1.0)")


def test_a_search_finds_the_lowest_loss_and_repeats_itself(sweeping, capsys):
    asked = []

    def loss_of(config):
        asked.append(config.stages.dpo.beta)
        return (config.stages.dpo.beta - 0.3) ** 2

    learns = (*SEARCH, "hydra.sweeper.sampler.n_startup_trials=3")
    assert sweeping(loss_of, "sweep.by=loss", *learns) == 0
    before, after = ([abs(beta - 0.3) for beta in part] for part in (asked[:3], asked[3:]))
    assert sum(after) / len(after) < sum(before) / len(before), "it learns from what members got"
    first = [(member.name, member.figure) for member in found()]
    assert len(first) == 8
    best = float(min(first, key=lambda one: one[1])[0].split("=")[1])
    assert best == pytest.approx(float(capsys.readouterr().out.splitlines()[2].split()[1]), rel=1e-3)
    # The same command asks for the same members, so that one that was interrupted goes on.
    assert sweeping(loss_of, "sweep.by=loss", *learns) == 0
    assert [(member.name, member.figure) for member in found()] == first


def test_a_search_goes_on_after_failures_and_pruned_members(sweeping, capsys):
    asked = []

    def loss_of(config):
        asked.append(config.stages.dpo.beta)
        if len(asked) == 1:
            raise UserError("out of luck")
        if len(asked) == 2:
            raise Pruned("dpo: pruned at step 4: worse", 0.9)
        return config.stages.dpo.beta

    prune = ("stages.dpo.prune=true", "stages.dpo.eval_every=2")
    assert sweeping(loss_of, "sweep.by=loss", *SEARCH, *prune) == 2
    assert len(asked) == 8
    by_state = Counter(member.state for member in found())
    assert by_state == {State.done: 6, State.failed: 1, State.pruned: 1}
    # What pruned it is what the search is for, so the search learns of it.
    assert [member.figure for member in found() if member.state is State.pruned] == [0.9]
    # It is not trained on by the same command.
    assert sweeping(loss_of, "sweep.by=loss", *SEARCH, *prune) == 0
    assert Counter(member.state for member in found()) == {State.done: 7, State.pruned: 1}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (SEARCH, "name the figure to search by: sweep.by= one of win_rate, helpful"),
        (("hydra/sweeper=optuna", "sweep.by=loss"), "nothing to choose; give ranges"),
        (("hydra/sweeper=optunna", *SEARCH[1:]), "hydra/sweeper=optunna: no such option; did you mean optuna?"),
        ((*SEARCH, "sweep.by=loss", "hydra.sweeper.n_trails=2"), "hydra.sweeper.n_trails is no setting of hydra/sw"),
        (("hydra.launcher.nodes=2", "stages.dpo.beta=0.1,0.2"), "no setting of hydra/launcher=basic"),
        (("sweep.prune_after=2", "stages.dpo.beta=0.1,0.2"), "no stage prunes; add stages.dpo.prune=true"),
        (("stages.dpo.prune=true", "stages.dpo.beta=0.1,0.2"), "add stages.dpo.eval_every=50"),
        (("sweep.by=best", "stages.dpo.beta=0.1,0.2"), "sweep.by=best: not a choice"),
        (("sweep.by=helpful", "stages.dpo.beta=interval(0,1)"), "let a search choose them: hydra/sweeper=optuna"),
    ],
)
def test_what_a_sweep_cannot_do_is_said_in_one_line(sweeping, capsys, arguments, says):
    assert sweeping(lambda config: 0.0, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and len(error.strip().splitlines()) == 1
    assert not Path("out").exists()


def test_the_configuration_of_several_runs_is_not_shown_by_running_them(sweeping, capsys):
    assert sweeping(lambda config: 0.1, "stages.dpo.beta=0.1,0.2", "--cfg", "job") == 2
    assert "--cfg shows the configuration of one run" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_search_needs_one_process(sweeping, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sweeping(lambda config: 0.0, "sweep.by=loss", *SEARCH) == 2
    assert "runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["sweep.by=loss", "stages.dpo.prune=true"])
def test_what_only_sweeps_read_is_refused_in_a_run(capsys, key):
    assert cli.main(["+recipe=dpo", key]) == 2
    assert f"{key} would have no effect: only sweeps (-m) read it" in capsys.readouterr().err


def test_the_command_of_a_member_is_that_of_a_run(sweeping):
    typed = []

    def loss_of(config):
        typed.append(command_line.typed())
        return 0.1

    assert sweeping(loss_of, "stages.dpo.beta=0.1,0.2", "sweep.by=loss") == 0
    assert typed[0] == "python -m align +recipe=dpo stages.dpo.beta=0.1 'run_dir='\"'\"'out/stages.dpo.beta=0.1'\"'\"''"


def test_a_job_that_was_killed_is_said_and_what_to_do(sweeping, capsys, monkeypatch):
    def killed(*_):
        raise RuntimeError("Job 41 (task: 0) with path x has not produced any output (state: OUT_OF_MEMORY)\nmore")

    monkeypatch.setattr(sweep.sweeps, "run_sweep", killed)
    assert sweeping(lambda config: 0.1, "hydra/launcher=submitit_local", "stages.dpo.beta=0.1,0.2") == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert "state: OUT_OF_MEMORY)), the others go on" in line and "type the same command" in line


def test_tasks_of_a_slurm_job_are_ranks(monkeypatch):
    class Job:
        global_rank, local_rank, num_tasks, num_nodes, hostnames = 3, 1, 4, 2, ["first", "second"]

    monkeypatch.setattr("submitit.JobEnvironment", Job)
    kept = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "20041"}
    monkeypatch.setattr(os, "environ", kept)
    sweep.join_ranks()
    added = {name: value for name, value in kept.items() if not name.startswith(("S", "s"))}
    assert added == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "first",
        "MASTER_PORT": "20041",
    }  # fmt: skip
