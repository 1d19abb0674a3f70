"""tiny-sd as an ordinary StableDiffusionPipeline folder: half-precision files that load as float32."""

import json
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from etherdiff.families.bases import shipped_config
from etherdiff.families.sd1 import save_text_encoder
from etherdiff.system.files import save_tensors, staged_folder
from tiny_world import autoencoder, diffusion
from tiny_world.autoencoder import train_autoencoder
from tiny_world.cards import parameter_count, write_card
from tiny_world.data import scene_set
from tiny_world.diffusion import Denoiser, train_denoiser
from tiny_world.tokenizer import write_tokenizer

TEST = 1_000


def build_tokenizer(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Write OUTPUT/sd/tokenizer."""
    write_tokenizer(output / "sd" / "tokenizer")


def build_autoencoder(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Train (or go on) and write OUTPUT/sd/vae."""
    vae = train_autoencoder(work, fraction)
    vae.save_pretrained(output / "sd" / "vae")
    halve(output / "sd" / "vae" / "diffusion_pytorch_model.safetensors")


def build_unet(work: Path, output: Path, fraction: float = 1.0) -> None:
    """Train (or go on) the UNet and the text encoder on the latents of OUTPUT/sd/vae, and complete the folder OUTPUT/sd."""
    vae = AutoencoderKL.from_pretrained(output / "sd" / "vae")
    model = train_denoiser(vae, CLIPTokenizer.from_pretrained(output / "sd" / "tokenizer"), work, fraction)
    write_pipeline(model, vae, output / "sd")
    _write_card(model, vae, work, output / "sd", fraction)


def write_pipeline(model: Denoiser, vae: AutoencoderKL, folder: Path) -> None:
    """Put everything but the tokenizer, which is there, into a StableDiffusionPipeline folder."""
    model.unet.set_default_attn_processor()
    with staged_folder(folder) as staged:
        shutil.copytree(folder / "tokenizer", staged / "tokenizer")
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=model.unet,
            scheduler=PNDMScheduler.from_pretrained(shipped_config("sd15"), subfolder="scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(staged)
        save_text_encoder(model.text_encoder, staged / "text_encoder")
        index = json.loads((staged / "model_index.json").read_text(encoding="utf-8"))
        index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
        (staged / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for weights in staged.rglob("*.safetensors"):
            halve(weights)


def halve(path: Path) -> None:
    """Store a safetensors file in half precision. The configuration beside it still says float32, and so it loads."""
    tensors: dict[str, Tensor] = load_file(path)
    save_tensors({name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}, path)


def _write_card(model: Denoiser, vae: AutoencoderKL, work: Path, folder: Path, fraction: float) -> None:
    schedules = (autoencoder.SCHEDULE, autoencoder.DECODER_SCHEDULE, diffusion.SCHEDULE)
    steps = [schedule.shortened(fraction).steps for schedule in schedules]
    write_card(
        folder,
        "tiny-sd",
        "A Stable Diffusion of etherdiff's tiny world: 64 px pictures, 16 x 16 latents, the classes and files of Stable "
        "Diffusion 1.5. `StableDiffusionPipeline.from_pretrained` opens it. The word `sks`, in no caption, is for DreamBooth. "
        "How often it draws what a caption asks for: docs/results in etherdiff's repository.",
        "AutoencoderKL; UNet2DConditionModel with cross-attention at 16 x 16, 8 x 8 and in the middle; CLIPTextModel and a "
        "CLIPTokenizer of CLIP's commonest merges",
        parameter_count(vae) + parameter_count(model),
        f"{diffusion.SCENES:,} scenes with full, loose and short captions",
        f"autoencoder {steps[0]:,} steps of {autoencoder.BATCH}, its decoder {steps[1]:,} more; UNet and text encoder together "
        f"{steps[2]:,} steps of {diffusion.BATCH}: epsilon prediction, weighted by SNR and by place (things over sky and "
        "ground), 10% captionless",
        {f"Autoencoder, PSNR in dB on {TEST:,} test scenes": autoencoder.psnr(vae, scene_set("test", TEST, work))},
        library="diffusers",
    )
