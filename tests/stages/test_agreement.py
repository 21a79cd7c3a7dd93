"""A rank that was started with another config is named before anything is trained."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from align.config.errors import UserError
from align.config.store import compose_run
from align.distributed import runtime
from align.stages.agreement import refuse_unequal_config


@pytest.fixture
def compare(monkeypatch):
    """Run the comparison of several configs, one a rank, and give what each rank raised."""

    def run(*lines: list[str]) -> list[str | None]:
        configs = [copy.deepcopy(compose_run(["+recipe=sft_dpo", *line], None).config) for line in lines]
        meeting, given, mine = threading.Barrier(len(configs)), {}, threading.local()

        def gather(value):
            given[mine.rank] = value
            meeting.wait(10)
            found = [given[rank] for rank in range(len(configs))]
            meeting.wait(10)
            return found

        def one(rank: int) -> str | None:
            mine.rank = rank
            try:
                refuse_unequal_config(configs[rank])
            except UserError as error:
                return str(error)
            return None

        monkeypatch.setattr(runtime, "gather", gather)
        with ThreadPoolExecutor(len(configs)) as pool:
            return list(pool.map(one, range(len(configs))))

    return run


def test_equal_configs_pass(compare):
    assert compare([], [], []) == [None, None, None]


def test_the_ranks_and_the_key_that_differ_are_named_on_every_rank(compare):
    said = compare([], ["stages.dpo.beta=0.2"], [], ["stages.dpo.beta=0.2"])
    assert said == [said[0]] * 4
    assert "ranks 1, 3 of 4 were started with another config" in said[0]
    assert "stages.dpo.beta is 0.1 on rank 0, 0.2 on rank 1" in said[0]


def test_a_node_may_have_its_own_folders(compare):
    assert compare([], ["cache_dir=/local/cache", "run_dir=/mnt/other/runs"]) == [None, None]


def test_a_secret_that_differs_is_not_shown(compare):
    ways = [[f"data.preferences=https://me:{password}@host/x.jsonl"] for password in ("hunter2x", "hunter3x")]
    [said, _] = compare(*ways)
    assert "rank 1 of 2" in said and "hunter" not in said
