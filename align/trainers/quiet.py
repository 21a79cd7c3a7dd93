"""Keeps the libraries below from talking over the one progress line."""

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback
from transformers.utils import logging as transformers_logging

if TYPE_CHECKING:
    from transformers import Trainer


def quiet_libraries() -> None:
    """No progress bars and no advice from the libraries below; their errors still speak."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed says that it found nothing better
    # Read when datasets is imported, which a plan of rows that are not there yet does without.
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("DeepSpeed", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|torch")
    # Positions count from the virtual tokens on by themselves, which is what they are to do.
    warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")


def quiet_trainer(trainer: "Trainer") -> "Trainer":
    """The trainer without its own printing of every log line."""
    trainer.remove_callback(PrinterCallback)
    return trainer
