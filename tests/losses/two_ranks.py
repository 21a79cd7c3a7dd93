"""One rank of two under gloo: whitens its half of the values in `INPUT` and writes what it gets to OUTPUT.<rank>.

Call: two_ranks.py RANK STORE INPUT OUTPUT   INPUT: {"values": [[...], [...]], "returns": [[...], [...]]}, a list a rank
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from align.losses.ppo import explained_variance, whiten


def summed(vector: Tensor) -> Tensor:
    dist.all_reduce(vector)
    return vector


def main(rank: int, store: str, source: str, target: str) -> None:
    files = dist.FileStore(store, 2)
    dist.init_process_group("gloo", store=files, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    rows = json.loads(Path(source).read_text())
    values, returns = (torch.tensor(rows[name][rank], dtype=torch.float64) for name in ("values", "returns"))
    mask = torch.ones(len(values), dtype=torch.bool)
    result = {
        "whitened": whiten(values, mask, reduce=summed).tolist(),
        "explained": explained_variance(values, returns, mask, reduce=summed),
    }
    Path(f"{target}.{rank}").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
