"""The shipped recipes: one per method, complete, and saying what the defaults say."""

from pathlib import Path

import pytest
import yaml

from etherdiff.adapters.methods import METHODS
from etherdiff.config import METHOD_NAMES, DreamBoothConfig, read_config

RECIPES = Path(__file__).parents[1] / "configs/dreambooth"
LEFT_TO_THE_USER = {"subject", "output", "data_root", "class_noun", "prediction_type", "overwrite", "dry_run"}


def test_there_is_one_per_method():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(METHOD_NAMES)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_recipe_is_complete_and_agrees_with_the_defaults(method):
    path = RECIPES / f"{method}.yaml"
    written = yaml.safe_load(path.read_text())
    assert set(written) == set(DreamBoothConfig.model_fields) - LEFT_TO_THE_USER
    config = read_config(DreamBoothConfig, path, [], {"subject": "photos"})
    defaults = METHODS[method].defaults
    expected = DreamBoothConfig(
        subject="photos",
        method=method,
        learning_rate=METHODS[method].learning_rate,
        blocks=defaults.blocks,
        rank=defaults.rank,
        class_images=200,  # the paper's, which the default is but for the tiny base
    )
    assert config == expected
