"""One wandb run a stage: group = chain, job_type = stage, resumed under the id kept in the stage's folder.

wandb's own files go to `<run_dir>/wandb/`, beside the stages. The environment variable WANDB_MODE wins over log.mode.
"""

import os
import secrets
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from align.artifacts import Manifest, digest_value
from align.config.errors import UserError
from align.config.redaction import redacted, redacted_text
from align.config.schema import LogConfig
from align.tracking.members import wandb_names
from align.tracking.progress import say
from align.tracking.report_samples import prompt_text, reply_text
from align.tracking.run_folder import read_lines
from align.tracking.wandb_artifacts import log_config, log_outputs, use_inputs

ID_FILE = "wandb_id"
INIT_SECONDS = 30.0
"""Until a server that does not answer is given up, if WANDB_INIT_TIMEOUT does not say otherwise."""
FINISH_SECONDS = 300.0
"""Until the upload of what is left is given up at the end of a stage; the files stay, for `wandb sync`."""
MOST_REPLIES = 200
"""Rows of the table of an evaluation's replies."""
WAYS_OUT = "run `wandb login`, or use log.mode=offline, or log=local"
MODES = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}


def wandb_mode(log: LogConfig) -> str:
    """online | offline | disabled, as log.mode says, or WANDB_MODE where it is set. Without log=wandb: disabled.

    Raises: UserError for another WANDB_MODE.
    """
    if not log.wandb:
        return "disabled"
    mode = os.environ.get("WANDB_MODE") or log.mode.value
    if mode not in MODES:
        raise UserError(f"WANDB_MODE={mode}: must be online, offline or disabled")
    return MODES[mode]


def check_wandb(log: LogConfig) -> None:
    """Prove, before anything runs, that rank 0 can log in if it has to. Asks the server, never the person.

    Raises: UserError.
    """
    if wandb_mode(log) != "online" or os.environ.get("RANK", "0") != "0":
        return
    wandb = quiet_wandb()
    try:
        logged_in = wandb.login(prompt=False)
    except wandb.errors.Error as error:
        raise UserError(f"log=wandb: {_first_line(error)}; {WAYS_OUT}") from error
    if not logged_in:
        raise UserError(f"log=wandb: no API key for wandb on this machine; {WAYS_OUT}")


class WandbRun:
    """What a stage logs to. Made on every rank; only an `active` one (rank 0) speaks, and only with log=wandb."""

    def __init__(self, log: LogConfig, recipe: str, *, active: bool, stage: str, stage_dir: Path) -> None:
        mode = wandb_mode(log) if active else "disabled"
        self.run = None if mode == "disabled" else _open_run(log, mode, recipe, stage, stage_dir)
        self.online, self.upload, self.stage_dir = mode == "online", log.upload_models, stage_dir

    def describe(self, config: dict[str, Any], inputs: list[dict[str, str]]) -> None:
        """Record the resolved config, without secrets, and the inputs by their digests; online as nodes of the lineage
        graph too, which an offline run cannot (wandb 0.31)."""
        if self.run is None:
            return
        kept, wandb = redacted(config), quiet_wandb()
        self.run.config.update({**kept, "inputs": redacted(inputs)}, allow_val_change=True)
        self.run.tags = _tags(kept)
        log_config(wandb, self.run, kept, digest_value(kept))
        if self.online:
            use_inputs(wandb, self.run, redacted(inputs))

    def leave(self, manifest: Manifest) -> None:
        """Log what the stage has left: models and rows by their digests, the replies of an evaluation as a table."""
        if self.run is None:
            return
        log_outputs(quiet_wandb(), self.run, manifest, self.stage_dir, upload=self.upload)
        replied = [
            line for line in read_lines(self.stage_dir / "samples.jsonl") if isinstance(line.get("replies"), dict)
        ]
        self.table("replies", manifest.steps, [_flat_reply(line) for line in replied[:MOST_REPLIES]])

    def alert(self, title: str, text: str) -> None:
        """Tell the people who asked wandb to be told. Titles have fewer than 64 characters."""
        if self.run is not None:
            self.run.alert(title=title[:63], text=text, level="WARN")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Log one step. `train/global_step` is the axis: wandb's own step starts again on an offline resume."""
        if self.run is not None:
            self.run.log({"train/global_step": step, **metrics})

    def table(self, name: str, step: int, rows: list[dict[str, Any]]) -> None:
        """Log rows as a table of this step, under a key of its own: of one key wandb shows the last table only."""
        if self.run is None or not rows:
            return
        columns = [key for key, value in rows[0].items() if isinstance(value, str | int | float)]
        data = [[row.get(column) for column in columns] for row in rows]
        table = quiet_wandb().Table(columns=columns, data=data)
        self.run.log({"train/global_step": step, f"{name}/step_{step:05d}": table})

    def finish(self, summary: dict[str, float]) -> None:
        """Write the final figures and close the run; one that is not closed, wandb marks as failed."""
        if self.run is not None:
            self.run.summary.update(summary)
            self.run.finish()


def _flat_reply(line: dict[str, Any]) -> dict[str, str]:
    return {"prompt": prompt_text(line["prompt"])} | {name: reply_text(text) for name, text in line["replies"].items()}


def _open_run(log: LogConfig, mode: str, recipe: str, stage: str, stage_dir: Path) -> Any:
    """A new run, or the one that an interrupted stage had."""
    wandb = quiet_wandb()
    settings: dict[str, Any] = {"console": "off", "silent": True, "finish_timeout": FINISH_SECONDS}
    if "WANDB_INIT_TIMEOUT" not in os.environ:
        settings["init_timeout"] = INIT_SECONDS
    if "WANDB_DISABLE_CODE" not in os.environ:
        settings["disable_code"] = True  # else it uploads what is not committed in the user's repository
    check_wandb(log)  # else wandb asks for a key on the terminal, and waits
    group, name = wandb_names(stage_dir.parent, recipe)
    typed = sys.argv
    sys.argv = [redacted_text(word) for word in typed]  # wandb keeps the command line
    try:
        run = wandb.init(
            project=log.project,
            entity=log.entity,
            group=group,
            job_type=stage,
            name=f"{name}/{stage}",
            id=_kept_id(stage_dir),
            resume="allow",
            # In a sweep, a stage that failed may have left its run open.
            reinit="finish_previous",
            dir=str(stage_dir.parent),
            mode=mode,
            settings=wandb.Settings(**settings),
        )
    except wandb.errors.Error as error:
        raise UserError(f"log=wandb: {_first_line(error)}; {WAYS_OUT}") from error
    finally:
        sys.argv = typed
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    if run.url:
        say(f"{stage}: {run.url}")
    return run


def quiet_wandb() -> ModuleType:
    """The module, told to keep to itself. Raises: UserError where it is not installed."""
    # wandb reports its own errors to its makers unless told not to; it is read when wandb's service starts.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb
    except ImportError as error:
        raise UserError("log=wandb, but wandb is not installed; pip install wandb, or log=local") from error
    return wandb


def _kept_id(stage_dir: Path) -> str:
    """The id in the stage's folder; made and kept there the first time, so that a resumed stage goes on in its run."""
    id_file = stage_dir / ID_FILE
    if not id_file.is_file() or not id_file.read_text().strip():
        id_file.write_text(secrets.token_hex(4) + "\n")
    return id_file.read_text().strip()


def _tags(config: dict[str, Any]) -> tuple[str, ...]:
    """The model, and the adapter method if any. wandb allows 64 characters a tag."""
    tags = [config["model"]["path"][-64:]]
    if config["peft"]["method"] != "none":
        tags.append(config["peft"]["method"])
    return tuple(tag for tag in tags if tag)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
