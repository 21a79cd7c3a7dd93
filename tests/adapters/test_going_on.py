"""A run that was broken off goes on as if it had not been; the best checkpoint is taken whole."""

import pytest
import torch
from safetensors.torch import load_file

from align.trainers.adapters import STATE
from tests.launching import slow
from tests.stages.runs import run

SHORT = ("run=[sft]", "stages.sft.learning_rate=1e-2", "stages.sft.max_steps=8", "stages.sft.save_every=3")
UNPACKED = ("stages.sft.packing=false", "stages.sft.batch_size=8", "stages.sft.micro_batch_size=8")
METHODS = {
    "adalora": ("peft.r=6", "peft.final_r=2"),
    "ptuning": UNPACKED,
    "bottleneck": (),
    "prefix": UNPACKED,
    "ia3": (),
}


def broken_off(folder, words, monkeypatch) -> None:
    """The same command, that dies after its fourth step."""
    from align.trainers.adapters import AdapterCallbacks

    def die(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterCallbacks, "on_step_end", die, raising=False)
        with pytest.raises(RuntimeError, match="killed"):
            run(folder, *words)


@slow
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_goes_on_from_its_checkpoint_bit_for_bit(method, tmp_path, monkeypatch):
    words = (*SHORT, f"peft={method}", *METHODS[method])
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    run(tmp_path / "whole", *words)
    broken_off(tmp_path / "broken", words, monkeypatch)
    assert list((tmp_path / "broken/run/sft/checkpoints").glob(f"checkpoint-*/{STATE}"))
    run(tmp_path / "broken", *words)
    one, other = (
        load_file(tmp_path / name / "run/sft/adapter/adapter_model.safetensors") for name in ("whole", "broken")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@slow
@pytest.mark.parametrize("method", ["ptuning", "adalora"])
def test_the_best_checkpoint_is_taken_whole(method, tmp_path):
    words = ("stages.sft.eval_every=2", "stages.sft.save_every=2", "stages.sft.keep_best=true")
    (manifest,) = run(tmp_path, *SHORT[:2], "stages.sft.max_steps=6", f"peft={method}", *METHODS[method], *words)
    assert manifest.metrics["after/loss"] < manifest.metrics["before/loss"]
