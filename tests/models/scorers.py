"""Tiny reward models: the backbones of `families` with a score head."""

from transformers import AutoModelForSequenceClassification, PreTrainedModel

from align.models.reward import as_scorer, draw_head
from tests.models.families import tiny


def tiny_scorer(name: str, *, seed: int = 0) -> PreTrainedModel:
    """The backbone of `tiny(name)` in eval mode, under a head drawn from `seed`."""
    causal = tiny(name)
    config = causal.config
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config, dtype=causal.dtype)
    model.base_model.load_state_dict(causal.base_model.state_dict())
    draw_head(model, seed=seed)
    return as_scorer(model).eval()
