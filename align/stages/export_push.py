"""The exported folder to a repository of the Hugging Face hub: only when it is named."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from align.config.errors import UserError
from align.config.schema import ExportForm, ExportStage
from align.models.load import is_hub_id, resolve_model
from align.models.trained import Trained

ERRORS = (HfHubHTTPError, OSError, ValueError)
"""What the hub's client raises: refused, unreachable or offline, and no token."""


def check_push(stage: ExportStage, found: Trained) -> None:
    """Raises: UserError for a name that is none, without a login, for an adapter whose base only this machine has."""
    key = f"stages.export.push_to={stage.push_to}"
    if not is_hub_id(str(stage.push_to)):
        raise UserError(f"{key}: a hub repository is organisation/name")
    if ExportForm.model not in stage.forms and Path(resolve_model(str(found.base))).exists():
        raise UserError(f"{key}: the base of this adapter is a folder of this machine; push the model instead")
    try:
        HfApi().whoami()
    except ERRORS as error:
        raise UserError(f"{key}: the hub does not let you in ({_first_line(error)}); hf auth login") from error


def push(folder: Path, stage: ExportStage) -> str:
    """Upload; returns what to say. Raises: UserError if the hub does not take it; the folder is there all the same."""
    api, name = HfApi(), str(stage.push_to)
    try:
        api.create_repo(name, private=stage.private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Exported by align")
    except ERRORS as error:
        raise UserError(
            f"stages.export.push_to={name}: not uploaded ({_first_line(error)}); {folder} is complete: upload it "
            "yourself with hf upload, or type the same command again"
        ) from error
    return f"uploaded to {commit.commit_url if hasattr(commit, 'commit_url') else name}"


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
