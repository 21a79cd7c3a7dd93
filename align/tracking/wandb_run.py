"""One wandb run a stage: group = chain, job_type = stage, resumed under the id kept in the run folder."""

import os
from pathlib import Path
from typing import Any

from align.config.errors import UserError
from align.config.schema import LogConfig


class WandbRun:
    """What a stage logs to. Made on every rank; only an `active` one (rank 0) speaks, and only with log=wandb."""

    def __init__(self, log: LogConfig, *, active: bool, group: str, stage: str, stage_dir: Path) -> None:
        self.run = _open_run(log, group, stage, stage_dir) if log.wandb and active else None

    def describe(self, config: dict[str, Any], inputs: list[dict[str, str]]) -> None:
        """Record the resolved config and the input digests: offline runs cannot use artifacts for lineage."""
        if self.run is not None:
            self.run.config.update({**config, "inputs": inputs}, allow_val_change=True)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Log one step. `train/global_step` is the axis: wandb's own step starts again on an offline resume."""
        if self.run is not None:
            self.run.log({"train/global_step": step, **metrics})

    def finish(self, summary: dict[str, float]) -> None:
        """Write the final figures and close the run."""
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish()


def _open_run(log: LogConfig, group: str, stage: str, stage_dir: Path):
    try:
        import wandb
    except ImportError as error:
        raise UserError("log=wandb, but wandb is not installed; pip install wandb, or log=local") from error
    from wandb.errors import Error as WandbError

    id_file = stage_dir / "wandb_id"
    run_id = id_file.read_text().strip() if id_file.is_file() else wandb.util.generate_id()
    try:
        run = wandb.init(
            project=log.project,
            entity=log.entity,
            group=group,
            job_type=stage,
            name=f"{group}/{stage}",
            id=run_id,
            resume="allow",
            dir=str(stage_dir),
            mode=os.environ.get("WANDB_MODE", log.mode.value),
            settings=wandb.Settings(silent=True),
        )
    except WandbError as error:
        message = str(error).split("\n")[0]
        raise UserError(f"log=wandb: {message}; run `wandb login`, or log.mode=offline, or log=local") from error
    id_file.write_text(run_id + "\n")
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run
