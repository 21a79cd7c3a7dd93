"""From a command line to a typed run: Hydra composes; a model or data of one's own puts its own options in force.

* `model.path=` (typed, or a recipe's) that names no embedded model puts `model=own` in force: field-standard settings,
  not those of a model of 1 M parameters. An embedded name puts its own option in force, and a folder with the embedded
  architecture, such as a policy trained from it, keeps the embedded settings.
* A data slot given while `data=tiny` is in force puts `data=files` in force: nothing is mixed with the embedded rows
  unless `data=tiny` is typed as well. A model of one's own may train on the embedded rows; it is said aloud.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from align.config import keys, listing, refusals
from align.config.adapters import refuse_adapter
from align.config.effects import refuse_without_effect
from align.config.errors import UserError
from align.config.keys import EVERY_SLOT
from align.config.ranges import refuse_out_of_range
from align.config.schema import RunConfig

EMBEDDED = {
    "tiny": "tiny-base",
    "tiny_sft": "tiny-sft",
    "tiny_critic": "tiny-critic",
    "tiny_untrained": "tiny-untrained",
}
"""Option of group `model` -> the embedded model that it names."""
EMBEDDED_CONFIG = Path(__file__).resolve().parents[1] / "world" / "models" / "base" / "config.json"
ARCHITECTURE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")


@dataclass(frozen=True)
class Composed:
    """A run, as Hydra composed it and as types."""

    tree: DictConfig
    """Before interpolation: shows every wire. Stages that do not run are left out."""
    config: RunConfig
    notes: list[str]
    """What was put in force without being typed."""


def register() -> None:
    """Make the schema known to Hydra, under the name that conf/config.yaml gives it."""
    ConfigStore.instance().store(name="schema", node=RunConfig)


def compose_run(arguments: list[str], user_dir: Path | None = None, *, sweep: bool = False) -> Composed:
    """The run that a command line asks for. sweep: it is a member of one.

    Raises: UserError for anything wrong with it, one line with a near match.
    """
    overrides = refusals.parse(arguments, user_dir)
    recipe = check_command_line(overrides, sweep=sweep, user_dir=user_dir)
    arguments = [line(override) for override in overrides]
    tree, choices = _compose(arguments, user_dir)
    extra, notes = _options_in_force(tree, choices, overrides)
    if extra:
        tree, choices = _compose(arguments + extra, user_dir)
    known = _recipe_stages(tree, arguments, overrides, user_dir)
    _refuse_incomplete(tree, choices, recipe, known)
    config = _typed(tree)
    given = [o.key_or_group for o in overrides if o.key_or_group not in (*listing.GROUPS, "recipe")]
    refuse_out_of_range(config)
    refuse_without_effect(given, config, OmegaConf.to_container(tree.data))
    refuse_adapter(config)
    return Composed(tree, config, notes)


def check_command_line(overrides: list[Override], *, sweep: bool, user_dir: Path | None) -> str:
    """Everything that can be refused before composing, for a run and for a sweep alike; returns the recipe's name.

    Raises: UserError for the first thing wrong.
    """
    if user_dir is not None:
        if not user_dir.is_dir():
            raise UserError(f"--config-dir {user_dir}: no such folder")
        refusals.refuse_shadows(user_dir)
    hydras_own = [o for o in overrides if o.key_or_group.startswith(("hydra.", "hydra/"))]
    recipe = refusals.recipe_name(overrides, sweep=sweep, user_dir=user_dir)
    others = [o for o in overrides if o not in hydras_own]
    refusals.refuse(hydras_own + others, _stages_to_run(overrides, recipe, user_dir), sweep=sweep, user_dir=user_dir)
    return recipe


def _stages_to_run(overrides: list[Override], recipe: str, user_dir: Path | None) -> list[str]:
    """The stages that would run, read before composing so that a near match is one that runs."""
    for override in overrides:
        if override.key_or_group == "run" and isinstance(override.value(), list):
            return [str(name) for name in override.value()]
    folders = [listing.conf_dir(), *([user_dir] if user_dir else [])]
    file = next(f for folder in folders if (f := folder / "recipe" / f"{recipe}.yaml").is_file())
    return list((OmegaConf.load(file) or {}).get("run") or [])


def line(override: Override) -> str:
    """The override as Hydra takes it; a name below a dictionary, such as an evaluated model's, needs no plus, and
    neither does a dictionary of such names."""
    key = keys.find(override.key_or_group)
    if key is not None and key.open and (key.path != override.key_or_group or isinstance(override.value(), dict)):
        return "++" + override.input_line.lstrip("+")
    return override.input_line


def _compose(arguments: list[str], user_dir: Path | None) -> tuple[DictConfig, dict[str, Any]]:
    register()
    search = [f"hydra.searchpath=[{quoted(f'file://{user_dir.resolve()}')}]"] if user_dir else []
    try:
        if GlobalHydra.instance().is_initialized():
            tree = compose("config", overrides=search + arguments, return_hydra_config=True)
        else:
            with initialize_config_dir(str(listing.conf_dir()), version_base="1.3", job_name="align"):
                tree = compose("config", overrides=search + arguments, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_composition_error(error)) from error
    choices = OmegaConf.to_container(tree.hydra.runtime.choices)
    with open_dict(tree):
        del tree["hydra"]
    assert isinstance(choices, dict)
    return tree, {str(group): option for group, option in choices.items()}


def _options_in_force(
    tree: DictConfig, choices: dict[str, Any], overrides: list[Override]
) -> tuple[list[str], list[str]]:
    """Options that the model and data given put in force, and a sentence about each."""
    typed = {override.key_or_group for override in overrides}
    extra, notes = [], []
    path, option = OmegaConf.select(tree, "model.path", throw_on_missing=False), choices["model"]
    if option in EMBEDDED and path != EMBEDDED[option] and not _has_embedded_architecture(path):
        wanted = next((name for name, embedded in EMBEDDED.items() if embedded == path), "own")
        if "model" in typed:
            raise UserError(f"model={option} is the embedded {EMBEDDED[option]}, model.path={path} another; drop one")
        extra.append(f"model={wanted}")
        # The option names a path of its own, and a recipe's goes over it.
        option = wanted
        if wanted == "own":
            notes.append(f"model.path={path} puts model=own in force: field-standard settings, not the tiny model's")
    given = [f"data.{slot}" for slot in sorted(EVERY_SLOT) if _is_own(tree, slot) and f"data.{slot}" in typed]
    if choices["data"] == "tiny" and given and "data" not in typed:
        extra.append("data=files")
        notes.append(f"{given[0]} puts data=files in force: no embedded rows, unless data=tiny is typed as well")
    elif choices["data"] == "tiny" and option == "own" and "data" not in typed:
        notes.append("data is the embedded tiny world; give data.<slot>=FILE for your own")
    return extra, notes


def _recipe_stages(
    tree: DictConfig, arguments: list[str], overrides: list[Override], user_dir: Path | None
) -> list[str]:
    """The stages that a recipe wires: those it runs when `run=` is not typed, and those typed as `stage=`."""
    if not any(override.key_or_group == "run" for override in overrides):
        return list(tree.run)
    plain = [line for line in arguments if not line.startswith("run=")]
    own = list(_compose(plain, user_dir)[0].run)
    typed = [o.value() for o in overrides if o.key_or_group == "stage"]
    added = [str(name) for value in typed for name in (value if isinstance(value, list) else [value])]
    return own + [name for name in added if name not in own]


def _is_own(tree: DictConfig, slot: str) -> bool:
    return not str(OmegaConf.to_container(tree.data)[slot]).startswith("tiny:")


def _has_embedded_architecture(path: str | None) -> bool:
    """Whether a folder holds a descendant of the embedded model, such as a policy that was trained from it."""
    try:
        ours, theirs = (json.loads(f.read_text()) for f in (EMBEDDED_CONFIG, Path(path or "") / "config.json"))
    except (OSError, ValueError):
        return False
    return all(ours.get(key) == theirs.get(key) for key in ARCHITECTURE)


def _refuse_incomplete(tree: DictConfig, choices: dict[str, Any], recipe: str, known: list[str]) -> None:
    """Name what is missing and take the stages that do not run out of the tree. `known` are the recipe's own stages.

    Raises: UserError for a model without a path, or a run with a stage that the recipe knows nothing about.
    """
    if "recipe" not in choices or "recipe" in tree:
        raise UserError(f"recipe {recipe} was not applied: group `recipe` was not found beside the configuration")
    if OmegaConf.is_missing(tree, "name"):
        tree.name = recipe
    if not OmegaConf.select(tree, "model.path"):
        raise UserError("model=own names no model; add model.path=FOLDER_OR_HUB_ID")
    for name in tree.run:
        if name not in tree.stages:
            raise UserError(f"run: there is no stage {name}{refusals.near(name, list(tree.stages))}")
        if name not in known or tree.stages[name] is None:
            raise UserError(
                f"run: recipe {recipe} has no stage {name}, only {', '.join(known)}; choose a recipe that has it, "
                f"or add stage=[{','.join(tree.run)}] and wire its policy"
            )
    for name in tree.stages:
        if name not in tree.run:
            tree.stages[name] = None


def _typed(tree: DictConfig) -> RunConfig:
    try:
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise UserError(_composition_error(error)) from error
    assert isinstance(config, RunConfig)
    return config


def _composition_error(error: Exception) -> str:
    """One line out of Hydra's several: what it says, the key, a near match."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    path = getattr(cause, "full_key", None)
    text = " ".join(line for line in lines[:2] if "full_key" not in line and "object_type" not in line)
    if path is None or keys.find(path) or path in keys.sections():
        return f"{path}: {text}" if path and path not in text else text
    close = keys.nearest(path, [])
    return f"{path} is not a key ({text})" + (f"; did you mean {close[0]}?" if close else "")


def quoted(value: str) -> str:
    """A value that Hydra's grammar takes as it is, whatever is in it."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
