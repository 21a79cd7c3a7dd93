"""What is sampled for an update, and what is read of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config.schema import Advantage, Layout
from align.trainers.experience import Experience, completion_seed, joined, prompt_of, trees_of
from tests.oracles import token_logps
from tests.trainers.actors import PAD, STOPS, Scored, build, even, prompt_rows, stage, words_template

LAYOUTS = [Layout.forest, Layout.sequences, Layout.padded]


def made(folder: Path, update: int = 0, *, layout: Layout = Layout.padded, prompts=None, **options) -> Experience:
    templates = {name: options.pop(name) for name in ("template", "sources") if name in options}
    trainer = build(folder, stage(**options), layout=layout, prompts=prompts, **templates)
    return trainer.maker.make(update)


def assert_same(found: Experience, expected: Experience) -> None:
    for field in dataclasses.fields(Experience):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-5, msg=field.name)
        elif isinstance(one, dict):
            assert {k: v.tolist() for k, v in one.items()} == {k: v.tolist() for k, v in other.items()}
        else:
            assert one == other, field.name


def test_every_number_is_that_of_a_plain_forward_of_its_completion_alone(tmp_path):
    trainer = build(tmp_path, stage(temperature=0.7, completions_per_prompt=2), layout=Layout.forest)
    with torch.no_grad():  # so that reference and policy differ
        trainer.inner.policy.lm_head.weight.mul_(1.1)
    seen = trainer.maker.make(0)
    assert len(set(map(len, seen.completions))) > 1, "one length would show no padding"
    for row, (prompt, completion) in enumerate(zip(seen.prompts, seen.completions, strict=True)):
        count = len(completion)
        assert seen.mask[row].tolist() == [at < count for at in range(seen.mask.shape[1])]
        for name, model in (("logps", trainer.inner.policy), ("reference_logps", trainer.reference.policy)):
            ids = torch.tensor([[*prompt, *completion]])
            with torch.no_grad():
                all_logps = (model(input_ids=ids, use_cache=False).logits[0].double() / 0.7).log_softmax(-1)
            expected = all_logps[range(len(prompt) - 1, len(prompt) + count - 1), completion]
            torch.testing.assert_close(getattr(seen, name)[row, :count].double(), expected, rtol=0, atol=2e-5)
            if name == "logps":
                entropies = -(all_logps.exp() * all_logps).sum(-1)[len(prompt) - 1 : len(prompt) + count - 1]
                torch.testing.assert_close(seen.entropies[row, :count].double(), entropies, rtol=0, atol=2e-5)
        for at in range(count):
            # The value of the state before a token: the score of what stands in front of it.
            before = torch.tensor([[*prompt, *completion[:at]]])
            with torch.no_grad():
                critic = trainer.inner.critic
                hidden = critic.base_model(input_ids=before, use_cache=False).last_hidden_state[0, -1]
                score = (hidden @ critic.score.weight[0]).item()
            assert seen.values[row, at].item() == pytest.approx(score, abs=2e-5)
        for name in ("logps", "reference_logps", "sampler_logps", "entropies", "values"):
            assert not getattr(seen, name)[row, count:].any()
    torch.testing.assert_close(seen.sampler_logps, seen.logps, rtol=0, atol=2e-5)
    assert (seen.logps - seen.reference_logps).abs().max() > 1e-2


def test_the_log_probabilities_at_temperature_1_are_the_oracles(tmp_path):
    trainer = build(tmp_path, stage())
    seen = trainer.maker.make(0)
    for row, (prompt, completion) in enumerate(zip(seen.prompts, seen.completions, strict=True)):
        expected = torch.stack(token_logps(trainer.inner.policy, prompt, completion)).detach()
        torch.testing.assert_close(seen.logps[row, : len(completion)].double(), expected.double(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [{"micro_batch_size": 1, "rollout_batch_size": 3}, {"rollout_batch_size": 8}])
def test_batch_sizes_and_layout_change_nothing(layout, sizes, tmp_path):
    plain = made(tmp_path, completions_per_prompt=2)
    assert_same(made(tmp_path, layout=layout, completions_per_prompt=2, **sizes), plain)


def test_completions_of_a_prompt_stand_side_by_side_and_differ(tmp_path):
    seen = made(tmp_path, update=1, completions_per_prompt=4)
    assert seen.group.tolist() == [2] * 4 + [3] * 4, "positions go on where update 0 ended"
    for place in (0, 4):
        assert all(prompt == seen.prompts[place] for prompt in seen.prompts[place : place + 4])
        assert len({tuple(ids) for ids in seen.completions[place : place + 4]}) == 4


def test_the_first_completions_of_a_prompt_are_the_same_however_many_there_are(tmp_path):
    two = made(tmp_path, completions_per_prompt=2, completions_per_update=8)
    four = made(tmp_path, completions_per_prompt=4, completions_per_update=16, batch_size=8)
    assert [two.completions[i] for i in range(8)] == [four.completions[4 * (i // 2) + i % 2] for i in range(8)]


def test_without_a_value_model_values_are_zero_and_without_a_penalty_the_reference_is_the_policy(tmp_path):
    seen = made(tmp_path, advantage=Advantage.reinforce_plus_plus, kl_coefficient=0.0)
    assert not seen.values.any()
    assert torch.equal(seen.reference_logps, seen.logps)


def test_a_completion_is_finished_by_its_own_stop_token_alone(tmp_path):
    rows = prompt_rows(12, ending=STOPS[:2])
    seen = made(tmp_path, prompts=rows)
    assert all(prompt[-2:] == list(STOPS[:2]) for prompt in seen.prompts)
    for completion, finished in zip(seen.completions, seen.finished.tolist(), strict=True):
        assert finished == (completion[-1] in STOPS)
        assert len(completion) == 6 or finished
        assert not set(completion[:-1]) & set(STOPS)
    assert 0 < seen.finished.sum() < 8


def test_a_pad_token_that_stops_is_kept_as_the_last_token_and_scored(tmp_path):
    apart = made(tmp_path, template=words_template(PAD, STOPS))
    same = made(tmp_path, template=words_template(STOPS[0], STOPS))
    assert [STOPS[0]] in [ids[-1:] for ids in same.completions], "one must end in the token that also pads"
    assert_same(same, apart)


def test_a_completion_of_special_tokens_alone_is_empty(tmp_path):
    stops = range(1, 40)  # most first tokens stop
    seen = made(tmp_path, template=words_template(PAD, stops))
    assert 0 < seen.empty.sum() < 8
    for completion, empty in zip(seen.completions, seen.empty.tolist(), strict=True):
        assert empty == all(token in {PAD, *stops} for token in completion)


def test_rewards_see_prompt_text_tokens_and_row_of_each_completion(tmp_path):
    source = Scored(even)
    seen = made(tmp_path, sources=[source], completions_per_prompt=2)
    for at, one in enumerate(source.seen):
        assert (one.prompt_ids, one.completion_ids) == (seen.prompts[at], seen.completions[at])
        assert one.text == " ".join(str(token) for token in one.completion_ids if token not in (PAD, *STOPS))
        assert one.prompt[0].content == f"Question {one.row['number']}?"
        assert one.finished == bool(seen.finished[at])
        assert seen.scores["mine"][at] == even(one)
    rows = prompt_rows(12)
    assert [rows[one.row["number"]]["prompt_ids"] for one in source.seen] == seen.prompts


def test_parts_of_other_widths_are_joined_in_order(tmp_path):
    whole = made(tmp_path)
    parts = []
    for places in (slice(0, 3), slice(3, 4), slice(4, 8)):
        values = {field.name: getattr(whole, field.name) for field in dataclasses.fields(Experience)}
        width = max(map(len, whole.completions[places]))
        for name, value in values.items():
            if isinstance(value, dict):
                values[name] = {key: found[places] for key, found in value.items()}
            else:
                values[name] = value[places]
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                values[name] = values[name][:, :width]
        parts.append(Experience(**values))
    again = joined(parts)
    assert len(again) == 8 and again.lengths.tolist() == list(map(len, whole.completions))
    for field in dataclasses.fields(Experience):
        one, other = getattr(again, field.name), getattr(whole, field.name)
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, other), field.name
        elif isinstance(one, dict):
            assert all(np.array_equal(one[key], other[key]) for key in other)
        else:
            assert one == other


def test_each_prompt_comes_once_an_epoch_in_an_order_of_its_own():
    orders = [[prompt_of(position, 10, 3) for position in range(10 * epoch, 10 * epoch + 10)] for epoch in range(4)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] != [prompt_of(position, 10, 4) for position in range(10)]
    assert [prompt_of(position, 10, 3) for position in (25, 5, 25)] == [orders[2][5], orders[0][5], orders[2][5]]


def test_seeds_of_completions_are_their_own():
    seeds = {completion_seed(s, p, k) for s in range(3) for p in range(20) for k in range(4)}
    assert len(seeds) == 240 and all(0 <= seed < 2**63 for seed in seeds)
    assert completion_seed(1, 12, 3) != completion_seed(1, 1, 23)


def test_neighbours_of_one_group_share_a_tree():
    trees = trees_of([[5], [5], [6], [5]], [[1], [2], [3], [4]], [0, 0, 1, 0])
    assert [(tree.prompt, tree.completions) for tree in trees] == [([5], [[1], [2]]), ([6], [[3]]), ([5], [[4]])]
