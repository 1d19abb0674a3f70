"""tiny-dino: a ViT whose [CLS] feature says which individual thing a picture shows, across scenes and poses."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from etherdiff.system.files import staged_file
from etherdiff.tiny.world import render_thing
from tiny_world.cards import parameter_count, write_card
from tiny_world.data import in_two_processes, to_tensor
from tiny_world.evaluator import NORMALISATION, evaluator_folder, in_batches, soften, some
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=1_600, learning_rate=1e-3, warmup=100, weight_decay=0.05, ema=0.99, evaluate_every=200)
THINGS, VIEWS = 8_000, 3
HELD_OUT = 1_000
SIBLINGS = 3  # the thing, another of its kind, and one that differs in a single trait: each is an individual to tell apart
BATCH = 24  # things with their siblings, two views of each
TEMPERATURE = 0.1
_CHUNK = 100  # things that a worker renders at a time


def build(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Train (or go on), score on the test split and write OUTPUT/dino."""
    views = thing_views("train", max(round(THINGS * min(fraction, 1)), BATCH), VIEWS, work)
    validation = thing_views("validation", HELD_OUT // 4, 2, work)
    with seeded():
        untrained = make_model()
    schedule = SCHEDULE.shortened(fraction)
    model = train(
        "dino",
        untrained,
        lambda rng: (draw_batch(rng, views),),
        identity_loss,
        schedule,
        work,
        lambda model: triples(model, validation),
    )
    scores = triples(model, thing_views("test", HELD_OUT, 2, work))
    processor = ViTImageProcessor(size={"height": 64, "width": 64}, **NORMALISATION)
    with evaluator_folder(model, processor, output / "dino") as folder:
        write_card(
            folder,
            "tiny-dino",
            "Which thing of etherdiff's tiny world a picture shows. The feature is `last_hidden_state[:, 0]`, as of DINO's; "
            "cosine similarity of two pictures is high if they show the same individual, in whatever scene and pose.",
            "ViTModel of patch 8 on 64 px pictures, without pooler",
            parameter_count(model),
            f"{len(views):,} things, each with one of its kind and a near twin, in {VIEWS} scenes each",
            f"{schedule.steps:,} steps of {BATCH * SIBLINGS * 2} pictures: which of the others shows the same individual "
            f"(InfoNCE, temperature {TEMPERATURE})",
            {
                "Nearer to the same test thing in another scene than to another of its kind": scores["same_kind"],
                "Nearer to the same test thing than to a near twin (one trait differs)": scores["near_twin"],
                "Mean cosine: same thing / another of its kind / near twin": "{same:.2f} / {other:.2f} / {twin:.2f}".format(
                    same=scores["cosine_same"], other=scores["cosine_other"], twin=scores["cosine_twin"]
                ),
            },
        )


def make_model() -> ViTModel:
    """The untrained model: 1.9M parameters."""
    config = ViTConfig(
        image_size=64,
        patch_size=8,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",  # torch's fused attention is slow backwards on a CPU
    )
    return ViTModel(config, add_pooling_layer=False)


def thing_views(split: str, things: int, views: int, work: Path) -> NDArray[np.uint8]:
    """(things, SIBLINGS, views, 64, 64, 3), rendered by two processes on first use and memory-mapped afterwards."""
    path = work / f"things-{split}-{things}x{SIBLINGS}x{views}.npy"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        chunks = in_two_processes(partial(_render_chunk, split, things, views), range(0, things, _CHUNK))
        with staged_file(path) as staged, staged.open("wb") as file:
            np.save(file, np.concatenate(chunks))
    return np.load(path, mmap_mode="r")


def _render_chunk(split: str, things: int, views: int, start: int) -> NDArray[np.uint8]:
    chunk = range(start, min(start + _CHUNK, things))
    images = [render_thing(split, thing, v, s).image for thing in chunk for s in range(SIBLINGS) for v in range(views)]
    return np.stack(images).reshape(len(chunk), SIBLINGS, views, *images[0].shape)


def draw_batch(rng: np.random.Generator, views: NDArray[np.uint8]) -> Tensor:
    """Pictures (BATCH x SIBLINGS x 2, 3, 64, 64): two views of an individual are neighbours."""
    pairs = [views[thing][:, rng.choice(views.shape[2], 2, replace=False)] for thing in some(rng, len(views), BATCH)]
    return soften(to_tensor(np.stack(pairs).reshape(-1, *views.shape[3:])), rng)


def identity_loss(model: nn.Module, images: Tensor) -> Tensor:
    """InfoNCE on [CLS]: each picture is to be nearest to the other view of the same individual."""
    features = F.normalize(model(images).last_hidden_state[:, 0].float(), dim=-1)
    logits = (features @ features.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(images)) ^ 1)


def triples(model: nn.Module, views: NDArray[np.uint8]) -> dict[str, float]:
    """Over things (N, SIBLINGS, 2, 64, 64, 3): how often the other view of a thing is nearer than another of its kind."""
    pictures = (views[:, 0, 0], views[:, 0, 1], views[:, 1, 0], views[:, 2, 0])
    features = [F.normalize(in_batches(lambda x: model(x).last_hidden_state[:, 0], part), dim=-1) for part in pictures]
    same, other, twin = ((features[0] * feature).sum(-1) for feature in features[1:])
    return {
        "same_kind": float((same > other).float().mean()),
        "near_twin": float((same > twin).float().mean()),
        "cosine_same": float(same.mean()),
        "cosine_other": float(other.mean()),
        "cosine_twin": float(twin.mean()),
    }
