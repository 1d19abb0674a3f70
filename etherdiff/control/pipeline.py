"""Stable Diffusion driven by a control image: the hint encoder, and the pipeline that adds its output after `conv_in`.

This file needs torch and diffusers only: `save_pretrained` puts a copy of it beside the weights, so that

    DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

opens the folder where etherdiff is not installed.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin, StableDiffusionPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from torch.nn import functional as F

CODE = "pipeline"
"""Name, without .py, of this file's copy beside the weights."""

SILU_GAIN = 1.6765
"""1 / √E[silu(x)²] of a standard normal x: with it, convolutions and SiLUs in turn keep the spread of what goes through."""


class HintEncoder(ModelMixin, ConfigMixin):
    """Eight convolutions from a control image to a hint of the latents' size (ETHER paper, section 5.1; as ControlNet's).

    3-16-16-32-32-96-96-256-out, SiLU between; strides bring the image to the latents' size; the last convolution starts at
    zero, so an untrained hint changes nothing. 1,086,480 parameters for Stable Diffusion 1.x and 2.x.
    """

    @register_to_config
    def __init__(self, out_channels: int = 320, latent_scale: int = 8, init: str = "scaled") -> None:
        """out_channels: of the UNet's `conv_in`. latent_scale: pixels per latent, 1, 2, 4 or 8.

        init: "paper" leaves torch's default weights, which shrink their input about a thousandfold before the last
        convolution; "scaled" has Kaiming-normal weights with SiLU's gain, zero biases, and takes the image from [0, 1] to
        [-1, 1].
        """
        super().__init__()
        if latent_scale not in (1, 2, 4, 8):
            raise ValueError(f"latent_scale must be 1, 2, 4 or 8, not {latent_scale}")
        if init not in ("paper", "scaled"):
            raise ValueError(f"init must be 'paper' or 'scaled', not {init!r}")
        strides = [2 if latent_scale >= 2**place else 1 for place in (1, 2, 3)]
        shape = [(3, 16, 1), (16, 16, 1), (16, 32, strides[0]), (32, 32, 1), (32, 96, strides[1]), (96, 96, 1)]
        shape += [(96, 256, strides[2]), (256, out_channels, 1)]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b, stride in shape)
        *inner, last = (convolution for convolution in self.layers if isinstance(convolution, nn.Conv2d))
        for layer in inner if init == "scaled" else ():
            nn.init.normal_(layer.weight, std=SILU_GAIN * layer.weight[0].numel() ** -0.5)
            nn.init.zeros_(cast(Tensor, layer.bias))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))

    def forward(self, control: Tensor) -> Tensor:
        """Control images (B, 3, H, W) in [0, 1] to hints (B, out_channels, H / latent_scale, W / latent_scale)."""
        x = control * 2 - 1 if self.config.init == "scaled" else control
        for layer in self.layers[:-1]:
            x = F.silu(layer(x))
        return self.layers[-1](x)


@contextmanager
def added_hint(unet: Any, hint: Tensor | None, guided: bool = False) -> Iterator[None]:
    """Within, the output of the UNet's `conv_in` has the hint (B, C, h, w) added; a batch of k B gets it k times over.

    guided: of a batch of 2 B, as classifier-free guidance makes it, the first half, to be steered away from, gets none.
    """

    def add(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        assert hint is not None
        hints = hint.to(output.dtype).repeat(len(output) // len(hint), 1, 1, 1)
        if guided and len(hints) == 2 * len(hint):
            hints[: len(hint)] = 0
        return output + hints

    if hint is None:
        yield
        return
    handle = unet.conv_in.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class StableDiffusionS2IPipeline(StableDiffusionPipeline):
    """A StableDiffusionPipeline with a hint encoder: every scheduler, guidance and callback of that works here."""

    model_cpu_offload_seq = "text_encoder->image_encoder->hint_encoder->unet->vae"

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        hint_encoder: Any,
        safety_checker: Any = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        requires_safety_checker: bool = False,
    ) -> None:
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            image_encoder,
            requires_safety_checker,
        )
        self.register_modules(hint_encoder=hint_encoder)
        # nearest: what lies between two colours of a map means nothing
        self.control_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, resample="nearest", do_normalize=False, do_convert_rgb=True
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        control_image: Any = None,
        *,
        control_scale: float = 1.0,
        guide_control: bool = False,
        **options: Any,
    ) -> Any:
        """Draw what the prompts say where the control images say.

        Args:
            prompt: text or list of texts, as in StableDiffusionPipeline, whose other arguments go in `options` by name.
            control_image: PIL image, array or tensor (B, 3, H, W) in [0, 1], or a list of them: one for all prompts, or one
                for each. None: no control.
            control_scale: multiplies the hint; 0 is no control.
            guide_control: guidance strengthens the control too: the unconditional half of a step is drawn without the hint,
                and not with it as in the paper's protocol.

        Raises:
            ValueError: neither one control image nor one for each prompt.
        """
        if control_image is None:
            return super().__call__(prompt, **options)
        side = self.unet.config.sample_size * self.vae_scale_factor
        height, width = options.pop("height", None) or side, options.pop("width", None) or side
        prompts = len(prompt) if isinstance(prompt, list | tuple) else 1
        if prompt is None and options.get("prompt_embeds") is not None:
            prompts = len(options["prompt_embeds"])
        control = self.control_processor.preprocess(control_image, height=height, width=width)
        if len(control) not in (1, prompts):
            raise ValueError(f"{len(control)} control images for {prompts} prompts: give one, or one for each")
        encoder = self.hint_encoder
        hint = control_scale * encoder(control.to(self._execution_device, encoder.dtype))
        hint = hint.expand(prompts, -1, -1, -1).repeat_interleave(options.get("num_images_per_prompt") or 1, 0)
        with added_hint(self.unet, hint, guide_control):
            return super().__call__(prompt, height=height, width=width, **options)

    def save_pretrained(self, save_directory: Any, *arguments: Any, **options: Any) -> None:
        """As of every pipeline, and this file beside the weights, so that the folder opens without etherdiff."""
        super().save_pretrained(save_directory, *arguments, **options)
        add_code(Path(save_directory))


def add_code(folder: Path) -> None:
    """Make a saved pipeline's folder self-contained: this file in it, and model_index.json pointing there."""
    for place in (folder, folder / "hint_encoder"):
        shutil.copyfile(__file__, place / f"{CODE}.py")
    path = folder / "model_index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    index |= {"_class_name": [CODE, StableDiffusionS2IPipeline.__name__], "hint_encoder": [CODE, HintEncoder.__name__]}
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
