"""The shipped recipes: one per method and task, complete, and saying what the defaults say."""

from pathlib import Path

import pytest
import yaml

from etherdiff.adapters.methods import METHODS
from etherdiff.config import METHOD_NAMES, DreamBoothConfig, S2IConfig, read_config

RECIPES = Path(__file__).parents[1] / "configs"
LEFT_TO_THE_USER = {"subject", "output", "data_root", "class_noun", "prediction_type", "overwrite", "dry_run"}
S2I_METHODS = (*METHOD_NAMES, "none")


@pytest.mark.parametrize(("task", "methods"), [("dreambooth", METHOD_NAMES), ("s2i", S2I_METHODS)])
def test_there_is_one_per_method(task, methods):
    assert {path.stem for path in (RECIPES / task).glob("*.yaml")} == set(methods)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_recipe_is_complete_and_agrees_with_the_defaults(method):
    path = RECIPES / f"dreambooth/{method}.yaml"
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


@pytest.mark.parametrize("method", S2I_METHODS)
def test_s2i_recipe_is_complete_and_agrees_with_the_defaults(method):
    path = RECIPES / f"s2i/{method}.yaml"
    assert set(yaml.safe_load(path.read_text())) == set(S2IConfig.model_fields) - LEFT_TO_THE_USER
    defaults = METHODS[method].defaults if method != "none" else None
    rate = METHODS[method].s2i_learning_rate if method != "none" else 1e-4
    expected = S2IConfig(
        dataset="ade20k",
        method=method,
        learning_rate=rate,
        encoder_learning_rate=min(rate, 1e-4),  # the paper: the adapter's, at most 1e-4
        blocks=defaults and defaults.blocks,
        rank=defaults and defaults.rank,
    )
    assert read_config(S2IConfig, path, [], {}) == expected
