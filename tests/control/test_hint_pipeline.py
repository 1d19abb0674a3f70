"""The hint encoder and its pipeline: what it adds, where, to whom, and that a saved one opens without etherdiff."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from etherdiff.control.pipeline import HintEncoder, added_hint
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.runs.model import make_s2i_pipeline

STEPS = 2


@pytest.fixture(scope="module")
def model():
    return load_base(find_base("tiny"))


@pytest.fixture(scope="module")
def pipeline(model):
    """With a hint encoder that says something."""
    torch.manual_seed(0)
    encoder = HintEncoder(model.unet.config.block_out_channels[0], model.base.latent_scale).eval()
    nn.init.normal_(encoder.layers[-1].weight, std=0.2)
    return make_s2i_pipeline(model, encoder)


def draw(pipeline, prompts, control=None, seeds=(0,), **options):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    usual = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    return pipeline(prompts, control, generator=generators, **(usual | options)).images


def maps(count, side=64):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_as_many_parameters_as_the_paper_has():
    """ETHER paper: 3.1M, less the time embedding of 2,050,560 that the original code builds and never uses."""
    assert sum(p.numel() for p in HintEncoder().parameters()) == 1_086_480


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_the_hint_has_the_latents_size(scale):
    assert HintEncoder(24, scale)(maps(2, 32)).shape == (2, 24, 32 // scale, 32 // scale)


@pytest.mark.parametrize(("options", "said"), [({"latent_scale": 3}, "latent_scale"), ({"init": "best"}, "init")])
def test_what_it_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        HintEncoder(**options)


@pytest.mark.parametrize("init", ["paper", "scaled"])
def test_an_untrained_hint_is_zero(init):
    assert not HintEncoder(init=init)(maps(1)).any()


def test_the_default_weights_of_torch_shrink_a_map_and_scaled_ones_do_not():
    """Before the last layer: about a thousandfold, which is why control comes late with them (design, 2.3)."""

    def spread(init):
        torch.manual_seed(0)
        encoder = HintEncoder(init=init)
        encoder.layers[-1] = nn.Identity()
        blocks = maps(4, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)  # areas of one colour, as maps have
        with torch.no_grad():
            return float(encoder(blocks).std(dim=(0, 2, 3)).mean())

    assert spread("scaled") > 0.05
    assert spread("paper") < spread("scaled") / 100


def test_step_zero_equals_the_model_without_control(model):
    untrained = make_s2i_pipeline(model)
    assert np.array_equal(draw(untrained, "a red ball", maps(1)), draw(untrained, "a red ball"))


def test_without_control_it_is_plain_stable_diffusion(model, pipeline):
    from diffusers import StableDiffusionPipeline

    plain = StableDiffusionPipeline(
        model.vae,
        model.text_encoder,
        model.tokenizer,
        model.unet,
        pipeline.scheduler,
        None,
        None,
        requires_safety_checker=False,
    )
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        "a red ball",
        generator=[torch.Generator().manual_seed(0)],
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        output_type="np",
    ).images
    assert np.array_equal(draw(pipeline, "a red ball"), expected)
    assert np.array_equal(draw(pipeline, "a red ball", maps(1), control_scale=0.0), expected)
    assert np.abs(draw(pipeline, "a red ball", maps(1)) - expected).max() > 0.01


class _Biased(nn.Module):
    """`conv_in` and a hint, written out: what the hook has to amount to."""

    def __init__(self, conv_in, hint):
        super().__init__()
        self.conv_in, self.hint = conv_in, hint

    def forward(self, x):
        return self.conv_in(x) + self.hint


@pytest.mark.parametrize("guided", [False, True])
def test_the_hint_comes_after_conv_in_in_both_branches_of_guidance_or_in_the_prompts_alone(model, guided):
    unet = model.unet
    latents, text = torch.randn(4, 4, 16, 16), torch.randn(4, 77, unet.config.cross_attention_dim)
    hint = torch.randn(2, unet.config.block_out_channels[0], 16, 16)
    with torch.no_grad(), added_hint(unet, hint, guided):
        found = unet(latents, 500, text).sample
    plain = unet.conv_in
    try:
        unet.conv_in = _Biased(plain, torch.cat([hint * (not guided), hint]))
        with torch.no_grad():
            expected = unet(latents, 500, text).sample
    finally:
        unet.conv_in = plain
    torch.testing.assert_close(found, expected)


def test_guided_control_is_what_guidance_makes_of_the_two_predictions(model, pipeline):
    """One step of DDIM by hand: w times the way from the plain base without a prompt to the prompt with its hint."""
    latents, scale = torch.randn(1, 4, 16, 16), 4.0
    texts = [pipeline.encode_prompt(text, "cpu", 1, False)[0] for text in ("", "a red ball")]
    pipeline.scheduler.set_timesteps(1)
    (step,) = pipeline.scheduler.timesteps
    with torch.no_grad():
        free = model.unet(latents, step, texts[0]).sample
        with added_hint(model.unet, pipeline.hint_encoder(maps(1))):
            bound = model.unet(latents, step, texts[1]).sample
    expected = pipeline.scheduler.step(free + scale * (bound - free), step, latents).prev_sample
    options = {"latents": latents, "num_inference_steps": 1, "guidance_scale": scale, "output_type": "latent"}
    found = pipeline("a red ball", maps(1), guide_control=True, **options).images
    torch.testing.assert_close(found, expected)
    assert (pipeline("a red ball", maps(1), **options).images - expected).abs().max() > 0.01


def test_without_guidance_there_is_no_control_to_guide(pipeline):
    plain, guided = (draw(pipeline, "a red ball", maps(1), guidance_scale=1.0, guide_control=on) for on in (False, True))
    assert np.array_equal(plain, guided)


def test_the_hint_is_gone_afterwards_whatever_happens(model):
    with pytest.raises(RuntimeError, match="stop"), added_hint(model.unet, torch.zeros(1)):
        raise RuntimeError("stop")
    assert not model.unet.conv_in._forward_hooks


def test_each_prompt_gets_its_own_map(pipeline):
    """Two prompts, two maps, two images of each, in one call or one by one."""
    prompts, control = ["a red ball", "a blue star on sand"], maps(2)
    together = draw(pipeline, prompts, control, seeds=(0, 1, 2, 3), num_images_per_prompt=2)
    alone = [
        draw(pipeline, prompt, control[[i]], seeds=(2 * i, 2 * i + 1), num_images_per_prompt=2)
        for i, prompt in enumerate(prompts)
    ]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4)


def test_one_map_for_all_prompts_or_one_for_each(pipeline):
    one = draw(pipeline, ["a red ball", "a star"], maps(1), seeds=(0, 1))
    each = draw(pipeline, ["a red ball", "a star"], maps(1).repeat(2, 1, 1, 1), seeds=(0, 1))
    np.testing.assert_allclose(one, each, atol=1e-5)
    with pytest.raises(ValueError, match="3 control images for 2 prompts"):
        draw(pipeline, ["a red ball", "a star"], maps(3), seeds=(0, 1))


def test_a_map_may_be_a_picture_and_is_never_blended(pipeline):
    """Enlarged, its colours stay what they were."""
    small = np.zeros((32, 32, 3), np.uint8)
    small[:, 16:] = (200, 100, 0)
    found = pipeline.control_processor.preprocess(Image.fromarray(small), height=64, width=64)
    assert found.shape == (1, 3, 64, 64)
    assert {tuple(v) for v in (found * 255).round().int().reshape(3, -1).T.tolist()} == {(0, 0, 0), (200, 100, 0)}


def test_another_scheduler_draws_too(pipeline):
    from diffusers import UniPCMultistepScheduler

    other = type(pipeline)(
        **{**pipeline.components, "scheduler": UniPCMultistepScheduler.from_config(pipeline.scheduler.config)}
    )
    other.set_progress_bar_config(disable=True)
    image = draw(other, "a red ball", maps(1))
    assert np.isfinite(image).all()


def test_a_saved_pipeline_opens_without_etherdiff(pipeline, tmp_path):
    """And gives the same image; saved from there, it opens again."""
    pipeline.save_pretrained(tmp_path / "first")
    expected = draw(pipeline, "a red ball", maps(1))
    script = (
        "import sys; sys.modules['etherdiff'] = None\n"
        "import torch, numpy as np\n"
        "from diffusers import DiffusionPipeline\n"
        "folder, again, image = sys.argv[1:]\n"
        "p = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, local_files_only=True)\n"
        "g = torch.Generator().manual_seed(1)\n"
        "control = torch.rand(1, 3, 64, 64, generator=g)\n"
        "a = p('a red ball', control, generator=[torch.Generator().manual_seed(0)], num_inference_steps=2,\n"
        "      guidance_scale=3.0, output_type='np').images\n"
        "np.save(image, a)\n"
        "p.save_pretrained(again)\n"
        "DiffusionPipeline.from_pretrained(again, trust_remote_code=True, local_files_only=True)\n"
    )
    arguments = [str(tmp_path / name) for name in ("first", "again", "image.npy")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), expected, atol=1e-5)
