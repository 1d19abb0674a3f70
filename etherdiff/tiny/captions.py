"""Captions of a scene: full, loose, or of one thing only. They never say where things are."""

import numpy as np

from etherdiff.tiny.things import Thing

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
