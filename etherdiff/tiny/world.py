"""The tiny world: scenes of 64 x 64 pixels with their segmentation maps and captions, each a function of split and index.

Training, validation and test scenes are drawn from disjoint random streams, and the combinations of kind, pattern and colours
that the DreamBooth subjects have (`SUBJECTS`) are in none of them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from etherdiff.system.files import cache_dir, make_once
from etherdiff.tiny.scenery import GROUNDS, SIZE, SKIES, draw_ground, draw_sky, light_under
from etherdiff.tiny.things import (
    COLOURS,
    KINDS,
    PATTERNS,
    SUBJECTS,
    FloatArray,
    Thing,
    held_out_combinations,
    near_twin,
    sample_thing,
    thing_colours,
    thing_distance,
)

__all__ = [
    "CLASSES",
    "COLOURS",
    "GROUNDS",
    "KINDS",
    "PALETTE",
    "PATTERNS",
    "SIZE",
    "SKIES",
    "SPLITS",
    "SUBJECTS",
    "sample_allowed",
]

CLASSES = SKIES + GROUNDS + KINDS
"""Classes of a segmentation map, by value."""
PALETTE: NDArray[np.uint8] = np.array(
    [
        *[(135, 190, 250), (190, 200, 210), (25, 30, 80), (250, 150, 90), (110, 120, 130)],
        *[(70, 150, 50), (220, 190, 120), (235, 240, 250), (30, 100, 170), (160, 80, 60), (140, 95, 50)],
        *[(230, 25, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180)],
        *[(240, 50, 230), (0, 255, 127), (128, 0, 0), (70, 240, 240), (170, 255, 195)],
    ],
    np.uint8,
)
"""One RGB colour for each of `CLASSES`: (21, 3)."""
SPLITS = ("train", "validation", "test")
_SCENE, _INDIVIDUAL, _VIEW, _SUBJECT = range(4)  # what a random stream is for
_HELD_OUT = held_out_combinations()


@dataclass(frozen=True)
class Scene:
    """A picture and the truth about it."""

    image: NDArray[np.uint8]
    """(64, 64, 3)"""
    segmentation: NDArray[np.uint8]
    """(64, 64), indices in `CLASSES`"""
    sky: str
    ground: str
    things: tuple[Thing, ...]
    """Farthest first; a nearer one may hide part of another."""
    caption: str
    """Names everything."""
    loose_caption: str
    """Names some of it."""
    short_caption: str
    """Names one thing."""


@dataclass(frozen=True)
class _Pose:
    x: float
    y: float
    radius: float
    angle: float


def render_scene(split: str, index: int) -> Scene:
    """Draw scene number `index` of a split: one to three things anywhere on the ground."""
    rng = _stream(_SCENE, split, index)
    count = int(rng.choice(3, p=(0.45, 0.33, 0.22))) + 1
    things = tuple(sample_allowed(rng) for _ in range(count))
    return _compose(rng, things, (None, (10, 20), (8.5, 14), (7.5, 11.5))[count])


def render_thing(split: str, thing_index: int, view: int, sibling: int = 0) -> Scene:
    """Return one individual thing, large, in scene number `view`, sometimes next to others.

    Sibling 0 is the thing itself, 1 another individual of its kind, 2 one that differs in a single trait.
    """
    rng = _stream(_INDIVIDUAL, split, thing_index)
    thing = sample_allowed(rng)
    if sibling == 1:
        first, kind = thing.combination, thing.kind
        while (thing := sample_allowed(rng, kind)).combination == first:
            pass
    elif sibling == 2:
        thing = near_twin(rng, thing)
    return _with_company(_stream(_VIEW, split, thing_index, view, sibling), thing, alone=0.65)


def render_subject(name: str, view: int, held_out: bool = False) -> Scene:
    """Return a DreamBooth subject in scene number `view`, alone; the held-out scenes are others than those to learn from.

    Raises:
        KeyError: no such subject.
    """
    subject = SUBJECTS[name]
    rng = _stream(_SUBJECT, "test" if held_out else "train", list(SUBJECTS).index(name), view)
    return _with_company(rng, subject.thing, alone=1.0)


def _stream(purpose: int, split: str, *numbers: int) -> np.random.Generator:
    """Return the random stream of this purpose, split and numbers: the same on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((purpose, SPLITS.index(split), *numbers))))


def sample_allowed(rng: np.random.Generator, kind: str | None = None) -> Thing:
    """Draw any thing, or any of this kind, whose combination is no subject's."""
    while (thing := sample_thing(rng, kind)).combination in _HELD_OUT:
        pass
    return thing


def _with_company(rng: np.random.Generator, thing: Thing, alone: float) -> Scene:
    """Return the thing large and in front; unless alone, one smaller thing of another kind behind it."""
    if rng.random() < alone:
        return _compose(rng, (thing,), (13, 21))
    while (other := sample_allowed(rng)).kind == thing.kind:
        pass
    return _compose(rng, (other, thing), (7.5, 10), (12.5, 17))


def _compose(rng: np.random.Generator, things: tuple[Thing, ...], *sizes: tuple[float, float] | None) -> Scene:
    """Place the things (each in its range of sizes, or all in the one given) and draw everything."""
    sky, ground = str(rng.choice(SKIES)), str(rng.choice(GROUNDS))
    horizon = float(rng.uniform(26, 40))
    poses = _place(rng, [sizes[i % len(sizes)] or (10, 20) for i in range(len(things))], horizon)
    if len(sizes) == 1:  # equals stand in order of their distance; a main thing stays in front
        poses.sort(key=lambda pose: pose.y + pose.radius)
    image, segmentation = _draw(rng, sky, ground, horizon, things, poses)
    return Scene(
        image,
        segmentation,
        sky,
        ground,
        things,
        full_caption(rng, things, ground, sky),
        loose_caption(rng, things, ground, sky),
        short_caption(rng, things),
    )


def _place(rng: np.random.Generator, sizes: list[tuple[float, float]], horizon: float) -> list[_Pose]:
    """Place feet on the ground, inside the picture, hiding each other a little at most if ten tries find such a place."""
    poses: list[_Pose] = []
    for low, high in sizes:
        radius = rng.uniform(low, high)
        for _ in range(10):
            feet = rng.uniform(max(horizon + 3, 2 * radius), SIZE - 1)
            pose = _Pose(rng.uniform(0.9 * radius, SIZE - 0.9 * radius), feet - 0.9 * radius, radius, rng.uniform(-0.4, 0.4))
            if all(np.hypot(pose.x - o.x, pose.y - o.y) > 0.85 * (pose.radius + o.radius) for o in poses):
                break
        poses.append(pose)
    return poses


def _draw(
    rng: np.random.Generator, sky: str, ground: str, horizon: float, things: tuple[Thing, ...], poses: list[_Pose]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    light = light_under(sky, rng)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    below = np.clip(rows - horizon - rng.uniform(-0.06, 0.06) * (columns - SIZE / 2) + 0.5, 0, 1)
    image = draw_sky(sky, rng, horizon) * (1 - below[..., None]) + draw_ground(ground, rng, light) * below[..., None]
    segmentation = np.where(below > 0.5, CLASSES.index(ground), CLASSES.index(sky)).astype(np.uint8)
    from_left = rng.uniform(-1, 1)
    for thing, pose in zip(things, poses, strict=True):
        _cast_shadow(image, pose, below, from_left)
        _draw_thing(image, segmentation, thing, pose, light, from_left)
    image += rng.normal(0, 0.008, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), segmentation


def _cast_shadow(image: FloatArray, pose: _Pose, below: FloatArray, from_left: float) -> None:
    """Darken the ground under a thing, softly, away from the light."""
    x, y = pose.x + 0.25 * from_left * pose.radius, pose.y + 0.9 * pose.radius
    window = _window(x, y, 1.5 * pose.radius)
    rows, columns = np.mgrid[window].astype(np.float32)
    depth = np.exp(-(((columns - x) / pose.radius) ** 2) - ((rows - y) / (0.3 * pose.radius)) ** 2) * below[window]
    image[window] *= 1 - 0.4 * depth[..., None]


def _draw_thing(
    image: FloatArray, segmentation: NDArray[np.uint8], thing: Thing, pose: _Pose, light: FloatArray, from_left: float
) -> None:
    window = _window(pose.x, pose.y, 1.25 * pose.radius + 1)
    rows, columns = np.mgrid[window].astype(np.float32)
    dx, dy = (columns - pose.x) / np.float32(pose.radius), (rows - pose.y) / np.float32(pose.radius)
    cos, sin = np.float32(np.cos(pose.angle)), np.float32(np.sin(pose.angle))
    x, y = cos * dx + sin * dy, cos * dy - sin * dx
    distance = thing_distance(thing.kind, x, y)
    inside = np.clip(0.5 - distance * np.float32(pose.radius), 0, 1)
    shade = 0.96 - np.float32(0.12) * (from_left * dx + dy)
    colours = thing_colours(thing, x, y, distance, pose.radius) * light * shade[..., None]
    image[window] += (colours - image[window]) * inside[..., None]
    segmentation[window][inside > 0.5] = CLASSES.index(thing.kind)


def _window(x: float, y: float, reach: float) -> tuple[slice, slice]:
    """Return the part of the canvas within reach of a point."""
    top, left = max(int(y - reach), 0), max(int(x - reach), 0)
    return slice(top, min(int(y + reach) + 2, SIZE)), slice(left, min(int(x + reach) + 2, SIZE))


_PREFIXES = ("a photo of ", "a picture of ", "")
UNDER = {
    "clear sky": ("under a clear sky", "under a blue sky", "on a clear day"),
    "cloudy sky": ("under a cloudy sky", "on a cloudy day"),
    "night sky": ("under a night sky", "at night"),
    "sunset sky": ("under a sunset sky", "at sunset"),
    "rainy sky": ("under a rainy sky", "in the rain"),
}
ON = {
    "grass": ("on grass", "on the grass"),
    "sand": ("on sand", "on the sand"),
    "snow": ("on snow", "in the snow"),
    "water": ("on water", "floating on water"),
    "bricks": ("on bricks", "on a brick floor"),
    "wood": ("on wood", "on a wooden floor"),
}


def full_caption(rng: np.random.Generator, things: tuple[Thing, ...], ground: str, sky: str) -> str:
    """Describe everything there is: all things with their patterns, the ground and the sky, in one of several orders."""
    named = _listed(rng, [thing_phrase(rng, thing) for thing in things])
    on, under = _pick(rng, ON[ground]), _pick(rng, UNDER[sky])
    prefix = _pick(rng, _PREFIXES)
    form = rng.integers(10)
    if form < 6:
        return f"{prefix}{named} {on} {under}"
    if form < 8:
        return f"{prefix}{named} {under}, {on}"
    return f"{under}, {named} {on}"


def loose_caption(rng: np.random.Generator, things: tuple[Thing, ...], ground: str, sky: str) -> str:
    """Describe some of it: some or all things, described more or less, with the ground, the sky, or neither."""
    some = things if rng.random() < 0.6 else things[: rng.integers(1, len(things) + 1)]
    named = _listed(rng, [_loose_phrase(rng, thing) for thing in some])
    places = [("",), (_pick(rng, ON[ground]),), (_pick(rng, UNDER[sky]),)][rng.choice(3, p=(0.4, 0.4, 0.2))]
    return " ".join(part for part in (_pick(rng, _PREFIXES) + named, *places) if part)


def short_caption(rng: np.random.Generator, things: tuple[Thing, ...]) -> str:
    """Name one thing only, by its kind and perhaps its colour, as captioners do; or without article, as DreamBooth does."""
    thing = things[rng.integers(len(things))]
    noun = thing.kind if rng.random() < 0.4 else f"{thing.colour} {thing.kind}"
    return f"a photo of {noun if rng.random() < 0.3 else _article(noun)}"


def thing_phrase(rng: np.random.Generator, thing: Thing) -> str:
    """Return a thing by all its names: 'a red and blue striped ball with a black outline'."""
    first, second, kind = thing.colour, thing.second, thing.kind
    outlined = thing.outline is not None
    phrases = {
        "plain": (f"{first} {kind}",),
        "striped": (f"{first} and {second} striped {kind}", f"{first} {kind} with {second} stripes"),
        "dotted": (f"{first} {kind} with {second} dots", f"{first} and {second} dotted {kind}"),
        "two-tone": (f"half {first} half {second} {kind}", f"two-tone {first} and {second} {kind}"),
        "checkered": (f"{first} and {second} checkered {kind}",),
    }[thing.pattern]
    phrase = _pick(rng, phrases)
    if not outlined:
        return _article(phrase)
    if rng.random() < 0.5:
        return _article(f"{thing.outline} outlined {phrase}")
    joint = " and" if " with " in phrase else " with"
    return _article(f"{phrase}{joint} a {thing.outline} outline")


def _loose_phrase(rng: np.random.Generator, thing: Thing) -> str:
    form = rng.integers(10)
    if form < 4:
        return thing_phrase(rng, thing)
    if form < 6:
        return _article(f"{thing.colour} {thing.kind}")
    if form < 7 and thing.pattern != "plain":
        return _article(f"{thing.pattern} {thing.kind}")
    return _article(thing.kind)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listed(rng: np.random.Generator, phrases: list[str]) -> str:
    if len(phrases) == 2:
        return _pick(rng, (" and ", " and ", " next to ", " beside ")).join(phrases)
    return ", ".join(phrases[:-1]) + f" and {phrases[-1]}" if len(phrases) > 2 else phrases[0]


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


IMAGES = 5
HELD_OUT = 16
VERSION = 1  # of what is rendered here; a new version is rendered into a folder of its own

PROMPTS = (
    "a {identifier} {class_noun} on grass",
    "a {identifier} {class_noun} on sand",
    "a {identifier} {class_noun} in the snow",
    "a {identifier} {class_noun} floating on water",
    "a {identifier} {class_noun} on a brick floor",
    "a {identifier} {class_noun} on a wooden floor",
    "a {identifier} {class_noun} under a clear sky",
    "a {identifier} {class_noun} on a cloudy day",
    "a {identifier} {class_noun} at night",
    "a {identifier} {class_noun} at sunset",
    "a {identifier} {class_noun} in the rain",
    "a {identifier} {class_noun} on sand at night",
    "a {identifier} {class_noun} in the snow at sunset",
    "a {identifier} {class_noun} on a wooden floor on a cloudy day",
    "a {identifier} {class_noun} floating on water in the rain",
    "a {identifier} {class_noun} on grass at sunset",
    "a {identifier} {class_noun} on a brick floor at night",
    "a {identifier} {class_noun} next to a green star",
    "a {identifier} {class_noun} and a purple heart in the snow",
    "a {identifier} {class_noun} beside a white mug on grass",
    "a {identifier} {class_noun} and a black house at sunset",
    "a red {identifier} {class_noun}",
    "a purple {identifier} {class_noun}",
    "a dotted {identifier} {class_noun}",
    "a black outlined {identifier} {class_noun}",
)
"""25 prompts in the manner of DreamBooth's, of what the tiny base knows: grounds, skies, company, properties."""


def subject_folder(name: str) -> Path:
    """Return the subject's images, rendered in the cache on first use: 00.png to 04.png, and held_out/00.png to 15.png."""
    return make_once(cache_dir() / f"tiny-subjects-{VERSION}" / name, lambda folder: render_folder(name, folder))


def render_folder(name: str, folder: Path) -> None:
    """Write a subject's images to learn from and, in held_out/, those to judge by.

    Raises:
        KeyError: no such subject.
    """
    for held_out, count, target in ((False, IMAGES, folder), (True, HELD_OUT, folder / "held_out")):
        target.mkdir(parents=True, exist_ok=True)
        for view in range(count):
            Image.fromarray(render_subject(name, view, held_out).image).save(target / f"{view:02d}.png")
