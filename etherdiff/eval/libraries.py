"""Networks of the packages open_clip, lpips and torch-fidelity."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from etherdiff.eval.functional import unit_channels
from etherdiff.eval.networks import (
    Backbone,
    Identity,
    ImageTextBackbone,
    Pixels,
    Preprocessing,
    hash_tensors,
    stacked,
    versions_of,
)
from etherdiff.system.errors import UserError

LPIPS_SIZE = 512
"""Side in pixels: the original scripts compare at 512 x 512, whatever the size and proportions of the images."""


class OpenClip(ImageTextBackbone):
    """A model of open_clip: NAME:PRETRAINED, hf-hub:ORG/NAME or local-dir:FOLDER."""

    def __init__(self, spec: str, device: str) -> None:
        import open_clip

        name, tag = (spec, None) if spec.startswith(("hf-hub:", "local-dir:")) else spec.rsplit(":", 1)
        with _readable(spec):
            model = open_clip.create_model(name, pretrained=tag, precision="fp32", require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(name)
            self.preprocessing = from_open_clip(open_clip.get_model_preprocess_cfg(model))
        self.model, self.device = model.eval().requires_grad_(False).to(device), device
        shown = "local-dir:" + spec.rstrip("/").rsplit("/", 1)[-1] if spec.startswith("local-dir:") else spec
        self.identity = Identity(
            name=shown,
            revision=None,
            weights_sha256=hash_tensors(model),
            weights_hashed="tensors",
            feature="projected embeddings",
            preprocessing=self.preprocessing.describe(),
            versions=versions_of("open_clip_torch"),
        )

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        return self.model.encode_image(self.preprocessing.normalize(stacked(pixels, self.device)))

    @torch.inference_mode()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).cpu()

    def too_long(self, texts: Sequence[str]) -> list[int]:
        """Count with a wide context, since open_clip's tokenizers cut texts silently."""
        context = int(self.tokenizer.context_length)
        wide = self.tokenizer(list(texts), context_length=context + 4096)
        padding = wide[:, -1:]  # no real prompt fills the wide context
        lengths = (wide != padding).long().cumsum(1).argmax(1) + 1
        return [max(0, int(length) - context) for length in lengths]


def from_open_clip(config: dict[str, Any]) -> Preprocessing:
    """Return the steps of open_clip's evaluation transform, for which open_clip uses torchvision."""
    size = config["size"] if isinstance(config["size"], (tuple, list)) else (config["size"],) * 2
    height, width = size[-2:]
    mode = config.get("resize_mode") or "shortest"
    if mode == "longest" or (mode == "shortest" and height != width):
        raise UserError(f"an open_clip model that resizes by {mode!r} to {height} x {width} is not supported")
    bilinear = config.get("interpolation") == "bilinear"
    common = Preprocessing(
        resample=int(Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
    if mode == "squash":
        return replace(common, size=(height, width))
    return replace(common, edge=height, crop=(height, width), crop_rounding="nearest")


class Lpips(Backbone):
    """The network of the package lpips, as vectors whose squared distances are its distances."""

    cached = False
    largest_batch = 8
    preprocessing = Preprocessing(size=(LPIPS_SIZE, LPIPS_SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))

    def __init__(self, model: Any, name: str, device: str) -> None:
        """Take an `lpips.LPIPS`; see `load_lpips` for the pretrained ones."""
        self.device, self.model = device, model.eval().requires_grad_(False).to(device)
        self.weights = [layer.model[-1].weight.flatten() for layer in model.lins]
        if any(bool((weight < 0).any()) for weight in self.weights):
            raise UserError(f"{name}: LPIPS with negative weights is no distance")
        self.identity = Identity(
            name=name,
            revision=None,
            weights_sha256=hash_tensors(model),
            weights_hashed="tensors",
            feature=f"LPIPS {model.version} with linear weights",
            preprocessing=self.preprocessing.describe(),
            versions=versions_of("lpips", "torchvision"),
        )

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        batch = self.preprocessing.normalize(stacked(pixels, self.device))
        return unit_channels(list(self.model.net(self.model.scaling_layer(batch))), self.weights)


def load_lpips(spec: str, device: str) -> Lpips:
    """Load lpips:alex, lpips:vgg or lpips:squeeze; the first use downloads torchvision's weights of that network."""
    import lpips

    net = spec.removeprefix("lpips:")
    if net not in ("alex", "vgg", "squeeze"):
        raise UserError(f"{spec}: lpips has alex, vgg and squeeze")
    with _readable(spec):
        return Lpips(lpips.LPIPS(net=net, verbose=False), spec, device)


class Inception(Backbone):
    """torch-fidelity's Inception v3 with the original FID's weights and TensorFlow 1's bilinear resizing to 299 px."""

    preprocessing = Preprocessing()

    def __init__(self, model: nn.Module, name: str, device: str) -> None:
        """Take torch-fidelity's `FeatureExtractorInceptionV3` with one of its features; see `load_inception`."""
        self.device, self.model = device, model.eval().requires_grad_(False).to(device)
        self.identity = Identity(
            name=name,
            revision=None,
            weights_sha256=hash_tensors(model),
            weights_hashed="tensors",
            feature=f"features {', '.join(model.features_list)}",  # type: ignore[arg-type]
            preprocessing=self.preprocessing.describe() | {"resize": "299 x 299 bilinear as in TensorFlow 1, in the network"},
            versions=versions_of("torch-fidelity"),
        )

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        if not isinstance(pixels, Tensor) and len({image.shape for image in pixels}) > 1:
            return torch.cat([self.encode(image[None]) for image in pixels])
        return self.model(stacked(pixels, self.device))[0]


def load_inception(spec: str, device: str) -> Inception:
    """Load inception (2048 features, the paper's FID) or inception:64, :192, :768; the first use downloads the weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    features = spec.partition(":")[2] or "2048"
    if features not in ("64", "192", "768", "2048"):
        raise UserError(f"{spec}: Inception has 64, 192, 768 or 2048 features")
    with _readable(spec):
        return Inception(FeatureExtractorInceptionV3("inception-v3-compat", [features]), spec, device)


@contextlib.contextmanager
def _readable(spec: str) -> Iterator[None]:
    """Turn any error of a library or its download into a UserError that says what would help."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # lpips and torch.hub print there, where results belong
            yield
    except UserError:
        raise
    except Exception as error:  # urllib's, the hub's and torch's alike
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{spec} could not be loaded ({reason}). Its weights come from the network: run this once where there is one, "
            "or score with the preset tiny or with local folders."
        ) from error
