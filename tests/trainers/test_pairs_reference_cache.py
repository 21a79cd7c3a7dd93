"""The store of reference log-probabilities."""

import pytest
import torch

from align.config.errors import UserError
from align.trainers import reference
from align.trainers.reference import with_reference_logps
from tests.models.families import tiny
from tests.trainers.test_pairs import pairs, trainer


def test_a_second_run_reads_what_the_first_computed(tmp_path, monkeypatch):
    rows = pairs(5)
    built = trainer(tiny("llama"), rows, tmp_path / "o", reference=False)

    def columns(key: str) -> list[float]:
        added = with_reference_logps(
            built.model,
            rows,
            collator=built.data_collator,
            accelerator=built.accelerator,
            micro_batch_size=2,
            cache_dir=tmp_path / "c",
            key=key,
        )
        return list(added["reference_chosen_logps"]) + list(added["reference_rejected_logps"])

    first = columns("k")

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(reference, "reference_logps", never)
    assert columns("k") == first
    with pytest.raises(AssertionError, match="computed again"):
        columns("other")


def test_a_cache_that_cannot_be_written_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference.np, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        reference._store(tmp_path / "c" / "reference-k.npy", torch.zeros(3, 2))
    assert list((tmp_path / "c").iterdir()) == []
