"""Ending a member of a sweep early: its best evaluation so far is worse than the middle one of the others.

The median rule of Golovin et al. 2017 (Vizier, doi:10.1145/3097983.3098043) as `optuna.pruners.MedianPruner` has it.
"""

import math
from pathlib import Path
from statistics import median

from align.config.best import Figure
from align.config.errors import Pruned
from align.config.schema import SweepConfig
from align.distributed import runtime
from align.tracking.members import curves_of_others


class Pruning:
    """Compares the evaluations of one stage with those of the same stage of other members. On every rank."""

    def __init__(self, sweep: SweepConfig, run_dir: Path, stage: str, figure: Figure, key: str) -> None:
        """figure: what is compared, which is `key` in the lines of metrics.jsonl."""
        self.sweep, self.run_dir, self.stage, self.figure, self.key = sweep, run_dir, stage, figure, key

    def judge(self, best: float, step: int, share: float) -> None:
        """best: of the evaluations so far. share: of the steps that are done. A collective. Raises: Pruned."""
        # Files of other members may reach one machine before another, so rank 0 decides.
        said = runtime.from_main(self._verdict(best, step) if self.sweep.prune_from_fraction <= share < 1 else None)
        if said is not None:
            raise Pruned(f"{self.stage}: pruned at step {step}: {said}", best)

    def _verdict(self, best: float, step: int) -> str | None:
        """Why the member ends here; None if it goes on."""
        curves = curves_of_others(self.run_dir, self.stage, self.key)
        others = [curve[step] for curve in curves if math.isfinite(curve.get(step, math.nan))]
        if len(others) < self.sweep.prune_after:
            return None
        middle = median(others)
        if not is_worse(best, middle, higher=self.figure.higher):
            return None
        return f"{self.figure.words} was {best:.4g} at best and {middle:.4g} in the middle of {len(others)} others"


def is_worse(best: float, middle: float, *, higher: bool) -> bool:
    """Whether the best so far is strictly worse than the median of the others; no number is worse than any."""
    return math.isnan(best) or (best < middle if higher else best > middle)
