"""What a controllable run left, as a pipeline that draws."""

from pathlib import Path

from diffusers import DDIMScheduler
from safetensors import SafetensorError

from etherdiff.adapters.io import load_adapters
from etherdiff.config import S2IConfig
from etherdiff.control.datasets import ControlDataset, find_dataset
from etherdiff.control.pipeline import HintEncoder, StableDiffusionS2IPipeline
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import StableDiffusion, load_base
from etherdiff.runs.folder import RunFolder, check_result
from etherdiff.runs.run import Run
from etherdiff.runs.weights import refuse_other_base
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError


def make_s2i_pipeline(model: StableDiffusion, hint_encoder: HintEncoder | None = None) -> StableDiffusionS2IPipeline:
    """A pipeline over the model's own modules, with DDIM as in the paper. Without a hint encoder it draws without control."""
    pipeline = StableDiffusionS2IPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=model.unet,
        scheduler=DDIMScheduler.from_config(model.noise_scheduler.config),
        hint_encoder=hint_encoder or HintEncoder(model.unet.config.block_out_channels[0], model.base.latent_scale),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def open_control_run(path: Path) -> tuple[Run, S2IConfig]:
    """Open a finished controllable run. UserError where it is none, has not finished, or is damaged."""
    run = Run.open(path)
    if not isinstance(run.config, S2IConfig):
        raise UserError(f"{path} is not a run of train-s2i: it has no control")
    run.check_results()
    return run, run.config


def run_dataset(config: S2IConfig, root: Path | None, resolution: int) -> ControlDataset:
    """The dataset that a configuration names. UserError where it cannot be used."""
    return find_dataset(
        config.dataset,
        root,
        signal=config.signal,
        palette=config.palette,
        captions=config.captions,
        make_captions=config.make_captions,
        resolution=resolution,
        device=config.device,
    )


def load_hint_encoder(run: RunFolder) -> HintEncoder:
    """The run's control encoder. UserError where it is damaged."""
    check_result(run, run.control_encoder)
    try:
        encoder = HintEncoder.from_pretrained(run.control_encoder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{run.control_encoder} cannot be read ({error}): etherdiff resume {run.path} writes it again"
        ) from error
    return encoder.requires_grad_(False).eval()


def load_control_run(path: Path, device: str = "auto") -> tuple[StableDiffusionS2IPipeline, ControlDataset, Run, S2IConfig]:
    """Load the run's pipeline, ready to draw, and find its dataset. UserError where anything is not as it was."""
    run, config = open_control_run(path)
    hint_encoder = load_hint_encoder(run.folder)
    base = find_base(config.base, config.prediction_type)
    refuse_other_base(run, base)
    dataset = run_dataset(config, config.data_root, config.resolution or base.resolution)
    model = load_base(base)
    load_adapters(model.unet, [(adapter, 1.0) for adapter in run.adapters])
    pipeline = make_s2i_pipeline(model, hint_encoder).to(resolve_device(device))
    return pipeline, dataset, run, config
