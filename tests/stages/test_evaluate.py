"""The evaluate stage: what it measures, what it keeps, and what it says of judges."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from align.chain import run_chain
from align.config.errors import UserError
from align.config.schema import (
    DataConfig,
    EvaluateStage,
    JudgeConfig,
    JudgeKind,
    ModelConfig,
    RunConfig,
    SpeakerBackend,
    SpeakerConfig,
)
from align.config.store import compose_run
from align.data.prepare import prepare_preferences, prepare_text
from align.data.template import Template
from align.distributed.runtime import Runtime
from align.generation.speakers import Chosen, Said
from align.models.load import load_model, load_tokenizer
from align.stages import evaluate, evaluate_judges, evaluate_models
from align.stages.context import RunContext
from align.tracking.evaluate_page import evaluate_page
from tests.distributed.test_ppo_ranks import make_reward_model

DATA = DataConfig(
    prompts="tiny:prompts", preferences="tiny:preferences", text="tiny:text", demonstrations="tiny:demonstrations",
    helpful="tiny:helpful",
)  # fmt: skip
SMALL = {
    "models": {"base": "tiny-base", "sft": "tiny-sft"}, "max_prompts": 4, "max_new_tokens": 24, "batch_size": 8,
    "kl_prompts": 6, "max_pairs": 6, "max_texts": 3, "max_tokens": 128, "resamples": 200,
}  # fmt: skip


def stage(**changes):
    return EvaluateStage(**(SMALL | changes))


def evaluated(folder, made, data=DATA):
    """The folder of the stage, after it ran."""
    config = RunConfig(name="t", model=ModelConfig(path="tiny-base"), data=data, cache_dir=os.environ["ALIGN_CACHE"])
    context = RunContext(config, Runtime(0, 1, 0, "cpu"), folder, "evaluate")
    context.stage_dir.mkdir(parents=True, exist_ok=True)
    evaluate.run(made, context)
    return context.stage_dir


def numbers(stage_dir):
    return json.loads((stage_dir / "scores.json").read_text())


def by_length(prompts, completions, rows):
    """A function that prefers what is longer."""
    return [len(text) for text in completions]


LONGER = JudgeConfig(kind=JudgeKind.function, function="tests.stages.test_evaluate:by_length")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole evaluation, few-shot column and judge included."""
    return evaluated(tmp_path_factory.mktemp("evaluate") / "run", stage(few_shot=2, judge=LONGER))


def test_figures_do_not_depend_on_the_batch_size(whole, tmp_path):
    again = evaluated(tmp_path / "run", stage(few_shot=2, judge=LONGER, batch_size=1))
    for name in ("scores.json", "samples.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_what_is_known_is_not_computed_again(whole, tmp_path, monkeypatch):
    before = {name: (whole / name).read_bytes() for name in ("scores.json", "samples.jsonl", "evaluate_report.html")}

    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate_models, "load_local", loaded)
    evaluated(whole.parent, stage(few_shot=2, judge=LONGER))
    assert {name: (whole / name).read_bytes() for name in before} == before
    (whole / "journal" / "logps_sft_pairs.json").unlink()
    with pytest.raises(AssertionError, match="was loaded"):
        evaluated(whole.parent, stage(few_shot=2, judge=LONGER))


def test_a_part_of_other_rows_or_weights_is_no_part_of_this(whole, monkeypatch):
    asked = []
    load = evaluate_models.load_local

    def loaded(path, *_, **options):
        asked.append(path)
        return load(path, *_, **options)

    monkeypatch.setattr(evaluate_models, "load_local", loaded)
    evaluated(whole.parent, stage(few_shot=2, judge=LONGER, max_pairs=5))
    assert sorted(asked) == ["tiny-base", "tiny-sft"]
    assert numbers(whole)["models"]["sft"]["pairs"]["pairs"] == 5


def test_a_model_is_no_distance_from_itself(tmp_path):
    same = numbers(evaluated(tmp_path / "run", stage(models={"base": "tiny-sft", "again": "tiny-sft"})))
    again = same["models"]["again"]
    assert again["kl"]["k1_per_sequence"] == again["kl"]["k3_per_token"] == 0.0
    assert again["changes"]["text_loss"]["mean"] == 0.0 and again["changes"]["length_change"] == 0.0
    assert again["pairs"]["chosen_logp_change"] == 0.0 and again["pairs"]["accuracy"] == 0.5


def test_log_probabilities_are_those_of_a_plain_forward(whole):
    template = Template(load_tokenizer("tiny-sft", ModelConfig(path="tiny-sft"), None))
    model = load_model("tiny-sft", ModelConfig(path="tiny-sft"), torch.float32, seed=0).eval()
    base = load_model("tiny-base", ModelConfig(path="tiny-base"), torch.float32, seed=0).eval()
    found = numbers(whole)["models"]

    def logp(which, prompt, answer):
        with torch.no_grad():
            logits = which(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()

    rows = prepare_preferences(DATA, template, 128, Path(os.environ["ALIGN_CACHE"])).held_out
    some = [rows[i] for i in range(found["sft"]["pairs"]["pairs"])]
    answers = [(r["prompt_ids"], r["chosen_ids"]) for r in some]
    up = np.mean([logp(model, *answer) - logp(base, *answer) for answer in answers])
    assert found["sft"]["pairs"]["chosen_logp_change"] == pytest.approx(up, abs=1e-3)
    texts = prepare_text(DATA, template, 128, Path(os.environ["ALIGN_CACHE"])).held_out
    pieces = [texts[i]["input_ids"] for i in range(3)]
    nats = -sum(logp(model, ids[:1], ids[1:]) for ids in pieces)
    words = sum(len(template.tokenizer.decode(ids[1:], skip_special_tokens=True).split()) for ids in pieces)
    assert found["sft"]["text"]["per_word"] == pytest.approx(nats / words, abs=1e-4)


def test_a_judge_that_is_a_function_wins_for_the_longer_replies_and_that_is_told(whole):
    found = numbers(whole)
    lengths = {name: [] for name in found["models"]}
    for line in (whole / "samples.jsonl").read_text().splitlines():
        for name, text in json.loads(line)["replies"].items():
            lengths[name].append(len(text))
    wins = np.sign(np.array(lengths["sft"]) - np.array(lengths["base"]))
    assert found["models"]["sft"]["win"]["rate"]["mean"] == pytest.approx(float((1 + wins).mean() / 2))
    assert [line.split(":")[0] for line in found["verdict"]] == ["base few-shot against base", "sft against base"]


def test_the_few_shot_column_is_the_baseline_with_answered_questions_before_the_prompt(whole):
    (journal,) = (whole / "journal").glob("answers_of_base_to_a_few_shot_prompt-*.jsonl")
    shown = [json.loads(line)["prompt_tokens"] for line in journal.read_text().splitlines()]
    (plain,) = (whole / "journal").glob("answers_of_base-*.jsonl")
    alone = [json.loads(line)["prompt_tokens"] for line in plain.read_text().splitlines()]
    assert min(shown) > max(alone)
    assert set(numbers(whole)["oracle"]) == {"base", "base few-shot", "sft"}


class Fixed:
    """A judge of one habit."""

    name, weighed_together = "fixed", None

    def __init__(self, habit):
        self.habit = habit

    def choose(self, chooses, done):
        for place, one in enumerate(chooses):
            p = self.habit(one.messages[-1]["content"])
            done(place, Chosen((float(np.log(p)), float(np.log(1 - p))), 10))

    def say(self, asks, done):
        for place, _ in enumerate(asks):
            done(place, Said("thought", True, 1, 1))

    def close(self):
        pass


def habit_of(kind):
    draws = np.random.default_rng(3)
    return {"first slot": lambda _: 0.9, "chance": lambda _: 0.9 if draws.random() < 0.5 else 0.1}[kind]


@pytest.mark.parametrize(("kind", "words"), [("first slot", "prefers the first slot"), ("chance", "looks like chance")])
def test_a_judge_with_a_habit_is_called_one(tmp_path, monkeypatch, kind, words):
    monkeypatch.setattr(evaluate_judges, "load_speaker", lambda *_: Fixed(habit_of(kind)))
    judge = JudgeConfig(kind=JudgeKind.model, speaker=SpeakerConfig(model="tiny-sft"))
    folder = evaluated(tmp_path / "run", stage(judge=judge, max_prompts=14, kl_prompts=0, max_pairs=0, max_texts=0))
    found = numbers(folder)
    assert any(words in sentence for sentence in found["models"]["sft"]["win"]["judge"]["words"])
    assert "judge in doubt" in found["verdict"][0]
    assert words in (folder / "evaluate_report.html").read_text()


def test_a_command_with_a_local_judge_may_be_typed_again(tmp_path):
    words = [
        "+recipe=evaluate", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", "precision=fp32",
        "+stages.evaluate.models.mine=tiny-sft", "stages.evaluate.max_prompts=2", "stages.evaluate.max_new_tokens=4",
        "stages.evaluate.kl_prompts=0", "stages.evaluate.max_pairs=0", "stages.evaluate.max_texts=0",
        "stages.evaluate.judge.kind=model", "stages.evaluate.judge.speaker.model=tiny-critic",
    ]  # fmt: skip
    assert run_chain(compose_run(words).config) == run_chain(compose_run(words).config)


VLLM = JudgeConfig(kind=JudgeKind.model, speaker=SpeakerConfig(backend=SpeakerBackend.vllm, model="tiny-sft"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"models": {}}, "models is empty"),
        ({"baseline": "bas"}, r"baseline=bas is none of stages\.evaluate\.models \(base, sft\)"),
        ({"judge": JudgeConfig(kind=JudgeKind.reward)}, r"needs stages\.evaluate\.judge\.reward_model"),
        ({"judge": JudgeConfig(kind=JudgeKind.function)}, r"needs stages\.evaluate\.judge\.function"),
        ({"judge": JudgeConfig(kind=JudgeKind.model)}, r"stages\.evaluate\.judge\.speaker\.model is not set"),
        ({"judge": VLLM}, r"stages\.evaluate\.judge\.speaker.*(vLLM cannot be imported|no GPU)"),
        ({"tasks": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
        ({"few_shot": 10**6}, r"stages\.evaluate\.few_shot=1000000: data\.demonstrations has only"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as refusal:
        evaluated(tmp_path / "run", stage(**changes))
    assert "\n" not in str(refusal.value)


def test_tasks_and_instructions_are_told_by_file_with_their_change(tmp_path):
    questions, rules = tmp_path / "sums.jsonl", tmp_path / "rules.jsonl"
    sums = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(5)]
    questions.write_text("".join(json.dumps(one) + "\n" for one in sums))
    row = {"prompt": "Say hello.", "instruction_id_list": ["punctuation:no_comma", "made_up:kind"], "kwargs": [{}, {}]}
    rules.write_text(json.dumps(row) + "\n")
    made = stage(tasks=[str(questions)], instructions=[str(rules)], kl_prompts=0, max_pairs=0, max_texts=0)
    found = numbers(evaluated(tmp_path / "run", made))["models"]["sft"]["tasks"]
    assert found[str(questions)]["count"] == 5 and "change" in found[str(questions)]
    assert found[str(rules)]["unknown"] == {"made_up:kind: unknown kind": 1}
    questions.write_text('{"question": "What?"}\n')
    with pytest.raises(UserError, match=r"sums\.jsonl:1: no answer"):
        evaluated(tmp_path / "other", made)


def test_prompts_that_say_whether_they_are_safe_are_counted_apart(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    turns = [[{"role": "user", "content": f"How do I bake bread {n}?"}] for n in range(6)]
    rows = [{"prompt": turn, "safe": n % 2 == 0} for n, turn in enumerate(turns)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(DATA, prompts=str(prompts), held_out_fraction=0.0)
    found = numbers(evaluated(tmp_path / "run", stage(kl_prompts=0, max_pairs=0, max_texts=0, max_prompts=6), data))
    counted = {kind: shares["prompts"] for kind, shares in found["models"]["sft"]["refusals"].items()}
    assert counted == {"unsafe": 3, "safe": 3}
    assert found["oracle"] == {}


def test_the_page_escapes_what_models_say_and_marks_what_failed(whole):
    samples = [{"prompt": [{"role": "user", "content": "<b>?"}], "replies": {"base": "<script>", "sft": None}}]
    page = evaluate_page(numbers(whole), samples, "t <1>")
    assert "<script>" not in page and "&lt;script&gt;" in page and "(no reply)" in page and "t &lt;1&gt;" in page


def test_replies_that_are_the_same_are_no_win_whatever_batches_a_reward_model_scores_them_in(tmp_path):
    rewarding = tmp_path / "reward_model"
    make_reward_model(rewarding)
    judge = JudgeConfig(kind=JudgeKind.reward, reward_model=str(rewarding))
    models = {"base": "tiny-sft", "again": "tiny-sft"}
    some = {"kl_prompts": 0, "max_pairs": 0, "max_texts": 0, "max_prompts": 5, "max_new_tokens": 12}
    found = numbers(evaluated(tmp_path / "run", stage(judge=judge, models=models, **some)))["models"]
    assert found["again"]["win"]["rate"]["mean"] == 0.5 and found["again"]["win"]["ties"] == 15
