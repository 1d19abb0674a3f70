"""Build the tiny pipeline: the same classes, files and token ids as Stable Diffusion 1.5, about 3M random parameters."""

import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from etherdiff.paths import cache_dir
from etherdiff.shipped import shipped_config
from etherdiff.text_encoder_io import save_text_encoder

VERSION = 1  # of what is built here; a new one is built beside the old
WIDTH = 32  # of the text embeddings


def random_folder() -> Path:
    """Its folder, built in the cache on first use (2 s); the same bytes on every machine and call."""
    folder = cache_dir() / f"tiny-random-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            build(temporary)
            temporary.rename(folder)  # another process may have won the race; its folder is as good
        except OSError:
            if not folder.exists():
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def build(folder: Path) -> None:
    """Write the pipeline into an empty folder: 64 px images, 16 x 16 latents."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet, vae, text_encoder = _unet(), _vae(), _text_encoder()
    sd15 = shipped_config("sd15")
    pipeline = StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=PNDMScheduler.from_pretrained(sd15, subfolder="scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    save_text_encoder(text_encoder, folder / "text_encoder")
    shutil.copytree(sd15 / "tokenizer", folder / "tokenizer")
    index = (folder / "model_index.json").read_text(encoding="utf-8")
    for name, cls in {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}.items():
        nothing = f'"{name}": [\n    null,\n    null\n  ]'
        index = index.replace(nothing, f'"{name}": [\n    "transformers",\n    "{cls}"\n  ]')
    (folder / "model_index.json").write_text(index, encoding="utf-8")


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def _text_encoder() -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config)
