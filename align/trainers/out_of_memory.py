"""An out-of-memory error that knows which micro-batch it came from."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

WORDS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""How torch and its libraries say it where they raise no `torch.OutOfMemoryError`: on a CPU, in cuBLAS, in NCCL."""


class BatchOutOfMemory(torch.OutOfMemoryError):
    """A micro-batch did not fit.

    rows, tokens: of the micro-batch; tokens count every position that the model computes, padding included.
    step: the optimizer step under way, counted from 1.
    """

    def __init__(self, rows: int, tokens: int, step: int):
        super().__init__(f"out of memory at step {step}, in a micro-batch of {rows} rows and {tokens} tokens")
        self.rows, self.tokens, self.step = rows, tokens, step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no more memory to give."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


class BatchNamingTrainer(Trainer):
    """Raises BatchOutOfMemory where the forward or backward pass of a micro-batch does not fit."""

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BatchOutOfMemory(_rows(inputs), inputs["input_ids"].numel(), self.state.global_step + 1) from error


def _rows(inputs: dict[str, Any]) -> int:
    """Trees, rows or completions of a micro-batch; of packed rows, which are one, the sequences in them."""
    if "seq_idx" in inputs:
        return int(inputs["seq_idx"].max()) + 1
    if "labels" in inputs:
        return len(inputs["labels"])
    return int(inputs["completion"].max()) + 1 if "completion" in inputs else len(inputs["input_ids"])
