"""SIGTERM and SIGUSR1: saved, exit code 0, and the same command ends in the same weights."""

import os
import signal
from pathlib import Path

import pytest

from align.artifacts import read_manifest
from align.chain import run_chain
from align.cli import main
from align.config.errors import Stopped
from align.config.store import compose_run
from align.stages import training
from align.tracking.local import MetricsLog, read_metrics
from align.trainers.experience import ExperienceMaker
from align.trainers.ppo import PPOTrainer
from align.trainers.sft import TokenWeightedTrainer
from align.trainers.stopping import StopSignal
from align.trainers.surviving import SurvivingTrainer
from tests.chain.test_ppo_resume import PPO, digests, figures, run_folder
from tests.stages.runs import overrides

SFT = ("run=[sft]", "stages.sft.max_steps=6", "stages.sft.eval_every=2", "stages.sft.save_every=100")


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(overrides(folder, *SFT)) == 0
    return folder / "run/sft"


def policy(stage_dir: Path) -> str:
    outputs = read_manifest(stage_dir).outputs
    return next(one["sha256"] for one in outputs if one["path"] == "policy/model.safetensors")


def kinds(stage_dir: Path) -> list[tuple[int, str]]:
    lines = read_metrics(stage_dir / "metrics.jsonl")
    return [(line["step"], "eval" if "eval_loss" in line else "train") for line in lines]


def at_step(step: int, number: signal.Signals, kind: str = "loss"):
    write = MetricsLog.write

    def patched(self, at, metrics):
        write(self, at, metrics)
        if at == step and kind in metrics:
            tell(number)

    return MetricsLog, "write", patched


def in_the_middle_of_judging(step: int):
    real = TokenWeightedTrainer.prediction_step

    def patched(self, *args, **kwargs):
        if self.state.global_step == step:
            tell()
        return real(self, *args, **kwargs)

    return TokenWeightedTrainer, "prediction_step", patched


def while_saving():
    """Told once before the save and twice more in it."""
    save = SurvivingTrainer._save_checkpoint

    def patched(self, *args, **kwargs):
        tell()
        tell(signal.SIGUSR1)
        save(self, *args, **kwargs)
        tell()

    return SurvivingTrainer, "_save_checkpoint", patched


MOMENTS = {
    "between steps": ([at_step(3, signal.SIGTERM)], "stopped by SIGTERM and saved at step 4", 4),
    "by SIGUSR1": ([at_step(3, signal.SIGUSR1)], "stopped by SIGUSR1 and saved at step 4", 4),
    "again while saving": ([at_step(3, signal.SIGTERM), while_saving()], "and saved at step 4", 4),
    "before the first step": ([in_the_middle_of_judging(0)], "while judging held-out rows at step 0", None),
    "while judging": ([in_the_middle_of_judging(4)], "stopped by SIGTERM and saved at step 4", 4),
    "while judging for the last time": ([in_the_middle_of_judging(6)], "saved at step 6", 6),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stage_that_was_told_to_stop_ends_as_if_it_never_was(moment, uninterrupted, tmp_path, monkeypatch, capsys):
    patches, words, step = MOMENTS[moment]
    arguments, stage_dir = overrides(tmp_path, *SFT), tmp_path / "run/sft"
    with monkeypatch.context() as patch:
        for one in patches:
            patch.setattr(*one)
        assert main(arguments) == 0
    error = capsys.readouterr().err
    assert words in error and "the same command goes on: python -m align +recipe=sft_dpo" in error
    assert read_manifest(stage_dir) is None and not (stage_dir / "policy").exists()
    saved = [path.name for path in stage_dir.glob("checkpoints/checkpoint-*")]
    assert saved == ([] if step is None else [f"checkpoint-{step}"])
    assert main(arguments) == 0
    assert (f"going on from step {step}" in capsys.readouterr().err) == (step is not None)
    assert policy(stage_dir) == policy(uninterrupted)
    assert sorted(kinds(stage_dir)) == sorted(kinds(uninterrupted))
    assert read_manifest(stage_dir).metrics == read_manifest(uninterrupted).metrics


def test_a_stage_after_the_stopped_one_is_not_begun_and_signals_are_given_back(tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(*at_step(1, signal.SIGTERM))
    with pytest.raises(Stopped, match="sft: stopped by SIGTERM"):
        run_chain(compose_run(overrides(tmp_path, "run=[sft,dpo]")).config)
    assert not (tmp_path / "run/dpo").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_while_the_policy_is_saved_it_ends_at_once_and_leaves_no_policy(tmp_path, monkeypatch):
    arguments = overrides(tmp_path, "run=[sft]")
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="stopped by SIGTERM"):
        patch.setattr(training, "save_model", lambda *_: tell())
        run_chain(compose_run(arguments).config)
    assert not (tmp_path / "run/sft/policy").exists()


def test_a_signal_that_is_held_is_noted_and_a_second_one_outside_does_not_break_the_end():
    stop = StopSignal()
    with stop.caught():
        with pytest.raises(Stopped, match="SIGUSR1"):
            with stop.held():
                assert stop.agreed() is None
                tell(signal.SIGUSR1)
                assert stop.agreed() == "SIGUSR1"
        tell(signal.SIGTERM)
    with stop.caught():
        assert stop.agreed() is None
        with pytest.raises(Stopped, match="SIGTERM"):
            tell()
        tell()


PPO_COMMAND = ("+recipe=ppo", "precision=fp32", *(f"stages.ppo.{key}={value}" for key, value in PPO.items()))


def ppo(folder: Path) -> list[str]:
    return [*PPO_COMMAND, f"run_dir={folder / 'runs/ppo'}", f"cache_dir={folder / 'cache'}"]


@pytest.mark.timeout(300)
def test_ppo_stops_at_the_end_of_an_update_or_after_a_rollout(tmp_path_factory, monkeypatch, capsys):
    whole, folder = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("stopped")
    expected, stage_dir = run_folder(whole), run_folder(folder)
    monkeypatch.syspath_prepend(str(whole))
    assert main([*ppo(whole)]) == 0
    make, note = ExperienceMaker.make, PPOTrainer._note

    def in_rollout(of: int):
        def told(self, update):
            if update == of:
                tell()
            return make(self, update)

        return ExperienceMaker, "make", told

    def in_update(self, *args):
        if self.state.global_step == 9:
            tell(signal.SIGUSR1)
        note(self, *args)

    for patch, words in (
        (in_rollout(1), "ppo: stopped by SIGTERM and saved at step 4"),
        (in_rollout(1), "ppo: stopped by SIGTERM in the first rollout"),
        ((PPOTrainer, "_note", in_update), "ppo: stopped by SIGUSR1 and saved at step 12"),
    ):
        with monkeypatch.context() as context:
            context.setattr(*patch)
            assert main(ppo(folder)) == 0
        assert words in capsys.readouterr().err
        assert not (stage_dir / "policy").exists()
    assert main(ppo(folder)) == 0
    assert "going on from step 12" in capsys.readouterr().err
    assert figures(stage_dir) == figures(expected)
    assert digests(stage_dir) == digests(expected)
