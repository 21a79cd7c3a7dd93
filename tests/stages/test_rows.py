"""Rows are tokenised before any process group starts, once on a machine, and the stages find them."""

import threading
import time

import pytest

from align import chain
from align.config.store import compose_run
from align.data import cache
from align.data.bad_rows import BadRows
from align.data.report import RowReport
from align.data.template import Template
from align.distributed import runtime
from align.stages.rows import starting_model


class GroupStarted(Exception):
    """The process group was asked for."""


def chain_config(tmp_path):
    return compose_run(
        ["+recipe=sft_dpo", f"run_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", "stages.sft.max_tokens=64"]
    ).config


def test_every_stage_is_tokenised_before_a_process_group_starts(tmp_path, monkeypatch):
    def start(**_):
        raise GroupStarted

    monkeypatch.setattr(runtime, "start", start)
    with pytest.raises(GroupStarted):
        chain.run_chain(chain_config(tmp_path))
    slots = {cache.load(tmp_path / "cache", key.name)[1].slot for key in (tmp_path / "cache" / "rows").iterdir()}
    assert slots == {"demonstrations", "preferences"}
    monkeypatch.setattr(Template, "encode_pairs", None)
    monkeypatch.setattr(Template, "encode_demonstrations", None)
    with pytest.raises(GroupStarted):
        chain.run_chain(chain_config(tmp_path))


def test_a_stage_of_a_chain_starts_where_the_chain_does(tmp_path):
    config = chain_config(tmp_path)
    assert config.stages.dpo.policy == f"{tmp_path}/run/sft/policy"
    assert starting_model(config, "dpo") == starting_model(config, "sft") == "tiny-base"
    config.run = ["dpo"]
    assert starting_model(config, "dpo") == f"{tmp_path}/run/sft/policy"


def test_of_several_processes_one_tokenises_and_the_others_wait(tmp_path):
    written = []

    def write(folder):
        written.append(folder)
        time.sleep(0.1)  # long enough for the others to arrive
        for name in cache.TABLES:
            (folder / f"{name}.arrow").touch()
        return RowReport("text", BadRows(folder / cache.BAD_ROWS))

    ranks = [threading.Thread(target=cache.fill, args=(tmp_path, "key", write)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert len(written) == 1
    assert cache.is_cached(tmp_path, "key")
    assert [entry.name for entry in (tmp_path / "rows").iterdir()] == ["key"]
