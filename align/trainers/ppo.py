"""PPO on transformers' Trainer: micro-batches come from a rollout, one loss a token out.

The Trainer does what it does for every stage: optimizer steps, DDP and DeepSpeed, checkpoints, schedules. Ours are the
loader, whose batches are made by the policy as it is when they are asked for, and the loss.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from align.artifacts import read_json, write_json
from align.config.errors import Stopped
from align.config.rewards import parse_rewards
from align.config.schema import Advantage, KLController, KLEstimator, KLPlace, Layout, PPOStage
from align.data.forest import Tree, lay_out
from align.data.template import Template
from align.distributed import runtime
from align.generation import rollout
from align.generation.checkpoint_weights import checkpoint_weights
from align.generation.rollout import Completion
from align.generation.vllm_rollout import VllmSampler
from align.losses.controllers import AdaptiveKL, FixedKL, RunningMoments
from align.losses.ppo import clipped_policy_loss, clipped_value_loss, kl_estimate, kl_loss
from align.models.actor_critic import ActorCritic, Read
from align.models.layout import plain_model
from align.tracking.progress import Progress
from align.trainers.advantages import Targets, find_targets
from align.trainers.callbacks import END_OF_TRAINING
from align.trainers.experience import Batch, Experience, ExperienceMaker, Readers, RewardSource, prompt_of, trees_of
from align.trainers.guards import Guards
from align.trainers.moving_average import MovingAverage
from align.trainers.nonfinite import poisoned
from align.trainers.stopping import StopTogether
from align.trainers.surviving import SurvivingTrainer
from align.trainers.trees import turn_dropout_off
from align.trainers.whole import gathered

STATE = "ppo.json"
WEIGHTS = "model.safetensors"
ADAM_EPSILON = 1e-5
"""As in the PPO of Huang et al. 2024, arXiv:2403.17031: advantages are of size 1, their gradients need not be."""
PER_TOKEN = ("old_logps", "reference_logps", "advantages", "returns", "old_values", "weights")


class Updates:
    """The micro-batches of every update from `first` on: what the Trainer takes for its data loader."""

    def __init__(self, trainer: "PPOTrainer", first: int, total: int, batches_per_update: int):
        self.trainer, self.first, self.total, self.batches_per_update = trainer, first, total, batches_per_update

    def __len__(self) -> int:
        return self.total * self.batches_per_update

    def __iter__(self) -> Iterator[Batch]:
        for update in range(self.first, self.total):
            yield from self.trainer.update_batches(update)


class PPOTrainer(SurvivingTrainer):
    """Trains an `ActorCritic` on what it samples for prompts.

    Every rank holds the whole experience of an update, so that minibatches, whitening and figures do not depend on how
    many ranks there are. prompts: rows of `align.data.prompt_rows.PROMPTS`. `begin` must be called before `train`.
    """

    def __init__(
        self,
        model: ActorCritic,
        args: TrainingArguments,
        settings: PPOStage,
        *,
        updates: int,
        prompts: Dataset,
        template: Template,
        texts: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        """texts: rows of `data.text`, mixed in with pretraining_weight. args.max_steps is counted here: any value."""
        turn_dropout_off(model)
        self.settings, self.updates, self.prompts, self.texts = settings, updates, prompts, texts
        self.template = template
        self.minibatches = settings.completions_per_update // settings.batch_size
        self.steps_per_update = settings.update_epochs * self.minibatches
        args.max_steps = updates * self.steps_per_update
        super().__init__(model=model, args=args, processing_class=None, callbacks=callbacks)
        # Documented switch of the Trainer: the loss is divided by the tokens of the whole step, so not once more.
        self.loss_is_scaled_for_ga = True
        self.rewards = parse_rewards(settings.rewards)
        self.controller = _controller(settings)
        self.moments, self.guards = RunningMoments(), Guards(bf16=args.bf16)
        self.average: MovingAverage | None = None
        self.first_update = 0
        self.seconds: dict[str, float] = {}
        self._sums: list[Tensor] = []
        self._prompts_of_step: list[int] = []
        self.stop: StopTogether | None = None

    def begin(
        self,
        layout: Layout,
        sources: Sequence[RewardSource],
        reference: nn.Module | None,
        offload: bool,
        engine: VllmSampler | None = None,
    ) -> None:
        """Take what is made with this trainer's accelerator: the proven layout, the rewards, the frozen reference.

        engine: what samples in place of the model that is trained; it is given the policy's weights each time.
        """
        self.layout = layout
        self.inner.attach(layout)
        self.reference, self.sources, self.offload, self.engine = reference, sources, offload, engine
        readers = Readers(
            self._read_tokens,
            self._read_reference if reference is not None or self._reference_inside else None,
            self.sample,
            self.frozen_on_device,
        )
        self.maker = ExperienceMaker(
            self.settings, prompts=self.prompts, template=self.template, sources=sources, readers=readers,
            layout=layout, accelerator=self.accelerator, watch=self._timed,
        )  # fmt: skip

    @property
    def inner(self) -> ActorCritic:
        """The module inside DDP or DeepSpeed."""
        return self.model

    @property
    def update(self) -> int:
        """Updates that are complete."""
        return self.state.global_step // self.steps_per_update

    @property
    def _reference_inside(self) -> bool:
        return self.inner.has_own_reference and self.settings.kl_coefficient > 0

    # What reads, with the model as it is wrapped.

    def _read_tokens(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        self.model_wrapped.eval()
        with self.accelerator.autocast():
            found = self.model_wrapped(batch, entropies=True)
        return found.logps, found.values, found.entropies

    def _read_reference(self, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            if self.reference is None:
                self.model_wrapped.eval()
                return self.model_wrapped(batch, read=Read.reference)
            return self.reference(batch).logps

    @contextlib.contextmanager
    def generating(self) -> Iterator[nn.Module]:
        """Inside: the policy with whole weights, ready to sample; ZeRO-3 gathers them once."""
        self.model_wrapped.eval()
        with contextlib.ExitStack() as stack:
            policy = stack.enter_context(self.inner.generating())
            stack.enter_context(gathered(self.model_wrapped, policy))
            stack.enter_context(self.accelerator.autocast())
            yield policy

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        per_prompt: int,
        seeds: Sequence[int],
        temperature: float,
        progress: Progress | None,
    ) -> list[Completion]:
        """Completions of the policy as it is now, as `rollout.sample` says. Call it on every rank, prompts or none."""
        asked: dict[str, Any] = {
            "per_prompt": per_prompt,
            "seeds": seeds,
            "stop_token_ids": sorted(self.template.stop_token_ids),
            "max_new_tokens": self.settings.max_new_tokens,
            "temperature": temperature,
            "progress": progress,
        }
        with self.generating() as policy:
            if self.engine is None:
                pad, size = self.template.tokenizer.pad_token_id, self.settings.rollout_batch_size
                return rollout.sample(policy, prompts, pad_token_id=pad, batch_size=size, **asked)
            self.engine.load(checkpoint_weights(plain_model(policy)))
        # Gathered weights are given back first: the engine has its own.
        return self.engine.sample(prompts, **asked)

    @contextlib.contextmanager
    def frozen_on_device(self) -> Iterator[None]:
        """Frozen models in main memory come to the device and leave it again, with stages.ppo.offload_frozen."""
        models = [getattr(source, "model", None) for source in self.sources] + [self.reference]
        moving = [model for model in models if self.offload and model is not None and model is not self.model_wrapped]
        for model in moving:
            model.to(self.accelerator.device)
        yield
        for model in moving:
            model.to("cpu")
        if moving and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[Progress]:
        started = time.monotonic()
        share = self.settings.completions_per_update // self.accelerator.num_processes
        label = f"ppo: update {self.update + 1} of {self.updates}: {name}"
        progress = Progress(label, share, active=self.accelerator.is_main_process, passing=True)
        yield progress
        progress.close()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started

    # The batches of an update.

    def get_train_dataloader(self) -> Updates:
        """Not prepared by accelerate, which would make the next batch before the step on this one."""
        batches = self.steps_per_update * self.args.gradient_accumulation_steps
        return Updates(self, self.first_update, self.updates, batches)

    def update_batches(self, update: int) -> Iterator[Batch]:
        """This rank's micro-batches of an update, step by step; the first one asked for makes the rollout.

        None if a rank was told to stop meanwhile: the rollout is thrown away, and the Trainer saves what was before it.
        """
        seen = self.maker.make(update)
        if self.stop is not None and self.stop.check(self.control):
            if self.state.global_step == self._initial_global_step:
                raise Stopped(f"ppo: stopped by {self.stop.signal} in the first rollout")
            return
        targets = find_targets(
            seen, self.settings, self.rewards, kl_coefficient=self.controller.coefficient, moments=self.moments
        )
        self._start_update(seen, targets)
        for step, places in enumerate(_minibatches(seen, self.settings, update)):
            yield from self._rank_batches(seen, targets, places, update * self.steps_per_update + step)

    def _start_update(self, seen: Experience, targets: Targets) -> None:
        self.figures = targets.figures
        self._sums, self.skipped_steps = [], 0
        self.completions, self.tokens = len(seen), int(seen.mask.sum())
        self.learning_rate = self.lr_scheduler.get_last_lr()[0]
        self.update_started = time.monotonic()

    def _rank_batches(self, seen: Experience, targets: Targets, places: Sequence[int], step: int) -> Iterator[Batch]:
        self._prompts_of_step = seen.group[list(places)].tolist()
        size, ranks = self.settings.micro_batch_size, self.accelerator.num_processes
        share = len(places) // ranks
        start = self.accelerator.process_index * share
        tokens = float(targets.trained[list(places)].sum())
        texts = self._texts_of(step, len(places))
        for first in range(start, start + share, size):
            own = list(places[first : first + size])
            yield self._batch(seen, targets, own, tokens, texts, slice(first, first + size))

    def _texts_of(self, step: int, count: int) -> list[list[int]]:
        """The documents mixed into an optimizer step, one a completion, in file order round and round."""
        if self.texts is None:
            return []
        return [self.texts[(step * count + i) % len(self.texts)]["input_ids"] for i in range(count)]

    def _batch(
        self, seen: Experience, targets: Targets, own: list[int], tokens: float, texts: list[list[int]], part: slice
    ) -> Batch:
        """The forest of some completions, with the numbers of their tokens (S,) and of the whole step ()."""
        trees = trees_of(
            *([column[i] for i in own] for column in (seen.prompts, seen.completions, seen.group.tolist()))
        )
        mixed = [Tree(ids[:1], [ids[1:]]) for ids in texts[part]]
        batch = lay_out([*trees, *mixed], self.layout, self.template.tokenizer.pad_token_id)
        mask = seen.mask[own]
        further = sum(len(ids) - 1 for ids in texts[part])

        def flat(values: Tensor) -> Tensor:
            return torch.cat([values[own][mask], values.new_zeros(further)])

        columns = (seen.logps, seen.reference_logps, targets.advantages, targets.returns, seen.values, targets.weights)
        batch |= {name: flat(column) for name, column in zip(PER_TOKEN, columns, strict=True)}
        batch |= {"trained": flat(targets.trained), "mixed": torch.arange(len(batch["targets"])) >= int(mask.sum())}
        numbers = {"tokens": max(tokens, 1.0), "kl_coefficient": self.controller.coefficient}
        numbers["mixed_tokens"] = float(max(sum(len(ids) - 1 for ids in texts), 1))
        return batch | {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}

    # The step.

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """The batch on its device in its own precision; with bf16 the Trainer would round log-probabilities."""
        return {key: value.to(self.args.device) for key, value in inputs.items()}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Sum over the tokens of this micro-batch, over the tokens of the whole step on all ranks."""
        settings, trained = self.settings, inputs["trained"]
        found = model(inputs, entropies=settings.entropy_weight > 0)
        logps = found.logps[trained]
        seen = {name: inputs[name][trained] for name in PER_TOKEN}
        losses, clipped = clipped_policy_loss(
            logps, seen["old_logps"], seen["advantages"],
            clip_low=settings.clip_low, clip_high=settings.clip_high, dual_clip=settings.dual_clip,
        )  # fmt: skip
        policy = (seen["weights"] * losses).sum()
        if settings.kl_place is KLPlace.loss and settings.kl_coefficient:
            kl = kl_loss(logps, seen["reference_logps"], settings.kl_estimator)
            policy = policy + inputs["kl_coefficient"].to(kl) * kl.sum()
        if settings.entropy_weight:
            policy = policy - settings.entropy_weight * found.entropies[trained].sum()
        value, value_clipped = _value_loss(found.values, trained, seen, settings)
        loss = (policy + settings.value_weight * value) / inputs["tokens"]
        if self.texts is not None:
            mixed = -found.logps[inputs["mixed"]].sum() / inputs["mixed_tokens"]
            loss = loss + settings.pretraining_weight * mixed
        self._note(logps, seen["old_logps"], policy, value, clipped, value_clipped)
        # Gradients are averaged over ranks, and the tokens are those of all ranks.
        return poisoned((loss * self.accelerator.num_processes).float())

    # Of a step that was skipped because it was not finite.

    @property
    def train_rows(self) -> Dataset:
        return self.prompts

    def rows_of_step(self) -> list[int]:
        """Rows of `prompts` that the completions of this step answer, ascending."""
        rows, seed = len(self.prompts), self.settings.seed
        return sorted({prompt_of(position, rows, seed) for position in self._prompts_of_step})

    def figures_so_far(self) -> int:
        return len(self._sums)

    def forget_figures(self, before: int) -> None:
        self._sums[before:] = [torch.zeros_like(sums) for sums in self._sums[before:]]
        self.skipped_steps += 1

    @torch.no_grad()
    def _note(
        self, logps: Tensor, old: Tensor, policy: Tensor, value: Tensor, clipped: Tensor, value_clipped: Tensor
    ) -> None:
        """Sums over the tokens of a micro-batch, kept on the device until the update is over."""
        ratio = torch.exp(logps - old)
        moved = kl_estimate(old, logps, KLEstimator.k3).sum()
        off = (ratio - 1).abs()
        largest = ratio.max() if len(ratio) else ratio.new_zeros(())
        sums = (
            policy,
            value,
            clipped.sum(),
            value_clipped.sum(),
            moved,
            off.sum(),
            largest,
            ratio.new_tensor(len(ratio)),
        )
        self._sums.append(torch.stack([number.detach().double() for number in sums]))

    # The end of an update.

    def end_update(self) -> dict[str, float]:
        """The figures of the update that has just ended, over all ranks; steps the KL controller."""
        seconds = self.seconds | {"update": time.monotonic() - self.update_started}
        self.seconds.clear()
        figures = dict(self.figures) | self._step_figures()
        if self.skipped_steps:
            figures["skipped_steps"] = self.skipped_steps
        figures["learning_rate"] = self.learning_rate
        figures["objective"] = figures["reward/total"]
        if self.settings.kl_place is KLPlace.reward:
            figures["objective"] -= self.controller.coefficient * figures["kl/nats_per_completion"]
        self.controller.update(figures["kl/nats_per_completion"], self.completions)
        figures |= {f"seconds/{name}": round(took, 3) for name, took in seconds.items()}
        figures["tokens_per_second"] = round(self.tokens / max(sum(seconds.values()), 1e-9), 1)
        return {name: float(value) for name, value in figures.items()}

    def _step_figures(self) -> dict[str, float]:
        """Means over the tokens of all optimizer steps of the update; of the first step how far it is off-policy."""
        accumulation = self.args.gradient_accumulation_steps
        own = torch.stack(self._sums).cpu()
        first, largest = own[:accumulation].sum(0), own[:, 6].max().item()
        parts = runtime.gather((own.sum(0).tolist(), first.tolist(), largest))
        whole, first_step = (np.sum([part[i] for part in parts], axis=0) for i in (0, 1))
        tokens = max(whole[7], 1.0)
        figures = {
            "loss": (whole[0] + self.settings.value_weight * whole[1]) / tokens,
            "policy/loss": whole[0] / tokens,
            "policy/clipped": whole[2] / tokens,
            "policy/approx_kl": whole[4] / tokens,
            "policy/ratio_first": first_step[5] / max(first_step[7], 1.0),
            "policy/ratio_max": max(part[2] for part in parts),
        }
        if self.inner.has_value:
            figures |= {"value/loss": whole[1] / tokens, "value/clipped": whole[3] / tokens}
        return figures

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line an update; `step` counts updates, and no epoch is added, which a resumed run would count anew."""
        if END_OF_TRAINING in logs:
            return
        self.state.log_history.append({"step": self.update, **logs})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    # Optimizer: two learning rates.

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group of parameters for the policy and one for the value model, each with its learning rate."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            value_rate = self.settings.value_learning_rate or self.settings.learning_rate
            rates = {"policy": self.settings.learning_rate, "value": value_rate}
            groups = [
                {"params": parameters, "lr": rates[name], "weight_decay": self.args.weight_decay}
                for name, parameters in self.inner.parameter_groups().items()
                if parameters
            ]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The Trainer's, with the policy held still while only the value model learns."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        still = self.settings.value_warmup_updates * self.steps_per_update
        if still and self.settings.advantage is Advantage.gae:
            follow = scheduler.lr_lambdas[0]
            # A rate of 0, not a gradient of 0: Adam's moments are then of real gradients when the policy starts.
            held = [lambda step: 0.0 if step < still else follow(step), follow]
            self.lr_scheduler = LambdaLR(scheduler.optimizer, held)
        return self.lr_scheduler

    # Checkpoints: of everything.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What a checkpoint needs of the model; DeepSpeed writes its own. A finished model is saved by the stage."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
        if not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call=True)

    def save_state(self, folder: Path | None = None) -> None:
        """What the Trainer does not know of: controller, reward moments, guards, moving average. On every rank."""
        assert folder is not None
        if self.average is not None:
            self.average.save(folder / f"average-{self.accelerator.process_index}.safetensors")
        if self.args.should_save:
            write_json(folder / STATE, {name: part.state_dict() for name, part in self._parts().items()})

    def restore(self, folder: Path | None) -> None:
        """Take up what `save_state` wrote, before `train`, and start the moving average."""
        if folder is None:
            return
        state = read_json(folder / STATE)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.first_update = read_json(folder / "trainer_state.json")["global_step"] // self.steps_per_update

    def start_average(self, folder: Path | None) -> None:
        """Begin the moving average with the weights as they are, or as it was at the checkpoint `folder`."""
        if self.settings.ema_decay:
            self.average = MovingAverage(self.inner.parameter_groups()["policy"], self.settings.ema_decay)
            if folder is not None:
                self.average.load(folder / f"average-{self.accelerator.process_index}.safetensors")

    def load_weights(self, checkpoint: Path) -> None:
        """Put the weights of a checkpoint of this run in place of those there are, on every rank."""
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, str(checkpoint))
        else:
            from safetensors.torch import load_file

            self.inner.load_state_dict(load_file(checkpoint / WEIGHTS))

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint whose updates had the highest objective, if one was written."""
        best = self.state.best_model_checkpoint
        return Path(best) if best is not None and Path(best).is_dir() else None

    def whole_state(self) -> Mapping[str, Tensor]:
        """Every tensor of the model, whole, as rank 0 will save it. Call it on every rank."""
        return self.accelerator.get_state_dict(self.model_wrapped)

    def _parts(self) -> dict[str, Any]:
        return {"controller": self.controller, "moments": self.moments, "guards": self.guards}


def _controller(settings: PPOStage) -> FixedKL | AdaptiveKL:
    if settings.kl_controller is KLController.fixed:
        return FixedKL(settings.kl_coefficient)
    return AdaptiveKL(
        settings.kl_coefficient,
        target_nats_per_completion=settings.kl_target_nats_per_completion,
        horizon_completions=settings.kl_horizon_completions,
    )


def _minibatches(seen: Experience, settings: PPOStage, update: int) -> Iterator[list[int]]:
    """Places of the completions of each optimizer step, prompts in a new order each epoch, the same on every rank."""
    each = settings.completions_per_prompt
    for epoch in range(settings.update_epochs):
        order = np.random.default_rng([settings.seed, update, epoch]).permutation(len(seen) // each)
        places = [prompt * each + k for prompt in order.tolist() for k in range(each)]
        for start in range(0, len(places), settings.batch_size):
            yield places[start : start + settings.batch_size]


def _value_loss(
    values: Tensor | None, trained: Tensor, seen: Mapping[str, Tensor], settings: PPOStage
) -> tuple[Tensor, Tensor]:
    """The sum of the value loss and which tokens were clipped; zero without a value model."""
    if values is None:
        return seen["returns"].new_zeros(()), torch.zeros_like(seen["returns"], dtype=torch.bool)
    losses, clipped = clipped_value_loss(values[trained], seen["old_values"], seen["returns"], clip=settings.value_clip)
    return losses.sum(), clipped
