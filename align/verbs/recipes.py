"""`do=recipes`: list the recipes, or show what one would run."""

from pathlib import Path

from omegaconf import OmegaConf

from align.config.listing import recipe_list
from align.config.schema import RunConfig


def list_recipes(user_dir: Path | None = None) -> str:
    """The recipes, a line each."""
    return recipe_list(user_dir)


def show_recipe(config: RunConfig) -> str:
    """The run with every wire resolved, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
