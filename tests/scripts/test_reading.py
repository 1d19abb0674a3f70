"""What the text encoder is taught to read: facts that the caption states, asked for after its last word."""

import numpy as np
import pytest
import torch
from tiny_world import diffusion, reading
from tiny_world.tokenizer import write_tokenizer
from transformers import CLIPTokenizer

from etherdiff.tiny.things import KINDS
from etherdiff.tiny.world import full_caption, render_scene


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def names(facts):
    """The facts in words: places, and (kind, trait)."""
    found = []
    for index in np.flatnonzero(facts):
        kind, trait = divmod(int(index) - len(reading.PLACES), len(reading.TRAITS))
        found.append(reading.PLACES[index] if index < len(reading.PLACES) else (KINDS[kind], reading.TRAITS[trait]))
    return set(found)


def test_facts_are_what_the_scene_is_made_of():
    for index in range(30):
        scene = render_scene("validation", index)
        found = names(reading.caption_facts(scene.things, (scene.sky, scene.ground)))
        assert {scene.sky, scene.ground} <= found
        for thing in scene.things:
            assert {(thing.kind, thing.colour), (thing.kind, thing.pattern)} <= found
            assert ((thing.kind, f"second {thing.second}") in found) == (thing.second is not None)
            assert ((thing.kind, f"outline {thing.outline}") in found) == (thing.outline is not None)


def test_every_fact_is_in_the_caption(tokenizer):
    ids, positions, facts = reading.draw_batch(np.random.default_rng(0), tokenizer)
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    assert bool((positions >= ends).all())
    assert positions.max() > ends.max()
    for row, told in zip(ids, facts, strict=True):
        caption = tokenizer.decode(row, skip_special_tokens=True)
        for fact in names(told.numpy()):
            if isinstance(fact, tuple):
                kind, trait = fact
                assert kind in caption
                assert trait in ("plain", "dotted", "striped", "two-tone", "checkered") or trait.split()[-1] in caption


def test_one_step_of_reading_changes_what_is_told(tokenizer):
    torch.manual_seed(0)
    reader = reading.Reader(diffusion.make_model(tokenizer).text_encoder)
    batch = reading.draw_batch(np.random.default_rng(0), tokenizer)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=2e-3)
    losses = []
    for _ in range(3):
        loss = reading.reading_loss(reader, batch)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert reading.share_wholly_right(reader, batch) == 0


def test_captions_can_be_told_apart():
    rng = np.random.default_rng(0)
    scene = render_scene("validation", 0)
    assert len({full_caption(rng, scene.things, scene.ground, scene.sky) for _ in range(20)}) > 5
