"""keep_best: the policy is that of the evaluation with the lowest held-out loss, also of a run that was interrupted."""

import json

import pytest
import torch
from safetensors.torch import load_file

from align.artifacts import read_manifest
from align.chain import run_chain
from align.cli import main
from align.config.errors import UserError
from align.config.store import compose_run
from align.stages import training
from align.tracking.local import read_metrics
from align.trainers import sft
from tests.stages.runs import overrides

BEST = 4
WORSENS = (
    "run=[sft]", "stages.sft.max_steps=10", "stages.sft.eval_every=2", "stages.sft.save_every=5",
    "stages.sft.keep_best=true",
)  # fmt: skip


@pytest.fixture(autouse=True)
def worsens(monkeypatch):
    """Held-out losses of the third evaluation after the first step and of later ones are too high."""
    real, calls = sft.token_means, []

    def token_means(prediction):
        calls.append(prediction)
        found = real(prediction)
        return found | {"loss": found["loss"] + (100 if len(calls) > 3 else 0)}

    monkeypatch.setattr(sft, "token_means", token_means)


def judged(stage_dir) -> dict[int, float]:
    return {
        line["step"]: line["eval_loss"] for line in read_metrics(stage_dir / "metrics.jsonl") if "eval_loss" in line
    }


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_the_policy_is_that_of_the_best_evaluation(peft, tmp_path, capsys, monkeypatch):
    kept, last = {}, {}
    take_best = training._take_best

    def remember(session, trainer):
        checkpoint = trainer.state.best_model_checkpoint
        name = "model" if peft == "none" else "adapter_model"
        kept.update(load_file(f"{checkpoint}/{name}.safetensors"))
        last.update(load_file(session.checkpoint_dir / f"checkpoint-10/{name}.safetensors"))
        take_best(session, trainer)

    monkeypatch.setattr(training, "_take_best", remember)
    assert main(overrides(tmp_path, *WORSENS, f"peft={peft}")) == 0
    stage_dir = tmp_path / "run/sft"
    losses = judged(stage_dir)
    trained = {step: loss for step, loss in losses.items() if step}
    assert min(trained, key=trained.get) == BEST
    assert f"sft: the policy is that of step {BEST}, where the held-out loss was lowest" in capsys.readouterr().err
    figures = read_manifest(stage_dir).metrics
    assert figures["kept_step"] == BEST
    assert figures["after/loss"] == pytest.approx(trained[BEST], abs=1e-3)
    folder = "policy/model" if peft == "none" else "adapter/adapter_model"
    saved = load_file(stage_dir / f"{folder}.safetensors")
    assert saved.keys() <= kept.keys() and all(torch.equal(saved[name], kept[name]) for name in saved)
    assert not any(torch.equal(kept[name], last[name]) for name in saved if "weight" in name)


def test_it_needs_held_out_rows_and_evaluations(tmp_path):
    with pytest.raises(UserError, match=r"stages\.sft\.keep_best=true: no row is held out to judge by"):
        arguments = [one for one in overrides(tmp_path, *WORSENS) if "held_out_fraction" not in one]
        run_chain(compose_run([*arguments, "data.held_out_fraction=0"]).config)
    with pytest.raises(UserError, match=r"keep_best.*nothing is judged between .* add stages.sft.eval_every=50"):
        compose_run(overrides(tmp_path, "run=[sft]", "stages.sft.keep_best=true"))


def test_the_best_checkpoint_outlives_newer_ones_and_two_of_those_stay(tmp_path, monkeypatch):
    seen = []
    take_best = training._take_best

    def look(session, trainer):
        seen.extend(sorted(int(path.name.split("-")[1]) for path in session.checkpoint_dir.glob("checkpoint-*")))
        seen.append(
            json.loads((session.checkpoint_dir / "checkpoint-10/trainer_state.json").read_text())["best_global_step"]
        )
        take_best(session, trainer)

    monkeypatch.setattr(training, "_take_best", look)
    every = [one for one in WORSENS if "save_every" not in one]
    assert main(overrides(tmp_path, *every, "stages.sft.save_every=1")) == 0
    assert seen == [BEST, 9, 10, BEST]
