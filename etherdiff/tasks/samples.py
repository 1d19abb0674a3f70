"""Sample images during training: fixed prompts and seeds, the base's own images beside them."""

from typing import Any

import torch
from PIL import Image

from etherdiff.config import TrainConfig
from etherdiff.families.sampling import PAPER_SAMPLING, chunks, sample, save_images, sheet
from etherdiff.families.sd1 import StableDiffusion, encode_prompts, make_pipeline
from etherdiff.images.png import save_png
from etherdiff.runs.folder import RunFolder

SAMPLES_AT_ONCE = 4
Pictures = dict[tuple[str, int], Image.Image]
"""Images by prompt and seed."""


class Sampler:
    """Draws every prompt at every seed; made before the text encoder goes and the adapter comes."""

    def __init__(
        self, config: TrainConfig, prompts: list[str], resolution: int, model: StableDiffusion, run: RunFolder
    ) -> None:
        self.config, self.prompts, self.resolution, self.model, self.run = config, prompts, resolution, model, run
        model.text_encoder.to(model.unet.device)
        text = encode_prompts(model.tokenizer, model.text_encoder, [*prompts, ""])
        self.text, self.empty = dict(zip(prompts, text, strict=False)), text[-1:]
        self.base_pictures = self._draw()
        save_images(self.base_pictures, run.samples / "base", self._settings(0))

    @torch.no_grad()
    def _draw(self) -> Pictures:
        pipeline = make_pipeline(self.model)
        unet, vae = self.model.unet, self.model.vae
        vae.to(unet.device, unet.dtype)
        pictures: Pictures = {}
        for prompt in self.prompts:
            embeddings = {
                "prompt_embeds": self.text[prompt][None].to(unet.device, unet.dtype),
                "negative_prompt_embeds": self.empty.to(unet.device, unet.dtype),
            }
            for seeds in chunks(range(self.config.sample_count), SAMPLES_AT_ONCE):
                images = sample(pipeline, None, seeds, self.resolution, **embeddings)
                pictures |= {(prompt, seed): image for seed, image in zip(seeds, images, strict=True)}
        return pictures

    def draw_step(self, step: int) -> None:
        """Draw the UNet as it is now, save the images, and lay them out beside the base's."""
        pictures = self._draw()
        save_images(pictures, self.run.samples / f"step-{step:06d}", self._settings(step))
        seeds = range(self.config.sample_count)
        rows, labels = [], []
        for prompt in self.prompts:
            for name, source in (("base", self.base_pictures), (f"step {step}", pictures)):
                rows.append([source[prompt, seed] for seed in seeds])
                labels.append(f"{name}: {prompt}")
        save_png(sheet(rows, labels, [f"seed {seed}" for seed in seeds]), self.run.sample_sheet(step), self._settings(step))

    def _settings(self, step: int) -> dict[str, Any]:
        return {"model": self.config.base, "method": self.config.method, "training_step": step, **PAPER_SAMPLING}
