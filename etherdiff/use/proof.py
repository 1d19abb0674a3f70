"""Proof that what was written does what the adapted model does: read back, and compared in a denoising pass and a decoding."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etherdiff.adapters.io import SavedAdapter
from etherdiff.control.pipeline import added_hint
from etherdiff.families.sd1 import Base, encode_prompts, fingerprint
from etherdiff.system.errors import ProofError, UserError

PROOF_PROMPT = "a photo of a dog"
PROOF_TIMESTEP = 500
PROOF_LATENTS = 32  # side in latents at most: the weights are the same at every size, and attention's memory is not
TOLERANCE = {
    torch.float32: 1e-4,
    # the weights that were written are rounded, by up to eps / 2 each; measured on SD 1.5's size: 0.7 eps
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}


class Difference(NamedTuple):
    """Between two predictions: max |a - b|, and ‖a - b‖ / ‖b‖."""

    max_abs: float
    relative: float

    def as_dict(self) -> dict[str, float]:
        return {"max_abs_difference": self.max_abs, "relative_difference": self.relative}


@torch.no_grad()
def predict(unet: Any, text: Tensor, hint_encoder: Any = None) -> Tensor:
    """One denoising pass on fixed latents: (1, C, s, s), with s = sample_size or PROOF_LATENTS if that is less.

    With a hint encoder, under a fixed control image of noise.
    """
    side = min(unet.config.sample_size, PROOF_LATENTS)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, unet.config.in_channels, side, side, generator=generator)
    hint = None
    if hint_encoder is not None:
        pixels = side * hint_encoder.config.latent_scale
        hint = hint_encoder(torch.rand(1, 3, pixels, pixels, generator=generator))
    with added_hint(unet, hint):
        return unet(latents, PROOF_TIMESTEP, text, return_dict=False)[0]


@torch.no_grad()
def decode(vae: Any) -> Tensor:
    """Decode fixed latents: (1, 3, H, W), of PROOF_LATENTS // 2 a side."""
    side = PROOF_LATENTS // 2
    latents = torch.randn(1, vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    return vae.decode(latents, return_dict=False)[0]


def prove(pipeline: Any, reference: Tensor, tolerance: float, what: str, image: Tensor | None = None) -> Difference:
    """Compare a pipeline that was read back with the adapted model's prediction, and with what its autoencoder decodes.

    image: the decoded latents; None where only the UNet was written. Returns the worse difference. ProofError above the
    tolerance.
    """
    text = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [PROOF_PROMPT])
    predicted = predict(pipeline.unet, text, getattr(pipeline, "hint_encoder", None))
    difference = _compare(predicted, reference, tolerance, what)
    if image is None:
        return difference
    decoded = _compare(decode(pipeline.vae), image, tolerance, f"the autoencoder (VAE) of {what}")
    return max(difference, decoded, key=lambda found: found.relative)


def _compare(found: Tensor, reference: Tensor, tolerance: float, what: str) -> Difference:
    error = found - reference
    difference = Difference(error.abs().max().item(), (error.norm() / reference.norm()).item())
    if not difference.relative <= tolerance:  # also where it is NaN
        raise ProofError(
            f"{what}, read back with plain diffusers, differs from the adapted model by {difference.relative:.1e} "
            f"(relative; at most {tolerance:.1e} is expected), so it was removed. This is a bug: please report it with "
            "the versions of etherdiff, diffusers, peft and torch."
        )
    return difference


def trained_on(adapter: SavedAdapter, base: Base) -> bool | None:
    """Whether an adapter was trained on this base's UNet, by the files' hashes; None where that is not recorded."""
    recorded, present = (adapter.base or {}).get("fingerprint", {}), fingerprint(base)
    kind = "unet" if base.single_file is None else "single_file"
    return recorded[kind] == present[kind] if kind in recorded else None


def refuse_existing(output: Path) -> None:
    if output.is_file():
        raise UserError(f"--output {output} is a file: give a folder that does not exist yet.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} exists and is not empty: give another folder, or remove it first.")


def refuse_unfit_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must be named *.safetensors: the tools that read such files go by it.")
    if path.exists():
        raise UserError(f"{path} exists: give another name, or remove it first.")
