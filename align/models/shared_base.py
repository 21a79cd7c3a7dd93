"""Policy, value model, reference and reward model on the weights of one base.

    policy      base + adapter "policy", trained
    value       base + adapter "value" under a score head of its own, trained
    reward      base + adapter "reward" under its head, frozen: a reward model that was trained as an adapter
    reference   base alone

One base in memory in place of four models; each reading is a forward of its own.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, TaskType, get_peft_model
from peft import PeftConfig as AdapterConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from align.config.errors import UserError
from align.config.schema import PeftConfig
from align.models.actor_critic import ActorCritic, read_tokens
from align.models.adapters.configs import adapter_config
from align.models.layout import model_inputs
from align.models.reward import HEAD_WEIGHT, SCORE_HEAD

POLICY, VALUE, REWARD = "policy", "value", "reward"
WEIGHTS = "adapter_model.safetensors"
VALUE_STATISTICS = "value.json"
"""What turns scores into values, under the names that the config of a whole value model has them."""
ADAPTED = r"lora_\w+|ia3_l|bottleneck_\w+"
"""What PEFT calls the parts of an adapter, before its name."""
FILE_PREFIX = "base_model.model."
"""What PEFT puts in front of every name it writes."""


class ScoreHead(nn.Linear):
    """Hidden states (S, d) -> scores (S,), in fp32 whatever its weights are, as those of `align.models.reward`."""

    def __init__(self, width: int, dtype: torch.dtype):
        super().__init__(width, 1, bias=False, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.to(exact), self.weight.to(exact)).squeeze(-1)


class SharedBase(ActorCritic):
    """The interface of `ActorCritic` on one base; made by `from_base`.

    Checkpoints hold what is trained: two adapters and the value head.
    """

    def __init__(self, base: PreTrainedModel, heads: dict[str, ScoreHead], *, temperature: float, reward_centre: float):
        """base: with the adapters in it. heads: those of "value" and "reward", as far as there are any."""
        super().__init__(base, None, temperature=temperature)
        self.heads = nn.ModuleDict(heads)
        self.reward_centre = reward_centre
        self._layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(_is_of(name, POLICY) or _is_of(name, VALUE))
        self._switch(POLICY)

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel,
        peft: PeftConfig,
        *,
        temperature: float,
        seed: int,
        zero3: bool,
        value: bool = True,
        reward_adapter: Path | None = None,
        reward_centre: float = 0.0,
    ) -> "SharedBase":
        """Adapters as `peft` says on a causal model, the policy's first computing nothing.

        value: whether a value model is trained. It starts from the reward adapter, shape and head included, if there is
        one; else its head is drawn from N(0, 1/sqrt(d + 1)) (Stiennon et al. 2020, arXiv:2009.01325).
        reward_adapter: the folder `adapter/` of a reward stage that started from the same base.
        reward_centre: the score of that reward model that counts as zero.
        Raises: UserError if target_modules name a layer that is not there, or if reward_adapter does not fit the base.
        """
        torch.manual_seed(seed)
        fresh = _fresh_config(base, peft)
        # ZeRO-3 gathers parameters in one buffer of one dtype, so adapters stay in the base's there.
        options = {"autocast_adapter_dtype": not zero3}
        try:
            adapted = get_peft_model(base, fresh, adapter_name=POLICY, **options)
        except ValueError as error:
            raise UserError(f"peft.target_modules={peft.target_modules}: {error}") from error
        saved = None if reward_adapter is None else _SavedAdapter(reward_adapter)
        configs = {VALUE: fresh if saved is None else saved.config} if value else {}
        configs |= {} if saved is None else {REWARD: saved.config}
        heads = {}
        for name, config in configs.items():
            adapted.add_adapter(name, copy.deepcopy(config), **options)
            dtype = base.dtype if zero3 else torch.promote_types(base.dtype, torch.float32)
            heads[name] = ScoreHead(base.config.get_text_config().hidden_size, dtype)
            _draw(heads[name])
        model = cls(base, heads, temperature=temperature, reward_centre=reward_centre)
        for name in configs if saved is not None else ():
            saved.copy_into(model, name)
        return model

    def _switch(self, adapter: str | None) -> None:
        """Every layer computes with `adapter` from now on, with None as the base does.

        PEFT's own switches also freeze what they switch off, but the other adapter is trained in the same step.
        """
        active = [] if adapter is None else [adapter]
        for layer in self._layers:
            layer._active_adapter = active
        assert self._layers[0].active_adapters == active, "this version of PEFT keeps the active adapter elsewhere"

    @contextmanager
    def _under(self, adapter: str | None) -> Iterator[None]:
        """Inside, the base computes with `adapter`; outside always with the policy's."""
        self._switch(adapter)
        try:
            yield
        finally:
            self._switch(POLICY)

    def _head_scores(self, name: str, batch: Mapping[str, Tensor]) -> Tensor:
        """Scores (S,) in fp32 at the positions of a batch, of an adapter and its head."""
        with self._under(name):
            hidden = self.policy.base_model(**model_inputs(self.policy, batch)).last_hidden_state.flatten(0, 1)
        return self.heads[name](hidden[batch["positions"]])

    def _value_scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._head_scores(VALUE, batch)

    @torch.no_grad()
    def reference_logps(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Log-probabilities (S,) under the base alone, at the same temperature, of a batch of `lay_out`."""
        with self._under(None):
            logits = self._policy_logits(batch)
        return read_tokens(logits, batch["targets"], temperature=self.temperature, entropies=False)[0]

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Scores (C,) of the reward model less its centre, of a batch of `lay_out_scores`.

        Raises: NotImplementedError if no reward model was trained on this base.
        """
        if not self.has_own_reward:
            return super().scores(batch)
        return self._head_scores(REWARD, batch) - self.reward_centre

    @property
    def has_value(self) -> bool:
        return VALUE in self.heads

    @property
    def has_own_reference(self) -> bool:
        return True

    @property
    def has_own_reward(self) -> bool:
        return REWARD in self.heads

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        named = list(self.named_parameters())
        return {group: [p for name, p in named if _is_of(name, group)] for group in (POLICY, VALUE)}

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Raises: UserError. Two adapters of one base would be recomputed under the wrong one."""
        raise UserError("activation_checkpointing: not for adapters that share a base; turn it off, or set peft=none")

    gradient_checkpointing_enable = activation_checkpointing_enable

    def _kept_names(self) -> list[str]:
        """What is trained, and the scale of the values."""
        names = [name for name, _ in self.named_parameters() if _is_of(name, POLICY) or _is_of(name, VALUE)]
        return [*names, "value_bits"]

    def _file_names(self, adapter: str) -> dict[str, str]:
        """The name in an adapter's file -> the name in here, for each of its tensors, its head included."""
        names = (name for name, _ in self.named_parameters() if _is_of(name, adapter))
        return {_file_name(name): name for name in names}

    def save_adapter(self, adapter: str, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write adapter "policy" or "value" as PEFT would, so that `align.models.peft.merged_model` folds it into the
        base: a causal model, or with the value head a model with a score head. A value is then
        value_scale * (score - reward_centre), with the numbers in `value.json` beside it.

        state: with ZeRO-3 the gathered state dictionary; otherwise the module's own. Call it on one rank.
        """
        state = self.state_dict() if state is None else state
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {file: state[name].detach().contiguous().cpu() for file, name in self._file_names(adapter).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config = copy.deepcopy(self.policy.peft_config[adapter])
        config.inference_mode = True
        if adapter != POLICY:
            config.task_type, config.modules_to_save = TaskType.SEQ_CLS, [SCORE_HEAD]
        config.save_pretrained(str(folder))
        if adapter == VALUE:
            # In a file of its own: PEFT warns of every key in its config that it does not know.
            scale, centre = self.value_affine
            numbers = {"value_scale": scale, "reward_centre": centre}
            (folder / VALUE_STATISTICS).write_text(json.dumps(numbers) + "\n", encoding="utf-8")

    def save_policy_adapter(self, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """`save_adapter` of the policy."""
        self.save_adapter(POLICY, folder, state)


class _SavedAdapter:
    """The adapter that a reward stage has left in a folder: its shape, its weights and its score head."""

    def __init__(self, folder: Path):
        """Raises: UserError if the folder holds no LoRA of a reward model."""
        self.folder = folder
        try:
            config = AdapterConfig.from_pretrained(str(folder))
            self.tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: not an adapter ({error}); give adapter/ of a reward stage") from error
        head = FILE_PREFIX + HEAD_WEIGHT
        if not isinstance(config, LoraConfig) or head not in self.tensors:
            raise UserError(f"{folder}: not a LoRA adapter with a score head; give adapter/ of a reward stage")
        # The head is ours, so for PEFT it is LoRA alone. Without dropout, because scores have to be one network's.
        config.task_type, config.modules_to_save = TaskType.CAUSAL_LM, None
        config.lora_dropout, config.inference_mode = 0.0, False
        self.config = config

    @torch.no_grad()
    def copy_into(self, model: SharedBase, adapter: str) -> None:
        """Raises: UserError unless the tensors are exactly those of `adapter` in the model."""
        parameters, names = dict(model.named_parameters()), model._file_names(adapter)
        wrong = [f"{name} is missing" for name in sorted(names.keys() - self.tensors.keys())]
        wrong += [f"{name} is unknown" for name in sorted(self.tensors.keys() - names.keys())]
        wrong += [
            f"{name} is {tuple(self.tensors[name].shape)}, not {tuple(parameters[own].shape)}"
            for name, own in names.items()
            if name in self.tensors and self.tensors[name].shape != parameters[own].shape
        ]
        if wrong:
            raise UserError(
                f"{self.folder}: {len(wrong)} tensors do not fit the policy, {wrong[0]}; start the reward stage and "
                "PPO from the same model"
            )
        for name, own in names.items():
            parameters[own].copy_(self.tensors[name])


def _fresh_config(base: PreTrainedModel, peft: PeftConfig) -> AdapterConfig:
    """Without dropout, because what is compared (policy and reference, two values) must come from one network."""
    return adapter_config(base, replace(peft, dropout=0.0), TaskType.CAUSAL_LM)


def _draw(head: ScoreHead) -> None:
    """N(0, 1/sqrt(d + 1)) from torch's generator, the same in every precision."""
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape) / (head.in_features + 1) ** 0.5)


def _is_of(name: str, adapter: str) -> bool:
    """Whether a parameter of this name belongs to an adapter or is its head."""
    return re.search(rf"\.({ADAPTED})\.{adapter}(\.|$)", name) is not None or name.startswith(f"heads.{adapter}.")


def _file_name(name: str) -> str:
    """What PEFT calls a parameter in an adapter's file."""
    if name.startswith("heads."):
        return FILE_PREFIX + HEAD_WEIGHT
    plain = re.sub(rf"\.({ADAPTED})\.\w+(\.|$)", r".\1\2", name.removeprefix("policy."), count=1)
    return FILE_PREFIX + plain.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
