"""best_by and stop_after: the policy, and the end of training, by any figure that an evaluation has."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from align.artifacts import read_manifest
from align.chain import run_chain
from align.cli import main
from align.config.best import FIGURES, key_of
from align.config.errors import UserError
from align.config.schema import BestBy, DataConfig, DPOStage, ModelConfig, SFTStage
from align.config.store import compose_run
from align.data.prepare import prepare_prompts
from align.data.template import Template
from align.generation.local_speaker import LocalSpeaker
from align.generation.speakers import Ask
from align.models.load import load_model, load_tokenizer
from align.stages import best as best_stage
from align.tracking.local import read_metrics
from align.trainers.best import Best, HeldOutGuard, held_out_alarm
from align.trainers.samples import read_samples
from align.world import oracle
from tests.launching import slow
from tests.stages.runs import overrides

SFT = ("run=[sft]", "stages.sft.max_steps=4", "stages.sft.eval_every=2", "best.rows=4", "best.max_new_tokens=24",
    "data.prompts=tiny:prompts",
)  # fmt: skip


def by_length(prompts, completions, rows):
    """A judge that prefers what is longer."""
    return [len(text) for text in completions]


LONGER = ("best.judge.kind=function", "best.judge.function=tests.chain.test_best_by:by_length")


def embedded_prompts():
    return prepare_prompts(DataConfig(prompts="tiny:prompts")).rows


def lines(stage_dir) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in read_metrics(stage_dir / "metrics.jsonl") if "eval_loss" in line}


@pytest.fixture(scope="module")
def by_oracle(tmp_path_factory):
    """SFT whose best evaluation is the one with the fewest garbled replies; and the same without measuring."""
    folder = tmp_path_factory.mktemp("best")
    for name, more in {
        "run": ("stages.sft.best_by=garbled", "stages.sft.keep_best=true", *SFT[3:]),
        "plain": (),
    }.items():
        dropout = ("peft=lora", "peft.dropout=0.1", "stages.sft.learning_rate=1e-3", f"run_dir={folder / name}")
        words = [one for one in overrides(folder, *SFT[:3]) if not one.startswith("run_dir=")]
        assert main([*words, *more, *dropout]) == 0
    return folder


def test_what_the_oracle_says_of_the_policy_while_it_trains_is_what_it_says_of_the_saved_one(by_oracle):
    stage = by_oracle / "run/sft"
    kept = int(read_manifest(stage).metrics["kept_step"])
    told = [line for line in read_samples(stage / "samples.jsonl") if line["step"] == kept]
    template = Template(load_tokenizer(str(stage / "policy"), ModelConfig(), None))
    model = load_model(str(stage / "policy"), ModelConfig(), torch.float32, seed=0).eval()
    speaker, answers = LocalSpeaker(model, template, name="saved", batch_size=3), {}
    asks = [Ask(str(n), ({"role": "user", "content": one["prompt"]},), 0, 0.0, 24) for n, one in enumerate(told)]
    speaker.say(asks, answers.__setitem__)
    assert [answers[n].text for n in range(len(asks))] == [one["completion"] for one in told]
    world = {row.messages[-1].content: row.row for row in embedded_prompts()}
    found = oracle.figures([world[one["prompt"]] for one in told], [one["completion"] for one in told])
    line = lines(stage)[kept]
    assert {name: line[f"eval_{name}"] for name in ("garbled", "over_refused", "unsafe_complied")} == {
        name: found[name] for name in ("garbled", "over_refused", "unsafe_complied")
    }
    assert line["eval_helpful"] == found["helpful_accuracy"]


def test_the_best_is_kept_and_told_with_what_was_measured_before_and_after(by_oracle):
    stage = by_oracle / "run/sft"
    judged, metrics = lines(stage), read_manifest(stage).metrics
    shares = {step: line["eval_garbled"] for step, line in judged.items() if step}
    assert set(shares) == {2, 4} and shares[int(metrics["kept_step"])] == min(shares.values())
    assert metrics["before/garbled"] == judged[0]["eval_garbled"]
    assert metrics["after/garbled"] == min(shares.values())
    page = (by_oracle / "run/report.html").read_text()
    assert "By the oracle" in page and "the same prompts by step" in page


def test_measuring_changes_nothing_that_is_trained(by_oracle):
    losses = [
        [line["loss"] for line in read_metrics(by_oracle / name / "sft/metrics.jsonl") if "loss" in line]
        for name in ("run", "plain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_the_prompts_are_none_that_evaluate_takes_first(by_oracle):
    asked = {line["prompt"] for line in read_samples(by_oracle / "run/sft/samples.jsonl")}
    by_kind: dict[str, list[str]] = {}
    for row in embedded_prompts():
        by_kind.setdefault(row.row["kind"], []).append(row.messages[-1].content)
    assert asked == {prompt for prompts in by_kind.values() for prompt in prompts[-4:]}


@slow
def test_text_loss_is_what_evaluate_says_of_the_same_texts(tmp_path):
    texts = tmp_path / "texts.jsonl"
    told = (f"Villager {n} went to the mill, and the miller told house {n + 1} of it." for n in range(40))
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    words = [f"data.text={texts}", "stages.sft.best_by=text_loss", "stages.sft.stop_after=5"]
    words += ["stages.evaluate.max_texts=4", "best.rows=4"]
    less = ["stages.evaluate.max_prompts=1", "stages.evaluate.kl_prompts=0", "stages.evaluate.max_pairs=0"]
    models = ["stages.evaluate.models.dpo=tiny-base"]
    assert main(overrides(tmp_path, "run=[sft,evaluate]", *SFT[1:3], *words, *less, *models)) == 0
    text = json.loads((tmp_path / "run/evaluate/scores.json").read_text())["models"]["sft"]["text"]["per_word"]
    assert read_manifest(tmp_path / "run/sft").metrics["after/text_loss"] == pytest.approx(text, rel=1e-5)


def test_a_win_rate_of_dpo_is_against_the_baseline_by_the_judge(tmp_path):
    dpo = ("run=[dpo]", "stages.dpo.policy=tiny-base", "stages.dpo.max_steps=2", "stages.dpo.eval_every=2")
    by = ("stages.dpo.best_by=win_rate", "stages.dpo.keep_best=true", "stages.dpo.learning_rate=1e-3", *LONGER)
    assert main(overrides(tmp_path, *dpo, *by, *SFT[3:])) == 0
    stage = tmp_path / "run/dpo"
    judged = lines(stage)
    assert judged[0]["eval_win_rate"] == 0.5, "before the first step it is the baseline"
    replies = {step: [] for step in judged}
    for line in read_samples(stage / "samples.jsonl"):
        replies[line["step"]].append(len(line["completion"]))
    wins = [(now > then) + (now == then) / 2 for now, then in zip(replies[2], replies[0], strict=True)]
    assert judged[2]["eval_win_rate"] == pytest.approx(sum(wins) / len(wins))
    names = {entry["name"] for entry in read_manifest(stage).inputs}
    assert {"best.baseline", "data.prompts", "data.preferences"} <= names


def test_training_ends_when_nothing_better_comes_and_the_alert_says_so(tmp_path, monkeypatch, capsys):
    values = iter([0.1, 0.5, 0.7, 0.6, 0.7, 0.9])
    monkeypatch.setattr(best_stage.Measures, "_figures", lambda *_: {"helpful": next(values)})
    told = []
    monkeypatch.setattr("align.tracking.wandb_run.WandbRun.alert", lambda self, *words: told.append(words))
    by = ("stages.sft.best_by=helpful", "stages.sft.stop_after=2", "stages.sft.keep_best=true", SFT[-1])
    assert main(overrides(tmp_path, "run=[sft]", *by, "stages.sft.max_steps=9", "stages.sft.eval_every=1")) == 0
    metrics = read_manifest(tmp_path / "run/sft").metrics
    assert (metrics["kept_step"], metrics["stopped_early"], metrics["after/helpful"]) == (2.0, 1.0, 0.7)
    assert read_manifest(tmp_path / "run/sft").steps == 4
    words = "stopped at step 4: the share of helpful replies was not better than the 0.7 of step 2 in 2 evaluations"
    words += " in a row"
    said = capsys.readouterr().err
    assert (
        f"sft: {words}" in said and "policy is that of step 2, where the share of helpful replies was highest" in said
    )
    assert ("sft: stopped early", words) in told


def callback(**settings) -> Best:
    return Best("dpo", DPOStage(keep_best=True, **settings), active=False, alert=lambda *_: None)


def test_the_best_of_a_log_is_found_whichever_way_is_better():
    log = [
        {"step": n, "eval_loss": loss, "eval_rewards/accuracies": 1 - loss} for n, loss in enumerate((0.2, 0.5, 0.3))
    ]
    log += [{"step": 3, "eval_loss": float("nan")}, {"step": 4, "loss": 0.1}]
    assert tuple(callback().so_far(log)) == (2, 0.3, 1)
    assert tuple(callback(best_by=BestBy.accuracy).so_far(log)) == (2, 0.7, 1)
    assert callback().so_far(log[:1]).best_step == 0
    # A resumed run judges a step again; the later figure counts.
    assert tuple(callback().so_far([*log[:3], {"step": 1, "eval_loss": 0.1}])) == (1, 0.1, 1)


def test_every_figure_can_be_had_by_some_stage_under_a_name_of_its_own():
    assert set(FIGURES) == set(BestBy)
    assert all(one.own or one.needs for one in FIGURES.values())
    assert key_of("dpo", DPOStage(best_by=BestBy.accuracy)) == "eval_rewards/accuracies"
    assert key_of("sft", SFTStage(best_by=BestBy.accuracy)) == "eval_accuracy"


def test_a_held_out_loss_that_goes_the_wrong_way_is_told():
    assert held_out_alarm([2.0, 1.5, 1.6, 1.7], 0.02, 3) is None
    assert held_out_alarm([2.0, 1.5, 1.6, 1.7, 1.8], 0.02, 3)[0] == "rising"
    assert held_out_alarm([2.0, 2.03], 0.02, 3) is None
    assert "was 2 before the first step" in held_out_alarm([2.0, 2.05], 0.02, 3)[1]
    assert held_out_alarm([2.0, float("nan")], 0.02, 3)[0] == "above"


def test_an_alarm_over_the_held_out_loss_is_given_once(capsys):
    told = []
    guard = HeldOutGuard("sft", lambda *words: told.append(words))
    log = [{"step": 0, "eval_loss": 2.0}]
    for step, loss in ((5, 1.9), (10, 2.2), (15, 2.3)):
        log.append({"step": step, "eval_loss": loss})
        guard.on_evaluate(None, SimpleNamespace(log_history=log, global_step=step), None)
    (alert,) = told
    assert alert[0] == "sft: held-out loss" and alert[1].startswith("step 10: the held-out loss is 2.2, and it was 2")
    assert capsys.readouterr().err.count("sft: WARN") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("stages.sft.best_by=score", "sft does not have the score of held-out samples; it has loss, accuracy"),
        ("stages.sft.best_by=win_rate", "stages.sft.best_by=win_rate needs a judge: best.judge.kind=reward"),
        ("stages.sft.best_by=tasks", "stages.sft.best_by=tasks needs files: best.tasks="),
        ("stages.sft.best_by=text_loss data.text=null", "reads data.text, which is not set"),
        ("stages.sft.best_by=helpful data.prompts=my.jsonl", "only data.prompts=tiny:prompts has an oracle"),
        ("best.rows=3", "best.rows would have no effect: no stage measures its best_by"),
        ("stages.sft.best_by=text_loss best.judge.kind=reward", "only best_by=win_rate and win_rate_at_equal_length"),
    ],
)
def test_a_figure_that_cannot_be_had_is_refused_in_one_line(words, said):
    with pytest.raises(UserError) as refusal:
        compose_run(["+recipe=sft", "stages.sft.eval_every=2", "stages.sft.stop_after=2", *words.split()])
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_judge_of_vllm_is_refused_before_anything_is_trained(tmp_path):
    judge = ("best.judge.kind=model", "best.judge.speaker.backend=vllm", "best.judge.speaker.model=tiny-sft")
    by = ("stages.sft.best_by=win_rate", "stages.sft.stop_after=2", *judge)
    with pytest.raises(UserError, match=r"best\.judge\.speaker.*(vLLM cannot be imported|no GPU)"):
        run_chain(compose_run(overrides(tmp_path, *SFT[:3], *by)).config)
    assert not (tmp_path / "run/sft/metrics.jsonl").exists()


def test_the_policy_that_is_kept_is_the_checkpoint_of_the_best(by_oracle):
    adapter = load_file(by_oracle / "run/sft/adapter/adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)
