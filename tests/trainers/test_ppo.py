"""The PPO trainer: one loss however it is split and laid out, and every knob does what its name says."""

import copy
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset

from align.config.schema import Advantage, Guard, KLController, KLEstimator, KLPlace, Layout
from align.trainers import ppo
from align.trainers.experience import trees_of
from align.trainers.guards import Alarm
from align.trainers.ppo import PPOTrainer
from align.trainers.samples import keep_until, means, read_samples
from tests.models.families import VOCABULARY
from tests.oracles import clipped_policy_loss, clipped_value_loss, token_logps
from tests.trainers.actors import (
    STOPS,
    Scored,
    actor,
    build,
    even,
    gradients,
    lines,
    loss_of,
    prompt_rows,
    stage,
    steps_of,
    trained,
    weights,
)

LAYOUTS = [Layout.forest, Layout.sequences, Layout.padded]
WITHOUT_VALUE = {"advantage": Advantage.reinforce_plus_plus}


def moved(trainer: PPOTrainer, share: float = 0.02) -> None:
    """Change the weights, so that ratios, KL and values are off their starting points."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.inner.parameters():
            parameter += share * parameter.std() * torch.randn(parameter.shape, generator=generator)


def documents(count: int = 5) -> Dataset:
    generator = np.random.default_rng(4)
    return Dataset.from_list(
        [{"input_ids": generator.integers(3, VOCABULARY, 4 + 3 * i).tolist()} for i in range(count)]
    )


def plain_loss(trainer: PPOTrainer, places: list[int]) -> torch.Tensor:
    """The loss of an optimizer step on some completions of update 0, token by token from plain forwards."""
    settings, seen = trainer.settings, trainer.test_seen
    targets = trainer.test_targets
    policy, critic = trainer.inner.policy, trainer.inner.critic
    total, tokens = torch.zeros(()), 0
    for row in places:
        if not targets.trained[row].any():
            continue
        prompt, completion = seen.prompts[row], seen.completions[row]
        logps = token_logps(policy, prompt, completion)
        logits = policy(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        for at, logp in enumerate(logps):
            tokens += 1
            old, advantage = seen.logps[row, at].item(), targets.advantages[row, at].item()
            value = clipped_policy_loss(
                logp.item(), old, advantage, settings.clip_low, settings.clip_high, settings.dual_clip
            )
            ratio = torch.exp(logp - old)
            free = -value == pytest.approx(ratio.item() * advantage, rel=1e-5, abs=1e-9)
            surrogate = -ratio * advantage if free else torch.tensor(value)
            total = total + targets.weights[row, at].item() * surrogate.float()
            if settings.kl_place is KLPlace.loss:
                # Gradient of k2; see `align.losses.ppo.kl_loss`.
                total = total + settings.kl_coefficient * (logp - seen.reference_logps[row, at].item()) ** 2 / 2
            if settings.entropy_weight:
                all_logps = logits[len(prompt) + at - 1].log_softmax(-1)
                total = total + settings.entropy_weight * (all_logps.exp() * all_logps).sum()
            if critic is not None:
                state = torch.tensor([[*prompt, *completion[:at]]])
                hidden = critic.base_model(input_ids=state, use_cache=False).last_hidden_state[0, -1]
                guess, old_value = hidden @ critic.score.weight[0], seen.values[row, at].item()
                wanted = targets.returns[row, at].item()
                held = clipped_value_loss(guess.item(), old_value, wanted, settings.value_clip)
                free_loss = (guess - wanted) ** 2 / 2
                same = held == pytest.approx(free_loss.item(), rel=1e-4, abs=1e-7)
                total = total + settings.value_weight * (free_loss if same else torch.tensor(held))
    return total / max(tokens, 1)


def watched(folder, settings, **options) -> PPOTrainer:
    """A trainer that keeps the experience and targets of an update, with the weights moved since."""
    trainer = build(folder, settings, **options)
    original = ppo.find_targets

    def kept(seen, *args, **named):
        trainer.test_seen, trainer.test_targets = seen, original(seen, *args, **named)
        return trainer.test_targets

    trainer.test_find_targets = kept
    return trainer


def steps(trainer: PPOTrainer, monkeypatch):
    monkeypatch.setattr(ppo, "find_targets", trainer.test_find_targets)
    found = steps_of(trainer)
    return found, list(ppo._minibatches(trainer.test_seen, trainer.settings, 0))


# The same loss, however it is computed.

KNOBS = [
    {},
    {"completions_per_prompt": 2, "advantage": Advantage.rloo, "kl_place": KLPlace.loss,
     "kl_estimator": KLEstimator.k2, "kl_coefficient": 0.7},
    {"entropy_weight": 0.3, "dual_clip": 1.5, "clip_high": 0.05, "clip_low": 0.02, "value_clip": 0.02,
     "value_weight": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("knobs", KNOBS)
def test_loss_and_gradient_are_those_of_plain_forwards_in_every_layout_and_split(knobs, tmp_path, monkeypatch):
    expected = None
    for layout in LAYOUTS:
        for micro in (4, 2, 1) if layout is Layout.forest else (2,):
            trainer = watched(tmp_path, stage(micro_batch_size=micro, **knobs), layout=layout)
            found, places = steps(trainer, monkeypatch)
            moved(trainer)
            loss = loss_of(trainer, found[1])
            gradient = gradients(trainer.inner)
            if expected is None:
                trainer.inner.zero_grad()
                trainer.inner.policy.set_attn_implementation("eager")
                plain = plain_loss(trainer, places[1])
                plain.backward()
                expected = plain.item(), gradients(trainer.inner)
            assert loss.item() == pytest.approx(expected[0], rel=1e-4, abs=1e-6)
            assert (gradient - expected[1]).norm() / expected[1].norm() < 2e-4


@pytest.mark.parametrize("knobs", [{}, {"completions_per_prompt": 4, "advantage": Advantage.grpo}])
def test_updates_are_the_same_in_every_layout_and_split(knobs, tmp_path):
    results = []
    for layout, micro in [(Layout.padded, 4), (Layout.forest, 1), (Layout.sequences, 2)]:
        trainer = trained(tmp_path, stage(micro_batch_size=micro, **knobs), layout=layout, updates=2)
        figures = [
            {name: value for name, value in line.items() if "second" not in name and name != "rollout/mismatch_kl"}
            for line in lines(trainer)
        ]
        results.append((figures, weights(trainer.inner.parameters())))
    for figures, after in results[1:]:
        for one, other in zip(figures, results[0][0], strict=True):
            assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        for one, other in zip(after, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-4)
    assert results[0][0][0]["policy/approx_kl"] > 1e-3, "the policy must move, or it shows nothing"


def test_completions_that_share_a_tree_give_the_numbers_of_separate_trees(tmp_path, monkeypatch):
    results = []
    for shared in (True, False):
        trainer = watched(tmp_path, stage(completions_per_prompt=4, micro_batch_size=4), layout=Layout.forest)
        if not shared:

            def apart(prompts, completions, group):
                return trees_of(prompts, completions, range(len(group)))

            monkeypatch.setattr(ppo, "trees_of", apart)
        found, _ = steps(trainer, monkeypatch)
        trees = [batch["forest_table"].shape[2] for step in found for batch in step]
        assert trees == ([1] * 4 if shared else [4] * 4)
        moved(trainer)
        results.append((loss_of(trainer, found[0]), gradients(trainer.inner)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert (results[0][1] - results[1][1]).norm() / results[0][1].norm() < 1e-5


# Where it starts, and how many steps it makes.


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ratio_is_1_on_the_first_minibatch_and_the_kl_starts_at_0(layout, tmp_path):
    settings = stage(temperature=0.7, completions_per_prompt=2, micro_batch_size=2)
    trainer = trained(tmp_path, settings, layout=layout, updates=2)
    first, second = lines(trainer)
    for line in (first, second):
        assert line["policy/ratio_first"] < 1e-4
        assert line["policy/ratio_max"] > 1.01, "later minibatches are of a policy that has moved"
        assert line["rollout/mismatch_kl"] < 1e-8
    assert abs(first["kl/nats_per_completion"]) < 1e-5
    assert abs(second["kl/nats_per_completion"]) > 1e-3


@pytest.mark.parametrize(("batch", "micro", "epochs"), [(8, 4, 1), (4, 4, 3), (2, 1, 2)])
def test_optimizer_steps_are_epochs_times_minibatches_and_each_pass_takes_each_completion_once(
    batch, micro, epochs, tmp_path, monkeypatch
):
    settings = stage(batch_size=batch, micro_batch_size=micro, update_epochs=epochs)
    counts, tokens = Counter(), []
    trainer = build(tmp_path, settings, updates=2)
    create, loss = trainer.create_optimizer, trainer.compute_loss

    def counted_optimizer(*args):
        optimizer = create(*args)
        optimizer.register_step_post_hook(lambda *_: counts.update(["steps"]))
        return optimizer

    def counted_loss(model, inputs, *args, **named):
        tokens.append(int(inputs["trained"].sum()))
        return loss(model, inputs, *args, **named)

    monkeypatch.setattr(trainer, "create_optimizer", counted_optimizer)
    monkeypatch.setattr(trainer, "compute_loss", counted_loss)
    trainer.train()
    assert counts["steps"] == 2 * epochs * (8 // batch)
    assert len(tokens) == 2 * epochs * (8 // micro)
    assert [line["step"] for line in lines(trainer)] == [1, 2]
    sampled = sum(line["completion/tokens"] * 8 for line in lines(trainer))
    assert sum(tokens) == epochs * sampled


def test_minibatches_are_whole_prompts_in_a_new_order_each_pass(tmp_path):
    settings = stage(completions_per_prompt=2, update_epochs=3)
    seen = build(tmp_path, settings).maker.make(0)
    found = list(ppo._minibatches(seen, settings, 0))
    passes = [found[i] + found[i + 1] for i in (0, 2, 4)]
    assert all(sorted(places) == list(range(8)) for places in passes)
    assert len({tuple(places) for places in passes}) > 1
    assert all(places[i] + 1 == places[i + 1] for places in passes for i in range(0, 8, 2))
    assert found != list(ppo._minibatches(seen, settings, 1))


# What is not trained on.


def test_unscored_and_empty_completions_give_no_gradient_and_the_rest_the_same_as_without_them(tmp_path, monkeypatch):
    def some(answered):
        return math.nan if answered.row["number"] % 2 else even(answered)

    trainer = watched(tmp_path, stage(), layout=Layout.forest, sources=[Scored(some)])
    found, places = steps(trainer, monkeypatch)
    valid = trainer.test_targets.trained.any(1)
    assert 0 < valid.sum() < 8
    moved(trainer)
    for at, own in enumerate(places[:2]):
        loss = loss_of(trainer, found[at])
        gradient = gradients(trainer.inner)
        trainer.inner.zero_grad()
        plain = plain_loss(trainer, own)
        plain.backward()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-4, abs=1e-6)
        assert (gradient - gradients(trainer.inner)).norm() < 2e-4 * gradient.norm()


@pytest.mark.parametrize("advantage", list(Advantage))
def test_an_update_without_any_score_moves_nothing_and_is_counted(advantage, tmp_path):
    settings = stage(advantage=advantage, completions_per_prompt=2)
    trainer = build(tmp_path, settings, sources=[Scored(lambda _: math.nan)])
    before = weights(trainer.inner.parameters())
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.inner.parameters(), strict=True))
    (line,) = lines(trainer)
    assert (line["completion/unscored"], line["completion/trained"], line["loss"]) == (1.0, 0.0, 0.0)
    assert all(math.isfinite(value) for value in line.values())


def test_a_policy_that_learns_gets_a_higher_reward(tmp_path):
    """The sign of it all: half of the tokens are even, and evenness is rewarded."""
    settings = stage(
        **WITHOUT_VALUE, completions_per_update=32, batch_size=16, micro_batch_size=16, learning_rate=3e-3,
        missing_stop_penalty=0.0, rollout_batch_size=32, kl_coefficient=0.01,
    )  # fmt: skip
    for weight in (1.0, -1.0):
        settings.rewards = {"mine": {"function": "some:function", "weight": weight}}
        share = Scored(lambda answered: float(np.mean([token % 2 == 0 for token in answered.completion_ids])))
        trainer = trained(tmp_path, settings, updates=10, layout=Layout.forest, sources=[share])
        first, last = lines(trainer)[0]["reward/mine"], lines(trainer)[-1]["reward/mine"]
        assert weight * (last - first) > 0.15
        assert lines(trainer)[-1]["kl/nats_per_completion"] > 0.1


# The knobs.


def test_an_entropy_bonus_raises_entropy_and_a_negative_sign_would_lower_it(tmp_path):
    same = Scored(lambda _: 0.0)
    settings = stage(**WITHOUT_VALUE, missing_stop_penalty=0.0, temperature=0.5, kl_coefficient=0.0, entropy_weight=1.0)
    line = lines(trained(tmp_path, settings, updates=4, sources=[same], layout=Layout.forest))
    assert line[-1]["policy/entropy"] > line[0]["policy/entropy"] + 0.1


def test_the_pretraining_mix_is_the_plain_loss_of_its_documents(tmp_path):
    texts = documents()
    unscored = [Scored(lambda _: math.nan)]
    for layout, micro in [(Layout.padded, 4), (Layout.forest, 2), (Layout.sequences, 1)]:
        settings = stage(**WITHOUT_VALUE, micro_batch_size=micro, pretraining_weight=0.25)
        trainer = build(tmp_path, settings, texts=texts, sources=unscored, layout=layout)
        for number, step in enumerate(steps_of(trainer)):
            loss = loss_of(trainer, step)
            gradient = gradients(trainer.inner)
            model = actor(settings).policy
            taken = [texts[(4 * number + i) % 5]["input_ids"] for i in range(4)]
            nll = -torch.stack([logp for ids in taken for logp in token_logps(model, ids[:1], ids[1:])]).mean()
            (0.25 * nll).backward()
            assert loss.item() == pytest.approx(0.25 * nll.item(), rel=1e-5)
            assert (gradient - gradients(model)).norm() < 1e-4 * gradient.norm()


def test_the_pretraining_mix_adds_to_the_loss_of_the_completions(tmp_path):
    results = []
    for extra in ({}, {"pretraining_weight": 0.25}):
        settings = stage(**extra)
        trainer = build(tmp_path, settings, texts=documents() if extra else None, layout=Layout.forest)
        results.append((loss_of(trainer, steps_of(trainer)[0]), gradients(trainer.inner)))
    model = actor(stage()).policy
    taken = [documents()[i]["input_ids"] for i in range(4)]
    nll = -torch.stack([logp for ids in taken for logp in token_logps(model, ids[:1], ids[1:])]).mean()
    (0.25 * nll).backward()
    assert (results[1][0] - results[0][0]).item() == pytest.approx(0.25 * nll.item(), rel=1e-4)
    own = gradients(model)
    difference = (results[1][1] - results[0][1])[: len(own)] - own
    assert difference.norm() < 1e-4 * own.norm()


def test_while_the_value_model_warms_up_the_policy_stays_bit_for_bit(tmp_path):
    settings = stage(value_warmup_updates=2)
    trainer = build(tmp_path, settings, updates=3)
    policy, value = (trainer.inner.parameter_groups()[name] for name in ("policy", "value"))
    start, snapshots = (weights(policy), weights(value)), []
    end_update = trainer.end_update
    trainer.end_update = lambda: snapshots.append((weights(policy), weights(value))) or end_update()
    trainer.train()
    for after_policy, after_value in snapshots[:2]:
        assert all(map(torch.equal, after_policy, start[0]))
        assert not any(map(torch.equal, after_value, start[1]))
    assert not any(map(torch.equal, snapshots[2][0], start[0]))
    assert lines(trainer)[1]["kl/nats_per_completion"] == 0.0


def test_without_a_value_model_there_is_no_warm_up(tmp_path):
    settings = stage(**WITHOUT_VALUE, value_warmup_updates=5)
    trainer = build(tmp_path, settings)
    before = weights(trainer.inner.parameters())
    trainer.train()
    assert not any(map(torch.equal, before, trainer.inner.parameters()))
    assert not any(name.startswith("value") for name in lines(trainer)[0])


def test_policy_and_value_model_have_learning_rates_of_their_own(tmp_path):
    settings = stage(learning_rate=1e-4, value_learning_rate=3e-3, batch_size=8, micro_batch_size=8, update_epochs=1)
    trainer = build(tmp_path, settings)
    groups = trainer.inner.parameter_groups()
    before = {name: weights(group) for name, group in groups.items()}
    trainer.train()
    # The first step of Adam is the learning rate, where the gradient is not small against epsilon.
    for name, rate in (("policy", 1e-4), ("value", 3e-3)):
        step = max((a - b).abs().max().item() for a, b in zip(before[name], groups[name], strict=True))
        assert step == pytest.approx(rate, rel=0.05)
    assert lines(trainer)[0]["learning_rate"] == 1e-4
    plain = build(tmp_path, stage(learning_rate=1e-4))
    plain.create_optimizer_and_scheduler(1)
    assert [group["lr"] for group in plain.optimizer.param_groups] == [1e-4, 1e-4]


def test_a_schedule_and_the_warm_up_follow_optimizer_steps_in_both_groups(tmp_path):
    settings = stage(value_warmup_updates=1, value_learning_rate=2e-3)
    trainer = build(tmp_path, settings, updates=2, schedule="linear")
    rates, create = [], trainer.create_optimizer

    def watched_optimizer(*args):
        optimizer = create(*args)
        optimizer.register_step_pre_hook(lambda own, *_: rates.append([group["lr"] for group in own.param_groups]))
        return optimizer

    trainer.create_optimizer = watched_optimizer
    trainer.train()
    left = [1 - step / 8 for step in range(8)]
    assert [value for _, value in rates] == pytest.approx([2e-3 * share for share in left])
    assert [policy for policy, _ in rates] == pytest.approx([0.0] * 4 + [1e-3 * share for share in left[4:]])


def test_importance_weights_scale_the_loss_of_their_tokens(tmp_path):
    settings = stage(**WITHOUT_VALUE, importance_cap=1.5)
    trainer = build(tmp_path, settings)
    make = trainer.maker.make

    def as_sampled_elsewhere(update):
        seen = make(update)
        seen.sampler_logps = seen.logps - 0.3 * torch.sin(torch.arange(seen.logps.numel())).view_as(seen.logps)
        return seen

    trainer.maker.make = as_sampled_elsewhere
    found = steps_of(trainer)[0]
    [batch] = found
    expected = torch.exp(batch["old_logps"] - batch["old_logps"] + 0 * batch["weights"])
    assert batch["weights"].std() > 0.1
    assert not torch.equal(batch["weights"], expected)
    # On the first minibatch the ratio is 1: the loss is minus the mean of weight times advantage.
    wanted = -(batch["weights"] * batch["advantages"]).sum() / batch["tokens"]
    assert loss_of(trainer, found).item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6)


def test_an_adaptive_kl_weight_follows_the_kl_and_is_used_in_the_next_update(tmp_path):
    options = {"kl_controller": KLController.adaptive, "kl_horizon_completions": 40, "kl_coefficient": 0.1}
    up = lines(trained(tmp_path, stage(kl_target_nats_per_completion=1e-6, **options), updates=3))
    down = lines(trained(tmp_path, stage(kl_target_nats_per_completion=100.0, **options), updates=3))
    for found in (up, down):
        coefficient = 0.1
        target = 1e-6 if found is up else 100.0
        for line in found:
            assert line["kl/coefficient"] == pytest.approx(coefficient, rel=1e-12)
            error = min(max(line["kl/nats_per_completion"] / target - 1, -0.2), 0.2)
            coefficient *= 1 + error * 8 / 40
    assert len({line["kl/coefficient"] for line in up}) == 3
    assert down[2]["kl/coefficient"] == pytest.approx(0.1 * 0.96**2)
    objective = up[2]["reward/total"] - up[2]["kl/coefficient"] * up[2]["kl/nats_per_completion"]
    assert up[2]["objective"] == pytest.approx(objective)


def test_an_adaptive_kl_weight_reaches_the_loss(tmp_path):
    settings = stage(**WITHOUT_VALUE, kl_place=KLPlace.loss, kl_controller=KLController.adaptive, kl_coefficient=0.5)
    trainer = build(tmp_path, settings)
    trainer.controller.coefficient = 2.0
    assert steps_of(trainer)[0][0]["kl_coefficient"].item() == 2.0


def test_the_moving_average_is_that_of_the_weights_after_each_step(tmp_path):
    trainer = build(tmp_path, stage(ema_decay=0.8), updates=2)
    policy = trainer.inner.parameter_groups()["policy"]
    expected, seen = [one.double() for one in weights(policy)], []
    step = trainer.end.on_step_end

    def loop(*args, **named):
        nonlocal expected
        expected = [0.8 * old + 0.2 * new.double() for old, new in zip(expected, weights(policy), strict=True)]
        seen.append(1)
        return step(*args, **named)

    trainer.end.on_step_end = loop
    trainer.train()
    assert len(seen) == 8
    for found, wanted in zip(trainer.average.averages, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert any((now.double() - wanted).abs().max() > 1e-3 for now, wanted in zip(policy, expected, strict=True))


def test_training_sees_no_dropout(tmp_path):
    settings = stage()
    trainer = build(tmp_path, settings, model=actor(settings, "gpt2"), reference=actor(settings, "gpt2"))
    assert not any(module.p for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout))
    trainer.train()
    assert lines(trainer)[0]["policy/ratio_first"] < 1e-4


# Guards, checkpoints and samples.


class AlarmAt:
    """Guards that raise one alarm at an update."""

    def __init__(self, update: int, guard: Guard = Guard.kl):
        self.update, self.guard, self.raised = update, guard, []

    def observe(self, update, figures):
        return [Alarm(self.guard, "too far")] if update == self.update else []

    def state_dict(self):
        return {}


def rising_then_falling(trainer: list[PPOTrainer]):
    """Scores by update: 1, 3, 2, 0, 0 ..., and a little for each completion to learn from."""
    return lambda one: {0: 1.0, 1: 3.0, 2: 2.0}.get(trainer[0].update, 0.0) + 0.1 * even(one)


def guarded(folder, settings, guards, **options) -> PPOTrainer:
    box: list[PPOTrainer] = []
    trainer = build(folder, settings, updates=6, save_every=1, sources=[Scored(rising_then_falling(box))], **options)
    box.append(trainer)
    trainer.guards = guards
    return trainer


def test_a_guard_that_stops_ends_the_run_and_the_best_checkpoint_is_kept(tmp_path):
    settings = stage(**WITHOUT_VALUE, kl_coefficient=0.0, missing_stop_penalty=0.0, stop_on=[Guard.kl])
    trainer = guarded(tmp_path, settings, AlarmAt(5), save_total_limit=1)
    snapshots = {}
    end_update = trainer.end_update

    def kept():
        snapshots[trainer.update] = weights(trainer.inner.parameters())
        return end_update()

    trainer.end_update = kept
    trainer.train()
    assert [line["step"] for line in lines(trainer)] == [1, 2, 3, 4, 5]
    assert trainer.end.stopped_by == "too far"
    assert trainer.best_checkpoint == tmp_path / f"checkpoint-{2 * trainer.steps_per_update}"
    assert not all(map(torch.equal, trainer.inner.parameters(), snapshots[2]))
    trainer.load_weights(trainer.best_checkpoint)
    assert all(map(torch.equal, trainer.inner.parameters(), snapshots[2]))


def test_a_guard_that_is_not_asked_to_stop_only_warns(tmp_path, capsys):
    settings = stage(**WITHOUT_VALUE, kl_coefficient=0.0, stop_on=[Guard.value])
    trainer = guarded(tmp_path, settings, AlarmAt(2))
    trainer.train()
    assert len(lines(trainer)) == 6 and trainer.end.stopped_by is None
    assert capsys.readouterr().err.count("ppo: WARN too far") == 1
    assert trainer.alerts == [("ppo: kl", "too far")]


def test_the_best_checkpoint_is_that_of_the_objective_less_the_kl_in_the_reward(tmp_path):
    """Between two checkpoints the mean of their updates counts."""
    settings = stage(**WITHOUT_VALUE, kl_coefficient=0.0, missing_stop_penalty=0.0)
    box: list[PPOTrainer] = []
    scores = {0: 0.0, 1: 9.0, 2: 8.0, 3: 7.0, 4: 0.0, 5: 14.0}
    source = Scored(lambda _: scores[box[0].update])
    trainer = build(tmp_path, settings, updates=6, save_every=2, sources=[source])
    box.append(trainer)
    trainer.train()
    assert trainer.best_checkpoint.name == f"checkpoint-{4 * trainer.steps_per_update}"
    assert trainer.state.best_metric == 7.5


def test_samples_are_greedy_answers_to_the_first_held_out_prompts_before_during_and_after(tmp_path):
    settings = stage(sample_every=2)
    trainer = build(tmp_path, settings, updates=5, samples=True)
    start = copy.deepcopy(trainer.inner.policy)
    trainer.train()
    found = read_samples(tmp_path / "samples.jsonl")
    assert [(line["step"], line["place"]) for line in found] == [(s, p) for s in (0, 2, 4, 5) for p in (0, 1, 2)]
    rows = prompt_rows(5, seed=9)
    for policy, at in ((start, 0), (trainer.inner.policy, 5)):
        for line in [line for line in found if line["step"] == at]:
            ids = greedy(policy, rows[line["place"]]["prompt_ids"])
            assert line["prompt"] == f"Question {line['place']}?"
            assert line["completion"] == " ".join(str(token) for token in ids if token not in (0, *STOPS))
            assert line["tokens"] == len(ids) and line["finished"] == (ids[-1] in STOPS)
            share = float(np.mean([token % 2 == 0 for token in ids])) + 0.01 * ids[0]
            assert line["score"] == line["scores"]["mine"] == pytest.approx(share)
    logged = [line for line in lines(trainer) if "samples/score" in line]
    assert [line["step"] for line in logged] == [2, 4, 5]
    last = [line["score"] for line in found if line["step"] == 5]
    assert logged[-1]["samples/score"] == pytest.approx(np.mean(last))
    assert trainer.end.summary()["after/samples/score"] == pytest.approx(np.mean(last))
    keep_until(tmp_path / "samples.jsonl", 2)
    assert [line["step"] for line in read_samples(tmp_path / "samples.jsonl")] == [0] * 3 + [2] * 3


def test_a_sample_without_a_score_is_null_in_the_file_and_left_out_of_the_mean(tmp_path):
    met = iter(range(3))
    source = Scored(lambda _: math.nan if next(met) == 1 else 3.0)
    trainer = build(tmp_path, stage(), updates=1, samples=True, sources=[source])
    found, figures = trainer.end.samples.take(0)
    assert figures["samples/score"] == 3.0
    assert [line["score"] for line in found] == [3.0, None, 3.0]
    keep_until(tmp_path / "samples.jsonl", 5)
    for text, line in zip((tmp_path / "samples.jsonl").read_text().splitlines(), found, strict=True):
        assert json.loads(text, parse_constant=pytest.fail) == line
        assert line["scores"] == {"mine": line["score"]}
    assert means(read_samples(tmp_path / "samples.jsonl")) == figures


def greedy(model, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    while len(ids) - len(prompt) < 6:
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in STOPS:
            break
    return ids[len(prompt) :]


def test_samples_do_not_change_what_is_trained(tmp_path):
    plain = trained(tmp_path / "a", stage(), updates=2)
    sampled = trained(tmp_path / "b", stage(sample_every=1), updates=2, samples=True)
    assert all(map(torch.equal, plain.inner.parameters(), sampled.inner.parameters()))


def test_a_checkpoint_holds_controller_moments_guards_and_average(tmp_path):
    settings = stage(kl_controller=KLController.adaptive, ema_decay=0.9, kl_horizon_completions=40)
    trainer = trained(tmp_path, settings, updates=2, save_every=2)
    folder = tmp_path / f"checkpoint-{2 * trainer.steps_per_update}"
    state = json.loads((folder / "ppo.json").read_text())
    assert state["controller"]["coefficient"] == trainer.controller.coefficient != 0.05
    again = build(tmp_path / "other", settings, updates=3)
    again.restore(folder)
    again.start_average(folder)
    assert again.first_update == 2
    assert again.controller.coefficient == trainer.controller.coefficient
    assert again.guards.state_dict() == trainer.guards.state_dict()
    assert all(map(torch.equal, again.average.averages, trainer.average.averages))
