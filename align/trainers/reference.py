"""Reference log-probabilities: computed once, stored by key, added to the rows as columns."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from align.config.errors import UserError
from align.data.forest import PairCollator
from align.tracking.progress import Progress
from align.trainers.pairs import pair_logps


def reference_engine(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model ready for forwards before training starts: on its device, and under ZeRO-3 in an inference engine."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        from trl.models.utils import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    return model.to(accelerator.device)


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, a PEFT model computes what its base does; any other model is left as it is."""
    while hasattr(model, "module"):
        model = model.module
    with model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext():
        yield


def reference_logps(
    model: nn.Module, dataset: Dataset, *, collator: PairCollator, accelerator: Accelerator, micro_batch_size: int
) -> Tensor:
    """Log-probabilities of the completions of every row, adapters off: float64 (rows, 2) on the CPU, chosen first.

    `model` is what `reference_engine` returned. Rows are taken longest first, so that batches are even and one too
    large fails at once; ranks share the batches and all get the whole answer.
    """
    order = longest_first(dataset)
    batches = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
    rank, ranks = accelerator.process_index, accelerator.num_processes
    logps = torch.zeros(len(dataset), 2, dtype=torch.float64, device=accelerator.device)
    progress = Progress("reference", len(batches), active=rank == 0)
    training = model.training
    model.eval()
    with torch.no_grad(), accelerator.autocast(), adapters_off(model):
        # Every rank runs the same number of forwards: ZeRO-3 gathers weights in each.
        for turn in range(math.ceil(len(batches) / ranks)):
            index = turn * ranks + rank
            rows = batches[min(index, len(batches) - 1)]
            batch = collator([dataset[row] for row in rows])
            batch_logps, _ = pair_logps(model, {key: value.to(accelerator.device) for key, value in batch.items()})
            if index < len(batches):
                logps[rows] = batch_logps.to(logps)
            progress.show(min((turn + 1) * ranks, len(batches)))
    model.train(training)
    return accelerator.reduce(logps, reduction="sum").cpu()


def longest_first(dataset: Dataset) -> list[int]:
    """Row indices by tokens of the tree, most first."""
    columns = (dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"])
    lengths = [sum(map(len, row)) for row in zip(*columns, strict=True)]
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def add_reference_logps(dataset: Dataset, logps: Tensor) -> Dataset:
    """The rows with columns `reference_chosen_logps` and `reference_rejected_logps`."""
    dataset = dataset.add_column("reference_chosen_logps", logps[:, 0].tolist())
    return dataset.add_column("reference_rejected_logps", logps[:, 1].tolist())


def with_reference_logps(
    model: nn.Module,
    dataset: Dataset,
    *,
    collator: PairCollator,
    accelerator: Accelerator,
    micro_batch_size: int,
    cache_dir: Path,
    key: str,
) -> Dataset:
    """The rows with reference log-probabilities, taken from `cache_dir` or computed with `model`.

    model: what `reference_engine` returned. key: names model, rows and template; the same key must mean the same
    numbers. Call it on every rank, before training. Rank 0 alone reads and writes the cache.
    """
    path = cache_dir / f"reference-{key}.npy"
    stored = _stored(path, len(dataset)) if accelerator.is_main_process else None
    found = torch.tensor([stored is not None], dtype=torch.float64, device=accelerator.device)
    if accelerator.reduce(found, reduction="sum").item():
        logps = torch.zeros(len(dataset), 2, dtype=torch.float64) if stored is None else stored
        logps = accelerator.reduce(logps.to(accelerator.device), reduction="sum").cpu()
    else:
        logps = reference_logps(
            model, dataset, collator=collator, accelerator=accelerator, micro_batch_size=micro_batch_size
        )
        if accelerator.is_main_process:
            _store(path, logps)
    return add_reference_logps(dataset, logps)


def _stored(path: Path, rows: int) -> Tensor | None:
    if not path.is_file():
        return None
    logps = torch.from_numpy(np.load(path))
    assert logps.shape == (rows, 2), f"{path} holds other rows than its key says"
    return logps


def _store(path: Path, logps: Tensor) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, logps.numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or set cache_dir") from error
