"""The models of a PPO run: policy and value to train, reference and rewards to read, and the layout they all take."""

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftConfig as AdapterConfig
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from align.config.errors import UserError
from align.config.rewards import RewardSetting
from align.config.schema import Advantage, Layout, PeftMethod, PPOStage
from align.data.encoded import token_lengths
from align.data.forest import Tree
from align.data.prompt_rows import read_record
from align.data.template import Template
from align.distributed import zero
from align.models import load
from align.models.actor_critic import ActorCritic, Read
from align.models.layout import TOKEN_LOGPS, ProvenLayout, Reading, prove_layout
from align.models.reward import SCORE_HEAD, SCORES, centre_of, check_reward_model, has_score_head
from align.models.shared_base import SharedBase
from align.stages.adapters import trained_words
from align.stages.rows import load_template
from align.stages.saving import ADAPTER
from align.stages.session import Session
from align.tracking.progress import say
from align.trainers.experience import FORWARD, RewardSource
from align.trainers.ppo import PPOTrainer
from align.trainers.reference import reference_engine
from align.trainers.reward_sources import FunctionReward, ModelReward

# Each needs more of a model than the ones behind it, and all are as exact where they are proven.
LAYOUTS = (Layout.forest, Layout.sequences, Layout.padded)


@dataclass(frozen=True)
class Models:
    """What a run is made of, by its config. Every method that loads must be called on every rank, in the same order."""

    session: Session
    stage: PPOStage
    rewards: list[RewardSetting]

    @property
    def has_value(self) -> bool:
        return self.stage.advantage is Advantage.gae

    @property
    def shared(self) -> bool:
        """Whether policy, value and reference share one base."""
        return self.session.context.config.peft.method is not PeftMethod.none

    @property
    def first_model(self) -> RewardSetting | None:
        """The first reward that is a model."""
        return next((setting for setting in self.rewards if setting.model), None)

    def say(self, line: str) -> None:
        say(f"{self.session.context.stage_name}: {line}", active=self.session.context.runtime.is_main)

    def check_rewards(self) -> None:
        """Raises: UserError if one is no reward model or no function. Loads no weights, so it may come first."""
        for setting in self.rewards:
            if setting.model is None:
                FunctionReward(setting)
            else:
                check_reward_model(setting.model, self.session.context.config.model)

    # The layout.

    def prove_layout(self) -> Layout:
        """The layout that policy and value model are proven to take; both are loaded for it, and freed."""
        arguments = TrainingArguments(**self.session.argument_values())
        policy = self.session.load_frozen(self.stage.policy)
        # One for both: accelerate takes DeepSpeed's settings once.
        accelerator = Trainer(model=policy, args=arguments).accelerator
        proven = self._proven(policy, accelerator, TOKEN_LOGPS)
        if self.has_value and not self.shared and proven.layout is not Layout.padded:
            critic = self.session.load_frozen(self.value_path(), scores=True)
            other = self._proven(critic, accelerator, SCORES)
            proven = max(proven, other, key=lambda one: LAYOUTS.index(one.layout))
        self.say(f"layout {proven.layout.value} ({proven.reason})")
        gc.collect()
        return proven.layout

    def _proven(self, model: PreTrainedModel, accelerator: Accelerator, reading: Reading) -> ProvenLayout:
        return self._proven_engine(
            reference_engine(model, accelerator), self.session.template, reading, self.stage.layout, accelerator.device
        )

    def _proven_engine(
        self, engine: nn.Module, template: Template, reading: Reading, wanted: Layout, device: torch.device
    ) -> ProvenLayout:
        return prove_layout(
            engine, self._real_trees(template), wanted, pad_token_id=template.tokenizer.pad_token_id or 0,
            device=device, reading=reading,
        )  # fmt: skip

    def _real_trees(self, template: Template) -> list[Tree]:
        """The longest prompts with their second halves, and each other's, for completions: nothing is sampled yet."""
        rows = self.session.prepared.train
        longest = np.argsort(-token_lengths(rows, "prompt_ids"), kind="stable")[:2].tolist()
        records = [read_record(rows[place]) for place in longest]
        halves = []
        for ids in (template.encode_prompt(record.messages, record.tools) for record in records):
            cut = max(1, len(ids) // 2)
            halves.append((ids[:cut], ids[cut:] or ids[:1]))
        return [Tree(start, [end, *(other for _, other in halves if other != end)]) for start, end in halves]

    # What is trained.

    def actor(self) -> ActorCritic:
        """Policy and value model. Call after the run's TrainingArguments were made (ZeRO-3)."""
        policy = self.session.load_plain(self.stage.policy)
        if self.shared:
            return self._shared_actor(policy)
        critic = self.session.load_plain(self.value_path(), scores=True) if self.has_value else None
        actor = ActorCritic(policy, critic, temperature=self.stage.temperature)
        if critic is not None:
            self._start_value(actor, critic)
        return actor

    def _shared_actor(self, base: PreTrainedModel) -> SharedBase:
        config, folder = self.session.context.config, self.reward_adapter()
        centre = self._first_centre() if folder else 0.0
        actor = SharedBase.from_base(
            base, config.peft, temperature=self.stage.temperature, seed=self.stage.seed,
            zero3=self.session.zero_stage == 3, value=self.has_value, reward_adapter=folder, reward_centre=centre,
        )  # fmt: skip
        self.say(trained_words(self.session, actor))
        if folder and self.has_value:
            actor.initialise_value(scale=self.first_model.weight, centre=centre)
        return actor

    def _start_value(self, actor: ActorCritic, critic: PreTrainedModel) -> None:
        """From a reward model, values begin as the reward that it would give; a new head begins at 0."""
        path = self.value_path()
        weights = [setting.weight for setting in self.rewards if setting.model == path]
        if weights:
            actor.initialise_value(scale=weights[0], centre=centre_of(critic.config))
        elif not has_score_head(load.load_config(path, self.session.context.config.model)):
            head = getattr(critic, SCORE_HEAD).weight
            with torch.no_grad(), zero.whole([head]):
                head.zero_()

    def value_path(self) -> str:
        """What the value model starts from. It reads the policy's tokens, so it must have the policy's tokenizer.

        Raises: UserError if stages.ppo.value has another one.
        """
        if self.stage.value is not None:
            if not self._same_tokens(self.stage.value):
                raise UserError(f"stages.ppo.value={self.stage.value}: its tokenizer is not the policy's; leave it out")
            return self.stage.value
        first = self.first_model
        return str(first.model) if first and self._same_tokens(str(first.model)) else self.stage.policy

    def _same_tokens(self, path: str) -> bool:
        tokenizer = load.load_tokenizer(path, self.session.context.config.model, None)
        return tokenizer.get_vocab() == self.session.tokenizer.get_vocab()

    def _first_centre(self) -> float:
        return centre_of(load.load_config(str(self.first_model.model), self.session.context.config.model))

    def reward_adapter(self) -> Path | None:
        """The adapter of the first reward model, where it was trained on the base that the policy starts from."""
        if not self.shared or self.first_model is None:
            return None
        folder = Path(load.resolve_model(str(self.first_model.model))).parent / ADAPTER
        if not load.is_adapter(folder):
            return None
        base = AdapterConfig.from_pretrained(str(folder)).base_model_name_or_path
        same = Path(str(base)).resolve() == Path(load.resolve_model(self.stage.policy)).resolve()
        return folder if same else None

    # What is only read.

    def reference(self, trainer: PPOTrainer, layout: Layout) -> nn.Module | None:
        """The frozen reference; none where the base serves for it, or where nothing is penalised."""
        if self.stage.kl_coefficient == 0 or trainer.inner.has_own_reference:
            return None
        model = self.session.load_frozen(self.stage.reference or self.stage.policy)
        frozen = ActorCritic(model, None, temperature=self.stage.temperature).eval()
        frozen.attach(layout)
        return reference_engine(frozen, trainer.accelerator)

    def sources(self, trainer: PPOTrainer, layout: Layout) -> list[RewardSource]:
        """Rewards in the order of the config."""
        adapter = self.reward_adapter()
        found: list[RewardSource] = []
        for setting in self.rewards:
            if setting.model is None:
                found.append(FunctionReward(setting))
            elif adapter is not None and setting is self.first_model:
                self.say(f"reward {setting.name} is an adapter of the policy's own base ({adapter})")
                found.append(self._inside_reward(setting, trainer, layout))
            else:
                found.append(self._outside_reward(setting, trainer))
        return found

    def _outside_reward(self, setting: RewardSetting, trainer: PPOTrainer) -> ModelReward:
        config, name = self.session.context.config, str(setting.model)
        template, device = load_template(config, name), trainer.accelerator.device
        engine = reference_engine(self.session.load_frozen(name, scores=True), trainer.accelerator)
        proven = self._proven_engine(engine, template, SCORES, Layout.auto, device)
        return self._model_reward(setting, engine, template, proven.layout, trainer, None)

    def _inside_reward(self, setting: RewardSetting, trainer: PPOTrainer, layout: Layout) -> ModelReward:
        def read(_: nn.Module, batch: dict) -> torch.Tensor:
            return trainer.model_wrapped(batch, read=Read.scores)

        return self._model_reward(setting, trainer.inner, self.session.template, layout, trainer, read)

    def _model_reward(self, setting, model, template, layout, trainer, read) -> ModelReward:
        return ModelReward(
            setting, model, template, policy_template_digest=self.session.template.digest, layout=layout,
            micro_batch_size=FORWARD * self.stage.micro_batch_size, accelerator=trainer.accelerator, read=read,
        )  # fmt: skip
