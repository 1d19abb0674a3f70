"""The judge finds nothing wrong with true scenes, and what is wrong with others."""

import itertools

import numpy as np
import pytest
from tiny_world.judge import judge

from etherdiff.tiny.world import CLASSES, GROUNDS, SKIES, render_scene


@pytest.fixture(scope="module")
def scenes():
    return [render_scene("validation", index) for index in range(60)]


def _judge(scene, image=None, segmentation=None):
    image = scene.image if image is None else image
    segmentation = scene.segmentation if segmentation is None else segmentation
    return judge(image, segmentation, scene.sky, scene.ground, scene.things)


def test_true_scenes_pass(scenes):
    judgements = [_judge(scene) for scene in scenes]
    assert all(judgement.sky and judgement.ground and all(judgement.kinds) for judgement in judgements)
    assert np.mean([right for judgement in judgements for right in judgement.colours]) > 0.95


def test_another_scenes_picture_fails(scenes):
    judgements = [_judge(scene, other.image, other.segmentation) for scene, other in itertools.pairwise(scenes)]
    chance = {
        "sky": np.mean([judgement.sky for judgement in judgements]),
        "ground": np.mean([judgement.ground for judgement in judgements]),
        "colour": np.mean([right for judgement in judgements for right in judgement.colours]),
    }
    assert chance["sky"] < 0.45
    assert chance["ground"] < 0.4
    assert chance["colour"] < 0.15


def test_each_mistake_is_found(scenes):
    scene = next(scene for scene in scenes if len(scene.things) == 1 and scene.things[0].pattern == "plain")
    thing = scene.things[0]
    there = scene.segmentation == CLASSES.index(thing.kind)
    wrong_sky = np.where(
        scene.segmentation == CLASSES.index(scene.sky), (CLASSES.index(scene.sky) + 1) % len(SKIES), scene.segmentation
    )
    assert not _judge(scene, segmentation=wrong_sky).sky
    other_ground = next(ground for ground in GROUNDS if ground != scene.ground)
    wrong_ground = np.where(scene.segmentation == CLASSES.index(scene.ground), CLASSES.index(other_ground), scene.segmentation)
    assert not _judge(scene, segmentation=wrong_ground).ground
    missing = _judge(scene, segmentation=np.where(there, CLASSES.index(scene.ground), scene.segmentation))
    assert missing.kinds == missing.colours == (False,)
    repainted = scene.image.copy()
    repainted[there] = (20, 200, 60) if thing.colour != "green" else (220, 20, 20)
    assert _judge(scene, image=repainted).colours == (False,)
