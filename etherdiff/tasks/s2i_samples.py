"""Sample images of a controllable run: fixed maps and seeds; control, base, the step's and the real image side by side."""

from typing import Any

import torch
from PIL import Image

from etherdiff.control.pipeline import HintEncoder
from etherdiff.families.sampling import S2I_SAMPLING, chunks, sheet
from etherdiff.families.sd1 import StableDiffusion, encode_prompts
from etherdiff.images.crops import resize_and_crop
from etherdiff.images.png import save_png
from etherdiff.images.reading import read_image
from etherdiff.runs.control import make_s2i_pipeline
from etherdiff.runs.folder import RunFolder
from etherdiff.tasks.s2i_plan import S2IPlan
from etherdiff.tasks.s2i_prepare import as_tensor, control_picture, validation_pairs

SAMPLES_AT_ONCE = 4


class ControlSampler:
    """Draws the first validation maps, map number i with seed i; made before the adapter comes."""

    def __init__(self, plan: S2IPlan, model: StableDiffusion, run: RunFolder) -> None:
        self.plan, self.model, self.run = plan, model, run
        self.pairs = validation_pairs(plan)[: plan.config.sample_count]
        self.controls = [control_picture(plan, pair) for pair in self.pairs]
        model.text_encoder.to(model.unet.device)
        text = encode_prompts(model.tokenizer, model.text_encoder, [*(pair.text for pair in self.pairs), ""]).float()
        self.text, self.empty = text[:-1], text[-1:]
        self.base_pictures = self._draw(None)
        self.hint_encoder: HintEncoder | None = None
        """What drives, once it is there."""

    @torch.no_grad()
    def _draw(self, hint_encoder: HintEncoder | None) -> list[Image.Image]:
        unet, vae = self.model.unet, self.model.vae
        vae.to(unet.device, unet.dtype)
        pipeline = make_s2i_pipeline(self.model, hint_encoder)
        pipeline.text_encoder = None  # the texts are encoded; its precision, not the UNet's, would be given to them
        pictures: list[Image.Image] = []
        for part in chunks(range(len(self.pairs)), SAMPLES_AT_ONCE):
            numbers = list(part)
            control = torch.stack([as_tensor(self.controls[number]) for number in numbers]) if hint_encoder else None
            pictures += pipeline(
                control_image=control,
                prompt_embeds=self.text[numbers].to(unet.device, unet.dtype),
                negative_prompt_embeds=self.empty.expand(len(numbers), -1, -1).to(unet.device, unet.dtype),
                generator=[torch.Generator().manual_seed(number) for number in numbers],
                height=self.plan.resolution,
                width=self.plan.resolution,
                num_inference_steps=S2I_SAMPLING["steps"],
                guidance_scale=S2I_SAMPLING["guidance_scale"],
            ).images
        return pictures

    def draw_step(self, step: int) -> None:
        """Draw with the weights as they are now, save the images, and lay them out beside control, base and real image."""
        pictures, resolution = self._draw(self.hint_encoder), self.plan.resolution
        settings: dict[str, Any] = {"model": self.plan.config.base, "method": self.plan.config.method, "training_step": step}
        folder = self.run.samples / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, (pair, picture) in enumerate(zip(self.pairs, pictures, strict=True)):
            facts = {"prompt": pair.text, "seed": number, "control": pair.name, **settings, **S2I_SAMPLING}
            save_png(picture, folder / f"{number:03d}.png", facts)
        real = [resize_and_crop(read_image(pair.image), resolution, "center") for pair in self.pairs]
        controls = [Image.fromarray(control) for control in self.controls]
        rows = [list(row) for row in zip(controls, self.base_pictures, pictures, real, strict=True)]
        columns = ["control", "base, without control", f"step {step}", "real image"]
        picture = sheet(rows, [pair.text for pair in self.pairs], columns)
        save_png(picture, self.run.sample_sheet(step), settings)
