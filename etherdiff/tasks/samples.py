"""Sample images during training: fixed prompts, seeds and controls, next to the base's own images."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etherdiff.config import TrainConfig
from etherdiff.control.pipeline import HintEncoder
from etherdiff.families.sampling import chunks, sample, sheet
from etherdiff.families.sd1 import StableDiffusion, encode_prompts
from etherdiff.images.writing import save_png
from etherdiff.runs.folder import RunFolder

SAMPLES_AT_ONCE = 4


@dataclass(frozen=True)
class Shot:
    """A sample image, drawn again and again."""

    text: int
    """Number of its prompt."""
    seed: int
    place: str
    """Its path in a step's folder."""
    control: NDArray[np.uint8] | None = None
    """What the hint encoder sees, (R, R, 3)."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What its PNG records next to prompt, seed, step and how it was drawn."""


class Sampler(ABC):
    """Draws every shot with the weights as they are; made before the text encoder goes and the adapter comes."""

    def __init__(
        self,
        config: TrainConfig,
        resolution: int,
        sampling: dict[str, Any],
        model: StableDiffusion,
        run: RunFolder,
        texts: Sequence[str],
        shots: Sequence[Sequence[Shot]],
    ) -> None:
        """sampling: sampler, steps and guidance scale. shots: in groups, whose members are drawn in the same batches."""
        self.config, self.resolution, self.sampling, self.model, self.run = config, resolution, sampling, model, run
        self.texts, self.shots = texts, [shot for group in shots for shot in group]
        self.batches = [batch for group in shots for batch in chunks(group, SAMPLES_AT_ONCE)]
        model.text_encoder.to(model.unet.device)
        self.text = encode_prompts(model.tokenizer, model.text_encoder, [*texts, ""]).float()
        self.hint_encoder: HintEncoder | None = None
        """What encodes controls, once it is there; the base's images are drawn without control."""
        self.base_images = self.draw()

    @abstractmethod
    def make_pipeline(self) -> Any:
        """Make what draws with the model as it is."""

    @abstractmethod
    def lay_out(self, images: Sequence[Image.Image], step: int) -> tuple[list[list[Image.Image]], list[str], list[str]]:
        """Arrange a step's images for a sheet: rows of images, labels of rows, labels of columns."""

    @torch.no_grad()
    def draw(self) -> list[Image.Image]:
        """Draw every shot."""
        unet, vae = self.model.unet, self.model.vae
        vae.to(unet.device, unet.dtype)
        pipeline, images = self.make_pipeline(), []
        for batch in self.batches:
            told: dict[str, Any] = {
                "prompt_embeds": self._embeddings([shot.text for shot in batch]),
                "negative_prompt_embeds": self._embeddings([-1] * len(batch)),
            }
            if self.hint_encoder is not None:
                controls = [shot.control for shot in batch if shot.control is not None]
                told["control_image"] = torch.stack([as_tensor(control) for control in controls])
            seeds, scale = [shot.seed for shot in batch], self.sampling["guidance_scale"]
            images += sample(pipeline, None, seeds, self.resolution, self.sampling["steps"], scale, **told)
        return images

    def draw_step(self, step: int) -> dict[str, float]:
        """Draw with the weights as they are now, save the images, and lay them out next to the base's."""
        images = self.draw()
        self.save(images, step, f"step-{step:06d}")
        save_png(sheet(*self.lay_out(images, step)), self.run.sample_sheet(step), self._settings(step) | self.sampling)
        return {}

    def save(self, images: Sequence[Image.Image], step: int, folder: str) -> None:
        """Save the images of a step into a folder of samples/."""
        for shot, image in zip(self.shots, images, strict=True):
            path = self.run.samples / folder / shot.place
            path.parent.mkdir(parents=True, exist_ok=True)
            facts = {"prompt": self.texts[shot.text], "seed": shot.seed, **shot.facts, **self._settings(step), **self.sampling}
            save_png(image, path, facts)

    def _embeddings(self, numbers: list[int]) -> Tensor:
        """Of prompts by their numbers; the last is the empty one."""
        return self.text[numbers].to(self.model.unet.device, self.model.unet.dtype)

    def _settings(self, step: int) -> dict[str, Any]:
        return {"model": self.config.base, "method": self.config.method, "training_step": step}


def as_tensor(control: NDArray[np.uint8]) -> Tensor:
    """Return a control image (R, R, 3) as the pipeline takes it: (3, R, R) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(control)).permute(2, 0, 1).float() / 255
