"""SFT and continued pretraining: TRL's SFTTrainer on rows that are tokenised and masked already."""

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer

from align.config.schema import PretrainStage, SFTStage


def sft_arguments(stage: SFTStage | PretrainStage, values: dict[str, Any]) -> SFTConfig:
    """TRL's arguments. Make them before the model is loaded: ZeRO-3 shards while loading only if it is known by then.

    Packing puts whole rows into rows of max_tokens, best fit decreasing; none is cut, because none is longer.
    """
    return SFTConfig(
        **values,
        max_length=stage.max_tokens if stage.packing else None,
        packing=stage.packing,
        packing_strategy="bfd",
        eval_packing=False,
        shuffle_dataset=stage.packing,
    )


def build_sft_trainer(
    model: PreTrainedModel,
    arguments: SFTConfig,
    train: Dataset,
    held_out: Dataset | None,
    tokenizer: PreTrainedTokenizerBase,
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """A trainer over rows of `input_ids` and `labels` (-100: not trained), each at most max_length long."""
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
