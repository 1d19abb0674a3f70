"""The tiny world against what its captions, maps and subjects say of it."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_world.judge import name_colours

from etherdiff.tiny.scenery import light_under
from etherdiff.tiny.things import (
    COLOURS,
    KINDS,
    PATTERNS,
    SUBJECTS,
    held_out_combinations,
    near_twin,
    sample_colour,
    sample_thing,
    thing_distance,
)
from etherdiff.tiny.world import (
    CLASSES,
    GROUNDS,
    HELD_OUT,
    IMAGES,
    PALETTE,
    PROMPTS,
    SIZE,
    SKIES,
    SPLITS,
    render_scene,
    render_subject,
    render_thing,
    subject_folder,
)


@pytest.fixture(scope="module")
def scenes():
    return [render_scene("train", index) for index in range(150)]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_the_world_is_as_rich_as_promised():
    assert len(CLASSES) == len(set(CLASSES)) >= 15
    assert len(KINDS) >= 8
    assert len(COLOURS) >= 8
    assert min(len(SKIES), len(GROUNDS), len(PATTERNS)) >= 4
    assert PALETTE.shape == (len(CLASSES), 3)
    assert len({tuple(colour) for colour in PALETTE.tolist()}) == len(CLASSES)


def test_a_scene_is_a_function_of_split_and_index(scenes):
    again = render_scene("train", 7)
    assert np.array_equal(again.image, scenes[7].image)
    assert np.array_equal(again.segmentation, scenes[7].segmentation)
    assert (again.caption, again.things) == (scenes[7].caption, scenes[7].things)


def test_no_two_scenes_are_alike_in_any_split(scenes):
    images = [scene.image.tobytes() for scene in scenes]
    images += [render_scene(split, index).image.tobytes() for split in SPLITS[1:] for index in range(50)]
    assert len(set(images)) == len(images)


def test_images_and_maps_agree(scenes):
    for scene in scenes:
        assert scene.image.shape == (SIZE, SIZE, 3)
        assert scene.image.dtype == scene.segmentation.dtype == np.uint8
        seen = {CLASSES[value] for value in np.unique(scene.segmentation)}
        assert seen <= {scene.sky, scene.ground, *(thing.kind for thing in scene.things)}
        assert {scene.sky, scene.ground, scene.things[-1].kind} <= seen  # nothing hides the nearest thing


def test_every_pixel_of_a_plain_thing_has_its_colour(scenes):
    checked = 0
    for scene in scenes:
        kinds = [thing.kind for thing in scene.things]
        for thing in scene.things:
            if thing.pattern == "plain" and thing.outline is None and kinds.count(thing.kind) == 1:
                names = name_colours(scene.image[scene.segmentation == CLASSES.index(thing.kind)])
                if len(names) >= 60:  # of smaller rests, most are mixed with what is around
                    checked += 1
                    assert (names == COLOURS.index(thing.colour)).mean() > 0.6, scene.caption
    assert checked > 30


def test_full_captions_name_everything_and_never_where(scenes):
    for scene in scenes:
        words = set(re.findall(r"[a-z-]+", scene.caption))
        for thing in scene.things:
            assert {thing.kind, thing.colour} | {c for c in (thing.second, thing.outline) if c} <= words
        for caption in (scene.caption, scene.loose_caption, scene.short_caption):
            assert not set(re.findall(r"[a-z]+", caption)) & {"left", "right", "behind", "front", "middle", "above", "below"}
            assert "sks" not in caption


def test_short_captions_name_one_thing(scenes):
    for scene in scenes:
        named = [kind for kind in KINDS if re.search(rf"\b{kind}\b", scene.short_caption)]
        assert len(named) == 1
        assert named[0] in [thing.kind for thing in scene.things]


def test_captions_vary_in_form(scenes):
    loose = [scene.loose_caption for scene in scenes]
    with_ground = [any(f" {ground}" in text or "floor" in text for ground in GROUNDS) for text in loose]
    assert 0.2 < np.mean(with_ground) < 0.7
    assert len({re.sub(r"\b(" + "|".join((*COLOURS, *KINDS)) + r")\b", "_", scene.caption) for scene in scenes}) > 60


def test_subjects_are_in_no_training_scene(scenes):
    held_out = held_out_combinations()
    things = [thing for scene in scenes for thing in scene.things]
    things += [
        thing for index in range(60) for thing in render_thing("train", index, 0, index % 3).things[-1:] if index % 3 < 2
    ]
    assert not held_out & {thing.combination for thing in things}
    assert held_out & {sample_thing(rng(seed)).combination for seed in range(3_000)}  # they would come up


def test_there_are_enough_subjects_of_each_split():
    assert sum(subject.split == "test" for subject in SUBJECTS.values()) >= 12
    assert sum(subject.split == "validation" for subject in SUBJECTS.values()) >= 4
    assert len({subject.thing.combination for subject in SUBJECTS.values()}) == len(SUBJECTS)


def test_a_subjects_folder_holds_what_to_learn_from_and_what_to_judge_by():
    folder = subject_folder("candy_ball")
    assert len(list(folder.glob("*.png"))) == IMAGES == 5
    assert len(list((folder / "held_out").glob("*.png"))) == HELD_OUT
    contents = {path.read_bytes() for path in folder.rglob("*.png")}
    assert len(contents) == IMAGES + HELD_OUT
    assert subject_folder("candy_ball") == folder


def test_a_subject_is_itself_in_every_scene():
    views = [render_subject("toadstool", view) for view in range(5)]
    assert len({view.things[0] for view in views}) == 1
    assert len({(view.sky, view.ground) for view in views}) > 1


def test_there_are_25_prompts_of_what_the_base_knows():
    assert len(set(PROMPTS)) == 25
    assert all("{identifier} {class_noun}" in prompt for prompt in PROMPTS)


def test_siblings_are_of_one_kind_but_others():
    for index in range(20):
        itself, other, twin = (render_thing("train", index, 0, sibling).things[-1] for sibling in range(3))
        assert itself.kind == other.kind == twin.kind
        assert other.combination != itself.combination
        assert sum(getattr(itself, name) != getattr(twin, name) for name in ("pattern", "colour", "second", "outline")) == 1
        assert render_thing("train", index, 5, 0).things[-1] == itself


@given(seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_a_near_twin_differs_in_one_trait(seed):
    thing = sample_thing(rng(seed))
    twin = near_twin(rng(seed + 1), thing)
    assert sum(getattr(thing, name) != getattr(twin, name) for name in ("kind", "pattern", "colour", "second", "outline")) == 1


@given(kind=st.sampled_from(KINDS), points=st.lists(st.floats(-1.5, 1.5), min_size=4, max_size=4))
@settings(max_examples=300, deadline=None)
def test_distances_change_no_faster_than_position(kind, points):
    """A signed distance is 1-Lipschitz; the fish's flattened body is only nearly one."""
    ax, ay, bx, by = (np.array([[value]]) for value in points)
    apart = float(np.hypot(ax - bx, ay - by)[0, 0])
    change = float(abs(thing_distance(kind, ax, ay) - thing_distance(kind, bx, by))[0, 0])
    assert change <= (1.01 if kind != "fish" else 1.2) * apart + 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_things_fill_their_radius(kind):
    y, x = np.mgrid[-1.3:1.3:131j, -1.3:1.3:131j]
    inside = thing_distance(kind, x, y) < 0
    assert 0.2 < inside.mean() * 2.6**2 / np.pi < 1.2  # area beside the unit disc's
    assert np.hypot(x, y)[inside].max() < 1.3


@pytest.mark.parametrize("sky", SKIES)
@pytest.mark.parametrize("name", COLOURS)
def test_colours_go_by_their_names_in_every_light(name, sky):
    generator = rng(1)
    pixels = [np.array(sample_colour(name, generator)) * light_under(sky, generator) for _ in range(200)]
    shade = generator.uniform(0.85, 1.0, (200, 1))
    named = name_colours((np.clip(np.array(pixels) * shade, 0, 1) * 255).astype(np.uint8))
    assert (named == COLOURS.index(name)).mean() > 0.95  # a bluish pink at night looks purple
