"""The speaker by vLLM, on a stand-in for it: it says and weighs what the model in this process does."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from align.config.errors import UserError
from align.config.schema import ConstitutionalStage, ModelConfig, RunConfig, SpeakerBackend, SpeakerConfig
from align.data.template import Template
from align.generation.local_speaker import LocalSpeaker
from align.generation.speakers import Chosen, Failed
from align.generation.vllm_engine import Setting
from align.generation.vllm_speaker import VllmSpeaker
from align.models.load import load_model, load_tokenizer, resolve_model
from align.stages import speakers as stage_speakers
from tests.generation import stand_in_vllm
from tests.generation.test_local_speaker import choices, chosen, questions, said

MODEL = "tiny-sft"
VLLM = SpeakerConfig(backend=SpeakerBackend.vllm, model=MODEL)


@pytest.fixture(autouse=True)
def llm(monkeypatch):
    return stand_in_vllm.install(monkeypatch)


@pytest.fixture(scope="module")
def template():
    return Template(load_tokenizer(MODEL, ModelConfig(path=MODEL), None))


@pytest.fixture
def local(template):
    model = load_model(MODEL, ModelConfig(path=MODEL), torch.float32, seed=0)
    return LocalSpeaker(model, template, name=MODEL, batch_size=8)


def speaker(template, **changes):
    options = {"name": MODEL, "dtype": torch.float32, "seed": 0, "batch_size": 2, "memory_share": 0.5} | changes
    return VllmSpeaker(resolve_model(MODEL), template, Setting("judge=vllm", "judge=hf"), **options)


def test_greedy_answers_are_those_of_the_model_in_this_process(template, local, llm):
    asks = questions(19, temperature=0.0, max_new_tokens=12)
    assert said(speaker(template), asks) == said(local, asks)
    assert llm.started[0].calls == 2, "sixteen at a time, and the rest"


def test_a_stop_text_ends_the_answer(template, local):
    asks = questions(6, temperature=0.0, max_new_tokens=30)
    first = said(local, asks)
    word = first[0].text.split()[2]
    stopped = [replace(ask, stop=(word,)) for ask in asks]
    ours = said(speaker(template), stopped)
    assert ours == said(local, stopped) and ours[0].finished and word not in ours[0].text
    assert ours[0].new_tokens < first[0].new_tokens


def test_a_sampled_answer_depends_on_its_seed_and_not_on_its_company(template, llm):
    asks = questions(4, temperature=0.9, max_new_tokens=12)
    together = said(speaker(template), asks)
    llm.started.clear()
    assert said(speaker(template), asks[::-1]) == together[::-1]
    llm.started.clear()
    assert said(speaker(template), [replace(ask, seed=ask.seed + 2**90 + 1) for ask in asks]) != together


def test_candidates_are_weighed_as_the_model_in_this_process_weighs_them(template, local):
    chooses = choices(9)
    for ours, theirs in zip(chosen(speaker(template), chooses), chosen(local, chooses), strict=True):
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-4) and ours.prompt_tokens == theirs.prompt_tokens


def test_what_is_too_long_is_no_answer_and_the_rest_is_answered(template):
    asks = questions(3, shots=0, temperature=0.0, max_new_tokens=5)
    asks[1] = replace(asks[1], max_new_tokens=400)
    ours = speaker(template, max_tokens=120)
    answers = said(ours, asks)
    assert [type(one) is Failed for one in answers] == [False, True, False]
    assert answers[1].reason == "too_long" and "120" in answers[1].detail
    short, long = choices(1, shots=0)[0], choices(1, shots=12)[0]
    verdicts = chosen(ours, [long, short])
    assert verdicts[0].reason == "too_long" and isinstance(verdicts[1], Chosen)


def test_the_room_for_the_token_that_vllm_adds_is_counted(template, local):
    one = choices(1, shots=0)[0]
    logps = chosen(local, [one])[0]
    answers = [len(template.tokenizer(text, add_special_tokens=False).input_ids) for text in one.candidates]
    exact = logps.prompt_tokens + max(answers) + 1
    for limit, fits in ((exact + 1, True), (exact - 2, False)):
        stand_in_vllm.LLM.started.clear()
        assert isinstance(chosen(speaker(template, max_tokens=limit), [one])[0], Chosen) is fits


def test_it_is_asked_with_the_text_of_the_template_also_after_it_was_closed(template, local, llm):
    ours, (ask,) = speaker(template), questions(1)
    ours.close()
    assert not llm.started
    assert ours.prompt_text(ask.messages) == local.prompt_text(ask.messages)
    assert ours.prompt_tokens(ask.messages) == local.prompt_tokens(ask.messages)


def test_an_answer_that_vllm_breaks_off_and_a_number_that_is_none_are_refused(template, llm):
    ours, ask, one = speaker(template), questions(1)[0], choices(1)[0]
    engine = llm.started[0]
    whole = engine.generate

    def broken(prompts, drawn, **options):
        outputs = whole(prompts, drawn, **options)
        for output in outputs:
            output.outputs[0].finish_reason = "abort"
            for listed in (output.prompt_logprobs or [])[1:]:
                next(iter(listed.values())).logprob = float("nan")
        return outputs

    engine.generate = broken
    with pytest.raises(UserError, match=r"judge=vllm.*abort"):
        said(ours, [ask])
    with pytest.raises(UserError, match="no numbers"):
        chosen(ours, [one])


# In the stage.


def stage(**changes):
    return ConstitutionalStage(**({"generator": VLLM} | changes))


def context(device="cuda:0"):
    return SimpleNamespace(
        config=RunConfig(name="t", model=ModelConfig(path=MODEL)),
        runtime=SimpleNamespace(device=device),
    )


def test_roles_of_one_model_share_an_engine(llm):
    found = stage_speakers.load_speakers(stage(), context())
    assert len({id(one) for one in found.values()}) == 1 == len(llm.started)
    assert found["judge"].name.startswith(f"{MODEL}@"), "the weights are part of the journal's keys"


def test_without_a_gpu_it_is_refused_before_anything_is_loaded(llm):
    with pytest.raises(UserError, match=r"stages\.constitutional\.generator\.backend=vllm: there is no GPU"):
        stage_speakers.load_speakers(stage(), context("cpu"))
    assert not llm.started


def test_a_temperature_that_vllm_changes_is_refused():
    with pytest.raises(UserError, match=r"stages\.constitutional\.temperatures\[1\]=0\.001"):
        stage_speakers.load_speakers(stage(temperatures=[1.0, 0.001]), context())


def test_a_second_engine_is_refused():
    other = SpeakerConfig(backend=SpeakerBackend.vllm, model="tiny-critic")
    with pytest.raises(UserError, match=r"judge\.backend=vllm: generator has an engine of vLLM already"):
        stage_speakers.check_speakers(stage(judge=other))
    stage_speakers.check_speakers(stage(judge=SpeakerConfig(backend=SpeakerBackend.hf, model="tiny-critic")))
    stage_speakers.check_speakers(stage(critic=VLLM))


def test_a_model_of_random_weights_is_refused():
    with pytest.raises(UserError, match="tiny-untrained has no weights"):
        stage_speakers.check_speakers(stage(judge=SpeakerConfig(backend=SpeakerBackend.vllm, model="tiny-untrained")))
