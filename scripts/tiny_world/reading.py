"""Teach tiny-sd's text encoder to read before the UNet listens to it, as Stable Diffusion's was pretrained in CLIP.

From every position after a caption's words (where most of cross-attention's keys are) a linear layer, thrown away afterwards,
has to tell which sky, which ground, and which kinds in which colours and patterns the caption names.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from etherdiff.tiny.things import Thing
from etherdiff.tiny.world import COLOURS, GROUNDS, KINDS, PATTERNS, SKIES, full_caption, sample_allowed, thing_phrase
from etherdiff.train.randomness import Draw, generator
from tiny_world.tokenizer import tokenize
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=1_700, learning_rate=2e-3, warmup=100, weight_decay=0.01, ema=0.99, evaluate_every=250)
BATCH = 96
TRAITS = (*COLOURS, *(f"second {c}" for c in COLOURS), *(f"outline {c}" for c in COLOURS), *PATTERNS)
PLACES = (*SKIES, *GROUNDS)
FACTS = len(PLACES) + len(KINDS) * len(TRAITS)
FULL_SHARE = 0.75  # of captions that name the place; the others are of one thing only


class Reader(nn.Module):
    """A text encoder and the linear layer that tells what it has read."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.facts = nn.Linear(text_encoder.config.hidden_size, FACTS)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, FACTS) read at one position (B,) of each caption (B, 77)."""
        hidden = self.text_encoder(ids).last_hidden_state
        return self.facts(hidden[torch.arange(len(ids)), positions])


def train_reader(text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, work: Path, fraction: float = 1.0) -> CLIPTextModel:
    """Train (or go on); returns the text encoder that can read."""
    rng = generator(1, Draw.VALIDATION_NOISE, 0, 0)
    held_out = [draw_batch(rng, tokenizer) for _ in range(4)]
    with seeded():
        untrained = Reader(text_encoder)
    reader = train(
        "reading",
        untrained,
        lambda rng: draw_batch(rng, tokenizer),
        lambda model, *batch: reading_loss(model, batch),
        SCHEDULE.shortened(fraction),
        work,
        lambda model: {"wholly_right": float(np.mean([share_wholly_right(model, batch) for batch in held_out]))},
    )
    return reader.text_encoder


def draw_batch(rng: np.random.Generator, tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, 77), positions at or after the captions' ends (B,), and what the captions say (B, FACTS)."""
    captions, facts = zip(*(_draw_caption(rng) for _ in range(BATCH)), strict=True)
    ids = tokenize(tokenizer, captions).astype(np.int64)
    ends = (ids == tokenizer.eos_token_id).argmax(1)
    return torch.from_numpy(ids), torch.from_numpy(rng.integers(ends, ids.shape[1])), torch.from_numpy(np.stack(facts))


def _draw_caption(rng: np.random.Generator) -> tuple[str, NDArray[np.float32]]:
    things = tuple(sample_allowed(rng) for _ in range(rng.integers(1, 4)))
    sky, ground = str(rng.choice(SKIES)), str(rng.choice(GROUNDS))
    if rng.random() < FULL_SHARE:
        return full_caption(rng, things, ground, sky), caption_facts(things, (sky, ground))
    return f"a photo of {thing_phrase(rng, things[0])}", caption_facts(things[:1], ())


def caption_facts(things: tuple[Thing, ...], places: tuple[str, ...]) -> NDArray[np.float32]:
    """One for each sky, ground, and trait of a kind that is named: (FACTS,)."""
    facts = np.zeros(FACTS, np.float32)
    for place in places:
        facts[PLACES.index(place)] = 1
    for thing in things:
        traits = [thing.colour, thing.pattern]
        traits += [f"{what} {colour}" for what, colour in (("second", thing.second), ("outline", thing.outline)) if colour]
        for trait in traits:
            facts[len(PLACES) + KINDS.index(thing.kind) * len(TRAITS) + TRAITS.index(trait)] = 1
    return facts


def reading_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Cross-entropy summed over the facts, since nearly all are zero; mean over captions."""
    ids, positions, facts = batch
    return F.binary_cross_entropy_with_logits(model(ids, positions).float(), facts, reduction="sum") / len(ids)


def share_wholly_right(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> float:
    """Share of captions of which every fact is told right."""
    ids, positions, facts = batch
    return float(((model(ids, positions) > 0) == (facts > 0.5)).all(1).float().mean())
