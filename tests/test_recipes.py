"""Every recipe composes to a typed run, and every option file says when to choose it."""

from pathlib import Path

import pytest

from align.config import listing
from align.config.keys import SLOTS
from align.config.schema import ConstitutionalStage, ExportStage, RunConfig, StageConfig, Verb
from align.config.store import compose_run
from align.stages.rows import maker_of
from align.stages.speakers import speaker_configs

RECIPES = sorted(listing.options("recipe"))
FILES = sorted(listing.conf_dir().rglob("*.yaml")) + sorted((listing.conf_dir() / "recipe").glob("*.yaml"))


def test_the_promised_recipes_are_there():
    assert {"pretrain", "sft", "dpo", "sft_dpo", "export", "classify", "chat"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_to_a_typed_run_of_its_own_name(recipe):
    config = compose_run([f"+recipe={recipe}"]).config
    assert isinstance(config, RunConfig)
    assert config.name == recipe
    assert config.run_dir == f"runs/{recipe}"
    assert config.run or config.do is not Verb.train, "a recipe runs a stage, or names a verb"
    for stage in config.run:
        assert type(getattr(config.stages, stage)).__module__ == "align.config.schema"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_needs_nothing_that_is_not_embedded(recipe):
    config = compose_run([f"+recipe={recipe}"]).config
    for place, stage in enumerate(config.run):
        maker = maker_of(config, SLOTS[stage])
        assert maker in config.run[:place] if maker else getattr(config.data, SLOTS[stage]).startswith("tiny:")
    assert config.model.path.startswith("tiny-")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_starts_each_stage_from_a_model_that_exists_by_then(recipe):
    config = compose_run([f"+recipe={recipe}"]).config
    made = {config.model.path}
    for name in config.run:
        stage = getattr(config.stages, name)
        if name == "score":
            assert stage.reward_model == "runs/reward/reward/reward_model", "what +recipe=reward leaves"
            continue
        if isinstance(stage, ConstitutionalStage):
            needed = {one.model for one in speaker_configs(stage).values()}
        else:
            one = isinstance(stage, StageConfig | ExportStage)
            needed = {stage.policy} if one else set(stage.models.values())
        assert needed and needed <= made
        made.add(f"{config.run_dir}/{name}/policy")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_takes_field_standard_settings_for_a_model_of_ones_own(recipe):
    config = compose_run([f"+recipe={recipe}", "model.path=/models/some"]).config
    for name in config.run:
        stage = getattr(config.stages, name)
        if isinstance(stage, StageConfig):
            assert stage.learning_rate == type(stage)().learning_rate
            assert stage.batch_size == type(stage)().batch_size


@pytest.mark.parametrize("file", FILES, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_a_yaml_file_opens_with_one_line_that_says_when_to_choose_it(file: Path):
    lines = file.read_text().splitlines()
    position = 1 if lines[0].startswith("# @package ") else 0
    assert lines[position].startswith("# ") and len(lines[position]) > 20
    assert listing.first_comment(file) == lines[position][2:]
