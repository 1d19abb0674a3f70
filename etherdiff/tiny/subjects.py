"""The tiny world's DreamBooth subjects: individual things whose combination of pattern and colours no training scene has."""

from dataclasses import dataclass

import numpy as np

from etherdiff.tiny.things import Thing, make_thing


@dataclass(frozen=True)
class TinySubject:
    """An individual to learn: `split` says whether settings may be chosen on it (validation) or only judged (test)."""

    thing: Thing
    split: str

    @property
    def class_noun(self) -> str:
        """What it is one of."""
        return self.thing.kind


_Row = tuple[str, str, str, str, str, str, str | None]
_TABLE: tuple[_Row, ...] = (  # name, split, kind, pattern, colours, outline
    ("candy_ball", "test", "ball", "striped", "pink", "cyan", None),
    ("ladybird_ball", "test", "ball", "dotted", "red", "black", "white"),
    ("chess_box", "test", "box", "checkered", "white", "purple", None),
    ("gift_box", "test", "box", "striped", "green", "red", "yellow"),
    ("traffic_cone", "test", "cone", "striped", "orange", "white", None),
    ("night_star", "test", "star", "two-tone", "blue", "yellow", None),
    ("swim_ring", "test", "ring", "striped", "red", "white", "blue"),
    ("spotted_heart", "test", "heart", "dotted", "pink", "white", None),
    ("picnic_mug", "test", "mug", "checkered", "yellow", "green", None),
    ("forest_house", "test", "house", "two-tone", "purple", "orange", "black"),
    ("toadstool", "test", "mushroom", "dotted", "red", "white", None),
    ("reef_fish", "test", "fish", "striped", "orange", "blue", None),
    ("beach_ball", "validation", "ball", "two-tone", "yellow", "purple", None),
    ("tiled_house", "validation", "house", "checkered", "cyan", "black", None),
    ("ink_mug", "validation", "mug", "dotted", "blue", "pink", "white"),
    ("moss_fish", "validation", "fish", "dotted", "green", "yellow", None),
)


def _make(index: int, row: _Row) -> TinySubject:
    _, split, kind, pattern, colour, second, outline = row
    return TinySubject(make_thing(np.random.Generator(np.random.Philox(index)), kind, pattern, colour, second, outline), split)


SUBJECTS: dict[str, TinySubject] = {row[0]: _make(index, row) for index, row in enumerate(_TABLE)}


def held_out_combinations() -> frozenset[tuple[str, str, str, str | None]]:
    """Return kind, pattern and colours of every subject, and the same with the two colours exchanged."""
    combinations = {subject.thing.combination for subject in SUBJECTS.values()}
    return frozenset(combinations | {(kind, pattern, b, a) for kind, pattern, a, b in combinations if b})
