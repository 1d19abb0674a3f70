"""Drawing: what comes out is finite, or an error; no more denoising steps than the schedule has."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from etherdiff.families.diffusion import sample
from etherdiff.families.sd1 import cut_off, encode_long_prompts, encode_prompts, make_pipeline
from etherdiff.system.errors import RunError


def test_images_that_are_not_finite_are_an_error_that_names_the_seed(model, monkeypatch):
    pipeline = make_pipeline(model)
    with pytest.raises(RunError, match=r"the image of seed 7 came out as NaN or infinite.*scale nearer to 1"):
        sample(pipeline, "a ball", [7], 64, steps=2, guidance_scale=1e38)
    decode = pipeline.vae.decode

    def spoiled(*args, **more):
        (pixels,) = decode(*args, **more)
        pixels[1, 0, 0, 0] = float("nan")
        return (pixels,)

    monkeypatch.setattr(pipeline.vae, "decode", spoiled)
    with pytest.raises(RunError, match="the image of seed 4 "):
        sample(pipeline, "a ball", [3, 4], 64, steps=2)


def test_steps_are_as_many_as_the_schedule_allows(model):
    base, most = model.base, model.noise_scheduler.config.num_train_timesteps - 2
    assert base.steps_problems(most) == []
    assert base.steps_problems(most + 1, "steps") == [f"steps: the base's noise schedule allows at most {most}, not {most + 1}"]
    for scheduler in (make_pipeline(model).scheduler, DDIMScheduler.from_config(model.noise_scheduler.config)):
        scheduler.set_timesteps(most)
        timesteps = scheduler.timesteps.numpy()
        assert (np.diff(timesteps) < 0).all()
        assert 0 <= timesteps.min() <= timesteps.max() <= most + 1


def test_long_prompts_are_encoded_by_parts(model):
    """Held against an encoding by hand: each part of 75 tokens with its own start, end and padding."""
    tokenizer, encoder = model.tokenizer, model.text_encoder
    words = ["red", "ball", "tree", "house"] * 25  # a token each
    found = encode_long_prompts(tokenizer, encoder, [" ".join(words), "a tree"])
    parts = [" ".join(words[:75]), " ".join(words[75:]), "a tree", ""]
    padded = [tokenizer(part, padding="max_length", max_length=77, return_tensors="pt").input_ids for part in parts]
    assert all(ids.shape == (1, 77) for ids in padded)
    with torch.no_grad():
        states = [encoder(ids).last_hidden_state[0] for ids in padded]
    assert found.shape == (2, 154, states[0].shape[-1])
    assert torch.allclose(found[0], torch.cat(states[:2]), atol=1e-5)
    assert torch.allclose(found[1], torch.cat(states[2:]), atol=1e-5)
    assert torch.allclose(
        encode_long_prompts(tokenizer, encoder, parts[:1]), encode_prompts(tokenizer, encoder, parts[:1]), atol=1e-5
    )
    assert cut_off(tokenizer, " ".join(words)) == parts[1]
    assert cut_off(tokenizer, parts[0]) == cut_off(tokenizer, "") == ""
