"""Scenes rendered once and kept as memory-mapped arrays for the builders of the tiny models."""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from etherdiff.tiny.world import COLOURS, GROUNDS, KINDS, PATTERNS, SKIES, Scene, render_scene

LABELS = (*SKIES, *GROUNDS, *KINDS, *COLOURS, *PATTERNS)
"""What `SceneSet.labels` say is there."""
CAPTIONS = ("caption", "loose_caption", "short_caption")
THING_WEIGHT = 5.0  # of things beside sky and ground: in few pixels they have most of what is worth keeping
_CHUNK = 500  # scenes a worker renders at a time


class SceneSet(NamedTuple):
    """Scenes 0 to N-1 of a split."""

    images: NDArray[np.uint8]
    """(N, 64, 64, 3)"""
    segmentations: NDArray[np.uint8]
    """(N, 64, 64)"""
    labels: NDArray[np.uint8]
    """(N, len(LABELS)), 1 where it is in the scene"""
    captions: list[str]
    loose_captions: list[str]
    short_captions: list[str]


def scene_set(split: str, count: int, work: Path) -> SceneSet:
    """The first `count` scenes of a split, rendered by two processes on first use and read from `work` afterwards."""
    folder = _rendered(split, count, work)
    if folder is None:
        folder = work / f"scenes-{split}-{count}"
        _render(split, count, folder)
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    arrays = (np.load(folder / f"{name}.npy", mmap_mode="r")[:count] for name in ("images", "segmentations", "labels"))
    return SceneSet(*arrays, *(captions[name][:count] for name in CAPTIONS))


def _rendered(split: str, count: int, work: Path) -> Path | None:
    """A folder that has these scenes, and perhaps more."""
    complete = (path.parent for path in work.glob(f"scenes-{split}-*/captions.json"))
    return next((folder for folder in complete if int(folder.name.rpartition("-")[2]) >= count), None)


def to_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """(B, 64, 64, 3) bytes to (B, 3, 64, 64) float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def thing_weights(segmentations: NDArray[np.uint8]) -> torch.Tensor:
    """(B, 64, 64) classes to (B, 1, 64, 64): 1 for sky and ground, THING_WEIGHT for things."""
    things = torch.from_numpy(segmentations >= len(SKIES) + len(GROUNDS))[:, None]
    return 1 + (THING_WEIGHT - 1) * things.float()


def in_two_processes(render: Callable[[int], Any], starts: range) -> list[Any]:
    """What `render` gives for each start, in order."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(render, starts))


def _render(split: str, count: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    chunks = in_two_processes(partial(_render_chunk, split, count), range(0, count, _CHUNK))
    for position, name in enumerate(("images", "segmentations", "labels")):
        np.save(folder / f"{name}.npy", np.concatenate([chunk[position] for chunk in chunks]))
    captions = {name: [text for chunk in chunks for text in chunk[3][name]] for name in CAPTIONS}
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")  # last: it says that all is there


def _render_chunk(split: str, count: int, start: int) -> tuple[Any, ...]:
    scenes = [render_scene(split, index) for index in range(start, min(start + _CHUNK, count))]
    return (
        np.stack([scene.image for scene in scenes]),
        np.stack([scene.segmentation for scene in scenes]),
        np.stack([_labels(scene) for scene in scenes]),
        {name: [getattr(scene, name) for scene in scenes] for name in CAPTIONS},
    )


def _labels(scene: Scene) -> NDArray[np.uint8]:
    present = {scene.sky, scene.ground}
    for thing in scene.things:
        present |= {thing.kind, thing.pattern, thing.colour, thing.second or thing.colour}
    return np.array([name in present for name in LABELS], np.uint8)
