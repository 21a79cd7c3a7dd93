"""Reward models: a causal backbone with a score head, one number a completion, read at its last token.

On disk a reward model is a plain folder of transformers' `...ForSequenceClassification` with one label, so any tool
loads it. In memory its forward also takes `positions`, and then returns the scores there: the call goes through
whatever wraps the model (DDP, DeepSpeed, PEFT), as their hooks need.
"""

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from align.config.errors import UserError
from align.config.schema import ModelConfig
from align.data.forest import lay_out_scores
from align.distributed import zero
from align.models import load
from align.models.cut_points import CUTS, SCORE_HEAD, ordered_cuts
from align.models.layout import Reading, model_inputs, plain_model

HEAD_WEIGHT = f"{SCORE_HEAD}.weight"
BACKBONE_INPUTS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "past_key_values", "use_cache")
AUTO_CLASS = "AutoModelForSequenceClassification"


def load_reward_model(
    name: str, model: ModelConfig, dtype: torch.dtype, *, seed: int, quantisation: Any = None
) -> PreTrainedModel:
    """A reward model with weights in `dtype`, ready for `score_batch`, from a folder, a hub id or an embedded name.

    A reward model keeps its head; a causal model gets one drawn from N(0, 1/sqrt(d + 1)) with `seed`, for d hidden
    units (Stiennon et al. 2020, arXiv:2009.01325). The tokenizer's pad token is set in the config, where transformers'
    own forward looks for the end of a padded row. quantisation: transformers' config of it, or None.
    Raises: UserError if the model type has no score head, or if anything but a new head is missing in the files.
    """
    config = _reward_config(name, model)
    options = {"trust_remote_code": model.trust_remote_code}
    if quantisation is not None:
        options["quantization_config"] = quantisation
    if name == "tiny-untrained":
        torch.manual_seed(seed)
        load.refuse_to_quantise_nothing(quantisation)
        loaded, new_head = AutoModelForSequenceClassification.from_config(config, dtype=dtype), True
    else:
        try:
            loaded, report = AutoModelForSequenceClassification.from_pretrained(
                load.resolve_model(name), config=config, dtype=dtype, revision=model.revision,
                output_loading_info=True, ignore_mismatched_sizes=True,
                use_safetensors=None if model.pickled_weights else True, **options,
            )  # fmt: skip
        except load.LOAD_ERRORS as error:
            raise load.not_loaded(name, "model", error) from error
        new_head = not has_score_head(config)
        made = {HEAD_WEIGHT} if new_head else set()
        load.refuse_made_up(name, {**report, "missing_keys": set(report["missing_keys"]) - made})
    if not _is_plain_head(loaded):
        raise UserError(f"{name}: {type(loaded).__name__} has no plain score head; give a causal language model")
    if new_head:
        draw_head(loaded, seed=seed)
    return as_scorer(loaded)


def _reward_config(name: str, model: ModelConfig) -> PreTrainedConfig:
    """The model's config with one label and the tokenizer's pad token."""
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(load.resolve_model(name), num_labels=1, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise load.not_loaded(name, "config", error) from error
    own_code = AUTO_CLASS in (config.to_dict().get("auto_map") or {})
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not own_code:
        raise UserError(
            f"{name}: transformers has no sequence classification for model type {config.model_type}, so it cannot be "
            "a reward model; start from another model"
        )
    config.get_text_config().pad_token_id = load.load_tokenizer(name, model, None).pad_token_id
    return config


def has_score_head(config: PreTrainedConfig) -> bool:
    """Whether a saved config is a reward model's: its architecture is one of sequence classification."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def check_reward_model(name: str, model: ModelConfig) -> None:
    """Raises: UserError if a model has no trained score head, such as a causal one, which would get a random one."""
    if not has_score_head(_reward_config(name, model)):
        raise UserError(f"{name}: not a reward model, it has no score head; make one with +recipe=reward")


def _is_plain_head(model: PreTrainedModel) -> bool:
    head = getattr(model, SCORE_HEAD, None)
    return isinstance(head, nn.Linear) and head.bias is None and head.out_features == 1


def draw_head(model: PreTrainedModel, *, seed: int) -> None:
    """A head from N(0, 1/sqrt(d + 1)), the same for a seed in every precision and on every rank."""
    weight = getattr(model, SCORE_HEAD).weight
    with torch.no_grad(), zero.whole([weight]):
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        weight.copy_(drawn / (weight.shape[-1] + 1) ** 0.5)


def as_scorer(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose forward takes `positions` too, and whose head computes in fp32 whatever its weights are.

    In bf16 a score of 3 would be rounded to 1/64.
    """
    model.forward = MethodType(_forward, model)
    model.virtual_tokens = 0  # in front of the real ones, once an adapter puts some there
    head = getattr(model, SCORE_HEAD)
    head.forward = MethodType(_head_forward, head)
    return model


def _forward(
    self: PreTrainedModel, *args: Any, positions: Tensor | None = None, past_key_values: Any = None, **inputs: Any
) -> Any:
    """Scores (C,) in fp32 at `positions` (C,) of the flattened rows; without positions, the model's own forward.

    past_key_values is named because PEFT looks for it before it gives a prefix.
    """
    if past_key_values is not None:
        inputs["past_key_values"] = past_key_values
    if positions is None:
        return type(self).forward(self, *args, **inputs)
    assert not args, "tokens and masks are given by name"
    # Wrappers add options of the whole model (labels, return_dict); the backbone gets what `model_inputs` names.
    taken = {key: inputs[key] for key in BACKBONE_INPUTS if inputs.get(key) is not None}
    hidden = self.base_model(**taken).last_hidden_state[:, self.virtual_tokens :].flatten(0, 1)
    # The head as a module, so that ZeRO-3 gathers it and PEFT puts the trained copy in its place.
    return getattr(self, SCORE_HEAD)(hidden[positions]).squeeze(-1)


def _head_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Scores (..., 1); of a head with cut points (..., K), score - cut behind the score."""
    exact = torch.promote_types(self.weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = F.linear(hidden.to(exact), self.weight.to(exact))
        cuts = getattr(self, CUTS, None)
        return scores if cuts is None else torch.cat([scores, scores - ordered_cuts(cuts.to(exact))], dim=-1)


def score_batch(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores (C,) in fp32, with gradient, of the completions of a batch of `lay_out_scores`; `model` may be wrapped."""
    return score_and_cuts(model, batch)[0]


def score_and_cuts(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """What `score_batch` gives, and (C, K - 1) score - cut of a model with cut points, else None."""
    read = model(**model_inputs(plain_model(model), batch), positions=batch["positions"])
    return (read, None) if read.dim() == 1 else (read[:, 0], read[:, 1:])


SCORES = Reading("scores", partial(lay_out_scores, every_token=True), score_batch, relative=True)
"""For `prove_layout`: scores at every token of a completion, because the few at last tokens could agree by chance."""


def set_statistics(config: PreTrainedConfig, centre: float, std: float) -> None:
    """Keep the mean and the spread of scores on demonstrations where they travel with the weights: in config.json."""
    config.reward_centre, config.reward_std = float(centre), float(std)


def set_ratings(config: PreTrainedConfig, scale: Mapping[str, Any] | None) -> None:
    """Keep what turns scores into the data's ratings: {mean, std}, or {levels, cuts}; None: scores have no unit."""
    if hasattr(config, "reward_ratings"):
        # Of an earlier training, whose unit is not that of these scores.
        del config.reward_ratings
    if scale is not None:
        config.reward_ratings = dict(scale)


def ratings_of(config: PreTrainedConfig, scores: Tensor) -> Tensor | None:
    """The ratings in the unit of the data that scores (not centred) stand for, any shape; None if they have no unit."""
    scale = config.to_dict().get("reward_ratings")
    return None if scale is None else as_ratings(scale, scores)


def as_ratings(scale: Mapping[str, Any], scores: Tensor) -> Tensor:
    """Ratings read off scores by what `set_ratings` keeps; of levels, the expected one."""
    if "levels" not in scale:
        return scale["mean"] + scale["std"] * scores
    levels, cuts = (scores.new_tensor(scale[name]) for name in ("levels", "cuts"))
    return levels[0] + torch.sigmoid(scores[..., None] - cuts) @ levels.diff()


def centre_of(config: PreTrainedConfig) -> float:
    """The mean score that counts as zero; 0 where none was set."""
    return config.to_dict().get("reward_centre", 0.0)


def centred_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores (C,) as `score_batch` gives them, less the centre in the model's config."""
    return score_batch(model, batch) - centre_of(plain_model(model).config)
