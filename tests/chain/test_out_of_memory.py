"""Out of memory, as a device says it: one line that names the micro-batch and what would fit, exit code 2."""

import pytest
import torch

from align.chain import run_chain
from align.cli import main
from align.config.errors import UserError
from align.config.store import compose_run
from align.distributed.runtime import Runtime
from align.stages.context import RunContext
from align.stages.out_of_memory import memory_refusal
from align.trainers import pairs
from align.trainers.out_of_memory import BatchOutOfMemory, is_out_of_memory
from align.trainers.pairs import PairTrainer

SETTINGS = ["+recipe=dpo", "stages.dpo.max_steps=4", "stages.dpo.micro_batch_size=4", "stages.dpo.batch_size=8"]
CUDA_WORDS = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB"


@pytest.fixture
def full_at_step_2(monkeypatch) -> list[tuple[int, int]]:
    """The device is full at the second optimizer step of training; (trees, positions) of the batch that it was."""
    seen: list[tuple[int, int]] = []
    losses = PairTrainer.tree_losses

    def tree_losses(self, model, batch):
        if model.training and self.state.global_step == 1:
            seen.append((len(batch["p"]), batch["input_ids"].numel()))
            raise torch.OutOfMemoryError(CUDA_WORDS)
        return losses(self, model, batch)

    monkeypatch.setattr(pairs.PairTrainer, "tree_losses", tree_losses)
    return seen


def test_the_line_names_step_micro_batch_and_overrides(full_at_step_2, tmp_path, capsys):
    code = main([*SETTINGS, f"run_dir={tmp_path}/run"])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "out of memory" in line)
    ((trees, positions),) = full_at_step_2
    assert code == 2
    assert f"dpo: ran out of memory at step 2, in a micro-batch of {trees:,} rows and {positions:,} tokens; " in line
    assert "this would fit: stages.dpo.micro_batch_size=" in line
    assert "Traceback" not in line and "delete" not in line
    # A changed stage is another one, so its checkpoints are in the way.
    assert main([*SETTINGS, f"run_dir={tmp_path}/saved", "stages.dpo.save_every=1"]) == 2
    assert f"; delete {tmp_path}/saved/dpo first, or use another run_dir" in capsys.readouterr().err


def test_what_is_offered_takes_clearly_less_by_the_estimate(full_at_step_2, tmp_path):
    config = compose_run([*SETTINGS, f"run_dir={tmp_path}/run"], None).config
    with pytest.raises(UserError) as refused:
        run_chain(config)
    ways = str(refused.value).split("this would fit: ")[1].split(" (")[0].split(", or ")
    assert len(ways) == 3 and len(set(ways)) == 3
    assert isinstance(refused.value.__cause__, BatchOutOfMemory)


def test_other_errors_of_a_stage_are_not_taken_for_it(monkeypatch, tmp_path):
    def tree_losses(self, model, batch):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(pairs.PairTrainer, "tree_losses", tree_losses)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run_chain(compose_run([*SETTINGS, f"run_dir={tmp_path}/run"], None).config)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_WORDS),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["torch", "python", "cpu", "cuda", "cublas"],
)
def test_every_way_of_saying_it_is_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(ValueError("out of memory"))


def context(stage: str, rank: int, folder, *overrides: str) -> RunContext:
    config = compose_run([f"+recipe={stage}", f"run_dir={folder}", *overrides], None).config
    return RunContext(config, Runtime(rank, 4, rank, "cpu"), folder, stage)


def test_a_rank_that_is_not_the_first_says_it_itself(tmp_path, capsys):
    error = BatchOutOfMemory(rows=8, tokens=4096, step=3)
    refusal = memory_refusal(error, context("dpo", 2, tmp_path, "stages.dpo.batch_size=16"))
    assert "dpo: rank 2 of 4 ran out of memory at step 3, in a micro-batch of 8 rows and 4,096 tokens" in str(refusal)
    assert f"align: {refusal}" in capsys.readouterr().err
    assert memory_refusal(error, context("dpo", 0, tmp_path, "stages.dpo.batch_size=16")) is not None
    assert "ran out" not in capsys.readouterr().err


def test_a_stage_that_trains_nothing_is_offered_half_its_batch(tmp_path):
    refusal = memory_refusal(torch.OutOfMemoryError(CUDA_WORDS), context("score", 0, tmp_path))
    assert str(refusal).endswith("use stages.score.micro_batch_size=8")
