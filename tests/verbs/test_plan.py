"""`do=plan` of training: what it tells of models that are not there, of rows that are, and what it refuses."""

import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from align.cli import main
from align.config.errors import UserError
from align.config.schema import DeepSpeedConfig, Offload, ZeroChoice
from align.config.store import compose_run
from align.distributed.memory import GIB, Sharding
from align.distributed.zero import choose
from align.stages.longest import longest_rows
from align.stages.needs import Setup, Target, worst
from align.stages.sharding import choose_sharding, overrides_that_fit, refuse_too_large
from tests.conftest import REPO

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


def config_only(folder: Path, shape: dict[str, int]) -> Path:
    """A model folder with nothing in it but config.json."""
    LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: config_only(folder / name, shape) for name, shape in (("8b", LLAMA_8B), ("70b", LLAMA_70B))}


@pytest.fixture
def plan(capsys, tmp_path) -> Callable[..., str]:
    """A function that runs `do=plan` and returns what it prints."""

    def run(*overrides: str) -> str:
        code = main(["do=plan", f"run_dir={tmp_path}/run", *overrides])
        found = capsys.readouterr()
        assert code == 0, found.err
        assert not (tmp_path / "run").exists(), "a plan writes nothing"
        return found.out

    return run


def files(stage: str, *more: str) -> list[str]:
    slot = {"dpo": "preferences", "sft": "demonstrations", "reward": "preferences", "ppo": "prompts"}[stage]
    return [f"+recipe={stage}", "data=files", f"data.{slot}=there_is_none.jsonl", *more]


def on(gpus: int, gib: float) -> list[str]:
    return [f"plan.gpus={gpus}", f"plan.gpu_memory_gib={gib}"]


def table(text: str) -> dict[str, list[float]]:
    """Option -> its numbers, in the order of the columns."""
    rows = re.findall(r"^[> ] (none|zero\d\w*) +((?:-?[\d,.]+ +)+)", text, re.MULTILINE)
    return {name: [float(number.replace(",", "")) for number in numbers.split()] for name, numbers in rows}


def test_a_70b_model_is_planned_from_its_config_alone(plan, models):
    text = plan(*files("dpo", f"model.path={models['70b']}", "stages.dpo.batch_size=256"), *on(64, 80))
    assert "70,553,706,496 parameters, all trained" in text
    assert "machine  64 ranks, 80.0 GiB a GPU" in text and "bf16 (as plan.* says)" in text
    states = table(text)
    assert list(states) == ["none", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    # 2 + 2 + 12 bytes a parameter (arXiv:1910.02054), each part divided from stage 3, 2 and 1 on.
    each = 70_553_706_496 / GIB
    assert states["zero3"][:3] == pytest.approx([2 * each / 64, 2 * each / 64, 12 * each / 64], abs=0.05)
    assert states["zero1"][:3] == pytest.approx([2 * each, 2 * each, 12 * each / 64], abs=0.05)
    assert states["zero3"][-2] == pytest.approx(79 - states["zero3"][-1], abs=0.15)


def test_a_plan_of_a_70b_model_takes_under_ten_seconds_and_imports_no_more_than_it_needs(models, tmp_path):
    words = [*files("dpo", f"model.path={models['70b']}", f"run_dir={tmp_path}"), "do=plan", *on(8, 80)]
    code = (
        "import sys\nfrom align import cli\n"
        f"code = cli.main({words!r})\n"
        "extra = {'datasets', 'pandas', 'trl', 'deepspeed', 'wandb', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'imported {extra}' if extra else code)"
    )

    def seconds() -> float:
        """Of the processor, not the clock: other work on the machine is not ours."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0 and "this would fit" in done.stdout, done.stderr
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 10 for _ in range(3))


def test_real_rows_give_their_number_steps_and_longest_batch(plan):
    text = plan("+recipe=dpo", "stages.dpo.batch_size=16", "stages.dpo.micro_batch_size=4", "stages.dpo.epochs=2")
    rows = int(re.search(r"rows +([\d,]+) to train on, with their real lengths", text)[1].replace(",", ""))
    steps = 2 * -(-rows // 16)
    assert f"steps    {steps:,} in all" in text and f"{steps // 2:,} an epoch" in text
    assert "micro_batch_size 4 x accumulation 4 x ranks 1 = 16 trees a step" in text
    positions = int(re.search(r"micro-batch: ([\d,]+) positions \(forest\)", text)[1].replace(",", ""))
    assert 4 * 30 < positions < 2 * 4 * 256
    assert "deepspeed=auto -> none" in text


def test_a_whole_chain_is_planned_with_the_models_that_it_will_make(plan):
    text = plan("+recipe=rlhf")
    assert [line for line in text.splitlines() if line in ("sft", "reward", "ppo")] == ["sft", "reward", "ppo"]
    assert "value model: 976,128 parameters, all trained" in text
    assert "\n         reference: 976,000 parameters, read only" in text
    assert "evaluate: trains nothing" in text
    checkpoints = re.search(r"sft: (\d+) checkpoints of ([\d.]+) MiB", text)
    # fp32 weights and two moments.
    assert float(checkpoints[2]) == pytest.approx(976_000 * 12 / 2**20, abs=0.1) and int(checkpoints[1]) == 3


def test_adapters_share_one_base_in_ppo(plan, models):
    text = plan(*files("ppo", f"model.path={models['8b']}", "peft=lora"), *on(8, 80))
    weights = table(text)["zero1"][0]
    assert weights == pytest.approx(2 * 8.03e9 / GIB, rel=0.02)
    assert "\n         reference:" not in text
    whole = table(plan(*files("ppo", f"model.path={models['8b']}"), *on(8, 80)))["zero1"]
    assert whole[0] == pytest.approx(2 * 2 * 7.8e9 / GIB, rel=0.03) and whole[3] == pytest.approx(whole[0], rel=0.03)


def test_what_does_not_fit_is_told_with_overrides_that_do(plan, models):
    text = plan(*files("dpo", f"model.path={models['70b']}"), *on(8, 80))
    assert "nothing fits" in text and "a run is refused" in text
    (line,) = (line for line in text.splitlines() if "this would fit" in line)
    ways = line.split("this would fit: ")[1].split(", or ")
    assert len(ways) == 3
    for way in ways:
        words = way.split()
        named = [word for word in words if word.startswith("deepspeed=")]
        changed = plan(*files("dpo", f"model.path={models['70b']}"), *on(8, 80), *words)
        took = named[0].removeprefix("deepspeed=") if named else re.search(r"^> (\w+)", changed, re.MULTILINE)[1]
        assert re.search(rf"^[> ] {took} .* fits", changed, re.MULTILINE), way


def test_gpus_without_their_memory_are_refused_where_there_is_none(capsys):
    assert main(["+recipe=sft", "do=plan", "plan.gpus=8"]) == 2
    assert "add plan.gpu_memory_gib=80" in capsys.readouterr().err


def test_a_batch_that_does_not_divide_is_refused(capsys):
    assert main(["+recipe=dpo", "do=plan", *on(7, 80)]) == 2
    assert "is no multiple of" in capsys.readouterr().err


def test_keys_of_a_plan_have_no_effect_elsewhere(capsys):
    assert main(["+recipe=sft", "plan.gpus=8"]) == 2
    assert "plan.gpus would have no effect: only do=plan reads it" in capsys.readouterr().err


# What deepspeed=auto takes.


def setup_of(models, model: str, stage: str, target: Target, *more: str) -> Setup:
    config = compose_run(files(stage, f"model.path={models[model]}", *more), None).config
    return Setup(config, stage, longest_rows(getattr(config.stages, stage), "none are there"), target)


def gpus(ranks: int, gib: float, host: float | None = None) -> Target:
    return Target(ranks, gib * GIB, host, cuda=True, bf16=True)


def test_auto_takes_the_least_sharding_that_fits(models):
    taken = {}
    for gib in (60, 48, 32):
        setup = setup_of(models, "8b", "sft", gpus(8, gib), "stages.sft.activation_checkpointing=true")
        choice = choose_sharding(setup)
        assert choice.fits
        taken[gib] = choice.sharding.stage
        # One stage less would not have left a tenth.
        before = Sharding(choice.sharding.stage - 1, False, 8)
        assert choice.sharding.stage == 1 or worst(setup, before).peak > 0.9 * (gib - 1) * GIB
    assert taken == {60: 1, 48: 2, 32: 3}


def test_auto_counts_activations_and_not_states_alone(models):
    small = setup_of(models, "8b", "dpo", gpus(8, 80), "stages.dpo.micro_batch_size=1")
    large = setup_of(models, "8b", "dpo", gpus(8, 80), "stages.dpo.micro_batch_size=4")
    assert choose_sharding(small).fits
    assert not choose_sharding(large).fits


def test_one_rank_shares_nothing_and_a_stage_asked_for_is_taken_as_it_is():
    def never(sharding: Sharding) -> float:
        raise AssertionError("only `auto` counts")

    for config, expected in (
        (DeepSpeedConfig(mode=ZeroChoice.none), Sharding(None, False, 8)),
        (DeepSpeedConfig(mode=ZeroChoice.zero, stage=3, offload=Offload.cpu), Sharding(3, True, 8)),
    ):
        choice = choose(config, ranks=8, memory=0.0, peak=never)
        assert choice.sharding == expected and choice.fits
    assert choose(DeepSpeedConfig(), ranks=1, memory=8 * GIB, peak=lambda _: GIB).sharding.stage is None


def test_what_only_just_fits_is_taken_where_nothing_fits_well():
    peaks = {1: 9.95, 2: 9.9, 3: 9.8}
    choice = choose(DeepSpeedConfig(), ranks=4, memory=11 * GIB, peak=lambda one: peaks[one.stage] * GIB)
    assert choice.sharding.stage == 1 and "may fit" in choice.reason


def test_auto_refuses_what_fits_nowhere_with_overrides_that_would(models):
    setup = setup_of(models, "70b", "dpo", gpus(8, 80))
    choice = choose_sharding(setup)
    with pytest.raises(UserError, match=r"dpo: takes about .* this would fit: .*, or .*, or ") as refused:
        refuse_too_large(setup, choice)
    assert "\n" not in str(refused.value)


def test_offload_is_offered_only_where_main_memory_takes_it(models):
    limit = 0.9 * 79 * GIB
    for host, offered in ((400 * GIB, True), (10 * GIB, False)):
        setup = setup_of(models, "70b", "dpo", gpus(8, 80, host))
        found = " ".join(overrides_that_fit(setup, choose_sharding(setup).sharding, limit))
        assert ("offload" in found) == offered


def test_nothing_is_offered_where_nothing_helps(models):
    setup = setup_of(models, "70b", "dpo", gpus(1, 2, 1.0))
    with pytest.raises(UserError, match="nothing here makes it fit; use more ranks"):
        refuse_too_large(setup, choose_sharding(setup))


def test_shorter_rows_are_offered_by_what_is_left_of_the_real_ones(plan, tmp_path):
    rows = [{"prompt": f"Say {n}.", "chosen": "yes " * n, "rejected": "no"} for n in range(1, 60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = ["+recipe=dpo", "model=tiny_sft", "stages.dpo.micro_batch_size=1", "stages.dpo.batch_size=2"]
    text = plan(*settings, f"data.preferences={file}", "data.held_out_fraction=0")
    assert "rows     59 to train on" in text
    assert "this would fit" not in text
