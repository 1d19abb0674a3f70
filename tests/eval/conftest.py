"""Random-weight networks of the classes that the tiny preset has, and images to score."""

import pytest
from eval_runs import build_networks
from eval_toys import draw

from etherdiff.eval.networks import find_backbones
from etherdiff.eval.scores import PromptImages


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """Folders clip, dino and features, as in etherdiff/assets/tiny."""
    root = tmp_path_factory.mktemp("networks")
    build_networks(root)
    return root


@pytest.fixture(scope="session")
def specs(networks):
    parts = {"dino": "dino", "clip": "clip", "lpips": "features", "fid": "features"}
    return {role: str(networks / part) for role, part in parts.items()}


@pytest.fixture
def backbones(specs):
    return find_backbones(["dino", "clip", "lpips", "fid"], "tiny", specs, "cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ETHERDIFF_CACHE", str(folder))
    return folder


@pytest.fixture
def photos(tmp_path):
    """Three real images and two held-out ones."""
    found = [draw(tmp_path / f"real/{number}.png", number) for number in range(5)]
    return found[:3], found[3:]


@pytest.fixture
def prompts(tmp_path):
    """Two prompts with three images each."""
    texts = [("a sks dog in the snow", "a dog in the snow"), ("a red sks dog", "a red dog")]
    return [
        PromptImages(
            prompt=prompt,
            plain_prompt=plain,
            images=tuple(draw(tmp_path / f"generated/{number}/{seed}.png", 100 + 10 * number + seed) for seed in range(3)),
            seeds=(0, 1, 2),
        )
        for number, (prompt, plain) in enumerate(texts)
    ]
