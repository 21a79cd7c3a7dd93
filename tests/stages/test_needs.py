"""What a stage is said to take, against what autograd keeps while that stage really trains."""

import pytest

from align.chain import run_chain
from align.config.store import compose_run
from align.distributed import memory
from align.distributed.memory import FP32, GIB, Sharding, layer_bytes
from align.stages.longest import longest_rows, rows_of
from align.stages.needs import Setup, Target, needs
from align.stages.rows import load_template, tokenised
from align.trainers.out_of_memory import BatchNamingTrainer
from tests.distributed.test_memory import kept_by
from tests.launching import slow

PLAIN = Sharding(None, False, 1)
RUNS = {
    "sft packed": ("sft", 0, ["stages.sft.micro_batch_size=2", "stages.sft.max_tokens=200"]),
    "sft": ("sft", 0, ["stages.sft.packing=false", "stages.sft.micro_batch_size=4", "stages.sft.batch_size=8"]),
    "dpo": ("dpo", 4, ["stages.dpo.layout=forest", "stages.dpo.order=stratified"]),
    "dpo padded": ("dpo", 4, ["stages.dpo.layout=padded"]),
    "dpo checkpointed": ("dpo", 4, ["stages.dpo.layout=forest", "stages.dpo.activation_checkpointing=true"]),
    "reward": ("reward", 0, []),
    "dpo prompt": ("dpo", 4, ["peft=prompt"]),
    "dpo ia3": ("dpo", 4, ["peft=ia3", "stages.dpo.layout=forest"]),
}


@pytest.mark.parametrize(
    ("name", "logits", "settings"),
    [pytest.param(*run, id=name, marks=[] if name in ("sft", "dpo") else slow) for name, run in RUNS.items()],
)
def test_a_run_keeps_what_was_counted_and_its_longest_batch_comes_early(name, logits, settings, tmp_path, monkeypatch):
    recipe = {"sft": ["+recipe=sft"], "dpo": ["+recipe=dpo"], "reward": ["+recipe=reward"]}[name]
    more = [f"stages.{name}.max_steps=25", f"stages.{name}.save_every=0", "data.held_out_fraction=0"]
    config = compose_run([*recipe, *more, *settings, f"run_dir={tmp_path}/run", f"run=[{name}]"], None).config
    kept: list[int] = []
    # SFT's logits in tiles, of which nothing is kept.
    monkeypatch.setattr(memory, "WHOLE_LOGITS", 0)
    # Each trainer's own loss is the outermost of its class.
    for trainer in every_class(BatchNamingTrainer):
        if "compute_loss" in vars(trainer) and vars(trainer)["compute_loss"].__module__.startswith("align"):
            monkeypatch.setattr(trainer, "compute_loss", watched(vars(trainer)["compute_loss"], kept))
    run_chain(config)
    stage = getattr(config.stages, name)
    prepared = tokenised(config, name, load_template(config, stage.policy), lambda done, total: None)
    setup = Setup(config, name, rows_of(stage, prepared), Target(1, 8 * GIB, None, cuda=False, bf16=False))
    backward = needs(setup, PLAIN)["training"].moments["backward pass"]
    counted = backward["activations"]
    if stage.activation_checkpointing:
        counted -= layer_bytes(setup.policy(), setup.batch(), FP32)
    # Of the logits, DPO's loss keeps the logarithms of their softmax: 4 bytes for each.
    counted += logits * setup.batch().scored * setup.policy().vocabulary
    assert len(kept) >= 25
    assert counted == pytest.approx(max(kept), rel=0.15)
    early = kept[: 15 * (stage.batch_size // stage.micro_batch_size)]
    assert max(early) >= 0.97 * max(kept)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_are_counted_in_padded_rows(method):
    need, batch = {}, {}
    for count in (1, 101):
        words = ["+recipe=dpo", f"peft={method}", f"peft.virtual_tokens={count}"]
        config = compose_run(words, None).config
        rows = longest_rows(config.stages.dpo, "not known")
        setup = Setup(config, "dpo", rows, Target(1, 8 * GIB, None, cuda=False, bf16=False))
        batch[count] = setup.batch()
        need[count] = needs(setup, PLAIN)["training"].moments["backward pass"]["activations"]
    more = 100 * 2 * config.stages.dpo.micro_batch_size
    assert not batch[1].forest and need[101] > need[1]
    assert batch[101].tokens - batch[1].tokens == (more if method == "prompt" else 0)
    assert batch[101].cached - batch[1].cached == (more if method == "prefix" else 0)


def every_class(root: type) -> list[type]:
    return [root, *(found for child in root.__subclasses__() for found in every_class(child))]


def watched(compute_loss, kept: list[int]):
    """The loss with what autograd keeps of it noted, in training."""

    def compute(self, model, inputs, *args, **kwargs):
        if not model.training:
            return compute_loss(self, model, inputs, *args, **kwargs)
        with kept_by(model) as found:
            loss = compute_loss(self, model, inputs, *args, **kwargs)
        kept.append(found.bytes)
        return loss

    return compute


def test_watching_finds_every_trainer():
    names = {found.__name__ for found in every_class(BatchNamingTrainer)}
    assert {"TokenWeightedTrainer", "PairTrainer", "RewardTrainer"} <= names
