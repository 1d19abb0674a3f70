"""tiny-sd's UNet, trained to predict the noise as Stable Diffusion 1.5 does, together with a text encoder that can read."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import compute_snr
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from etherdiff.families.diffusion import min_snr_weight
from etherdiff.system.files import staged_file
from etherdiff.system.terminal import track
from etherdiff.train.randomness import Draw, generator
from tiny_world.data import THING_WEIGHT, SceneSet, scene_set, thing_weights, to_tensor
from tiny_world.reading import train_reader
from tiny_world.tokenizer import tokenize
from tiny_world.training import Schedule, seeded, train

SCHEDULE = Schedule(steps=30_000, learning_rate=1e-3, warmup=200, weight_decay=0.01, ema=0.999, evaluate_every=500)
BATCH = 32
SCENES, VALIDATION = 40_000, 512
FORM_SHARES = (0.5, 0.3, 0.2)  # full, loose and short captions
DROPPED_SHARE = 0.1  # without a caption, for classifier-free guidance
STRANGE_SHARE = 0.05  # with a word that means nothing here, so that an unknown word does no harm
IDENTIFIER = "sks"  # the one word that no training caption has
MIN_SNR_GAMMA = 5.0
THING_SHARE = 0.136  # of a scene's pixels
WIDTH = 128  # of the text embeddings
SHEET_CAPTIONS, SHEET_COLUMNS = 24, 8


class Denoiser(nn.Module):
    """The UNet and its text encoder, called on token ids."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        """The noise in latents (B, 4, 16, 16), given their timesteps (B,) and captions (B, 77)."""
        text = self.text_encoder(ids).last_hidden_state
        return self.unet(noisy, timesteps, text, return_dict=False)[0]


class DenoisingBatch(NamedTuple):
    """What a step learns from."""

    latents: Tensor
    """(B, 4, 16, 16)"""
    noise: Tensor
    """(B, 4, 16, 16)"""
    timesteps: Tensor
    """(B,)"""
    ids: Tensor
    """(B, 77)"""
    weights: Tensor
    """(B, 1, 16, 16), how much the error counts at each place; 1 on average over many scenes"""


class TrainingSet(NamedTuple):
    """What a step draws from."""

    moments: NDArray[np.float16]
    """(N, 8, 16, 16): mean and standard deviation of the latents, scaled"""
    segmentations: NDArray[np.uint8]
    """(N, 64, 64)"""
    ids: list[NDArray[np.uint16]]
    """(N, 77) for full, loose and short captions"""
    empty: NDArray[np.uint16]
    """(77,), the empty caption"""
    strange: NDArray[np.uint16]
    """Tokens that mean nothing here"""


def train_denoiser(vae: AutoencoderKL, tokenizer: CLIPTokenizer, work: Path, fraction: float = 1.0) -> Denoiser:
    """Train (or go on) on the latents and captions of the training scenes."""
    vae.eval().requires_grad_(False)
    data = training_set(vae, tokenizer, scene_set("train", SCENES, work), work, "train")
    validation = training_set(vae, tokenizer, scene_set("validation", VALIDATION, work), work, "validation")
    captions = scene_set("validation", VALIDATION, work).captions[:SHEET_CAPTIONS]
    noise_scheduler = make_noise_scheduler()
    with seeded():
        model = make_model(tokenizer)
    model.text_encoder = train_reader(model.text_encoder, tokenizer, work, fraction).requires_grad_(True)
    model.unet.set_attn_processor(AttnProcessor())  # torch's fused attention is slow backwards on a CPU

    def evaluate(average: Denoiser) -> dict[str, float]:
        draw_sheet(average, vae, tokenizer, captions, work / "unet" / "samples.png")
        return {"validation_loss": validation_loss(average, validation, noise_scheduler)}

    return train(
        "unet",
        model,
        lambda rng: draw_batch(rng, data),
        lambda model, *batch: denoising_loss(model, DenoisingBatch(*batch), noise_scheduler),
        SCHEDULE.shortened(fraction),
        work,
        evaluate,
        compiled=fraction == 1.0,
    )


def make_model(tokenizer: CLIPTokenizer) -> Denoiser:
    """The untrained models: a UNet of 8.8M parameters and a text encoder of 1.0M."""
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, in spite of its name
        norm_num_groups=16,
    )
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # as above
    )
    return Denoiser(unet, CLIPTextModel(config))


def make_noise_scheduler() -> DDPMScheduler:
    """Stable Diffusion 1.5's noise schedule."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def training_set(vae: AutoencoderKL, tokenizer: CLIPTokenizer, scenes: SceneSet, work: Path, name: str) -> TrainingSet:
    """Latents and token ids of the scenes, computed once and kept in `work`."""
    path = work / f"moments-{name}-{len(scenes.images)}.npy"
    if not path.exists():
        starts = range(0, len(scenes.images), 100)
        parts = [_moments(vae, scenes.images[s : s + 100]) for s in track(starts, f"latents of {name} scenes")]
        with staged_file(path) as staged, staged.open("wb") as file:
            np.save(file, np.concatenate(parts))
    forms = (scenes.captions, scenes.loose_captions, scenes.short_captions)
    ids = [tokenize(tokenizer, captions) for captions in forms]
    common = np.unique(np.concatenate([rows.ravel() for rows in ids]))
    identifier = tokenizer(IDENTIFIER)["input_ids"][1]
    ends = [number for token, number in tokenizer.get_vocab().items() if token.endswith("</w>") and len(token) > 6]
    strange = np.setdiff1d(np.array(ends, np.uint16), [*common, identifier]).astype(np.uint16)
    return TrainingSet(np.load(path, mmap_mode="r"), scenes.segmentations, ids, tokenize(tokenizer, [""])[0], strange)


@torch.no_grad()
def _moments(vae: AutoencoderKL, images: NDArray[np.uint8]) -> NDArray[np.float16]:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(to_tensor(images)).latent_dist
    moments = torch.cat([posterior.mean.float(), posterior.std.float()], 1) * vae.config.scaling_factor
    return moments.half().numpy()


def draw_batch(rng: np.random.Generator, data: TrainingSet) -> DenoisingBatch:
    """Scenes, captions, noise and timesteps at random."""
    chosen = np.sort(rng.integers(len(data.moments), size=BATCH))
    mean, std = torch.from_numpy(data.moments[chosen]).float().chunk(2, 1)
    noise = torch.from_numpy(rng.standard_normal((2, *mean.shape), np.float32))
    forms = rng.choice(len(data.ids), BATCH, p=FORM_SHARES)
    rows = [_caption(rng, data, data.ids[form][index]) for form, index in zip(forms, chosen, strict=True)]
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    timesteps = torch.from_numpy(rng.integers(1000, size=BATCH))
    return DenoisingBatch(mean + std * noise[0], noise[1], timesteps, ids, place_weights(data.segmentations[chosen]))


def place_weights(segmentations: NDArray[np.uint8]) -> Tensor:
    """(B, 64, 64) classes to (B, 1, 16, 16): 1 for sky and ground, THING_WEIGHT for things, over their usual mean."""
    return F.avg_pool2d(thing_weights(segmentations), 4) / (1 + (THING_WEIGHT - 1) * THING_SHARE)


def _caption(rng: np.random.Generator, data: TrainingSet, row: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The caption's tokens; now and then none, or with a strange word put in somewhere."""
    chance = rng.random()
    if chance < DROPPED_SHARE:
        return data.empty
    if chance > DROPPED_SHARE + STRANGE_SHARE:
        return row
    end = int(np.argmax(row == row[-1]))
    return np.insert(row, rng.integers(1, end + 1), rng.choice(data.strange))[: len(row)]


def denoising_loss(model: nn.Module, batch: DenoisingBatch, noise_scheduler: DDPMScheduler) -> Tensor:
    """Squared error of the predicted noise, weighted; scalar.

    The weight is min(SNR, 5)/SNR x sqrt(1 + 1/SNR). Its second factor is the root of what a velocity target would give: what is
    where, which captions tell, is decided at high noise, where the noise itself is so easy to predict that it hardly counts.
    """
    noisy = noise_scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    predicted = model(noisy, batch.timesteps, batch.ids).float()
    losses = ((predicted - batch.noise).square() * batch.weights).mean((1, 2, 3))
    snr = compute_snr(noise_scheduler, batch.timesteps)
    return (losses * min_snr_weight(noise_scheduler, batch.timesteps, MIN_SNR_GAMMA) * (1 + 1 / snr).sqrt()).mean()


def validation_loss(model: nn.Module, data: TrainingSet, noise_scheduler: DDPMScheduler) -> float:
    """The loss on 512 draws that are always the same."""
    rng = generator(0, Draw.VALIDATION_NOISE, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        return float(np.mean([float(denoising_loss(model, draw_batch(rng, data), noise_scheduler)) for _ in range(16)]))


def draw_sheet(model: Denoiser, vae: AutoencoderKL, tokenizer: CLIPTokenizer, captions: Sequence[str], path: Path) -> None:
    """What the model draws for these captions (DDIM, 20 steps, guidance 3), to look at while it trains."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(make_noise_scheduler().config, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    with torch.autocast("cpu", torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            list(captions), num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="np"
        ).images
    rows = (len(images) // SHEET_COLUMNS, SHEET_COLUMNS, *images.shape[1:])
    grid = images.reshape(rows).transpose(0, 2, 1, 3, 4).reshape(rows[0] * rows[2], rows[1] * rows[3], 3)
    Image.fromarray((grid * 255).round().astype(np.uint8)).save(path)
