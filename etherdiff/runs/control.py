"""What a controllable run left, as a pipeline that draws."""

from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from safetensors import SafetensorError

from etherdiff.adapters.io import load_adapters
from etherdiff.config import S2IConfig
from etherdiff.control.datasets import find_dataset
from etherdiff.control.pairs import ControlDataset
from etherdiff.control.pipeline import HintEncoder, StableDiffusionS2IPipeline
from etherdiff.families.bases import StableDiffusion, find_base, fingerprint, load_base
from etherdiff.runs.folder import RunFolder, check_result, read_settings
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


def control_config(run: Path) -> tuple[RunFolder, S2IConfig, dict[str, Any]]:
    """The settings of a finished controllable run. UserError where it is none, or has not finished."""
    folder, config, provenance = read_settings(run)
    if not isinstance(config, S2IConfig):
        raise UserError(f"{run} is not a run of train-s2i: it has no control")
    if not folder.control_encoder.is_dir():
        raise UserError(f"{run} has no control encoder yet: the run has not finished (etherdiff resume {run})")
    return folder, config, provenance


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


def load_control_run(
    run: Path, device: str = "auto"
) -> tuple[StableDiffusionS2IPipeline, ControlDataset, S2IConfig, dict[str, Any]]:
    """The run's pipeline, ready to draw, its dataset, settings and provenance. UserError where anything is not as it was."""
    folder, config, provenance = control_config(run)
    assert config.resolution is not None  # the plan filled it in
    hint_encoder = load_hint_encoder(folder)
    base = find_base(config.base, config.prediction_type)
    recorded, now = provenance.get("base", {}).get("fingerprint", {}), fingerprint(base)
    changed = sorted(name for name in recorded if recorded[name] != now.get(name))
    if changed:
        raise UserError(f"{run} was trained on other weights than {base.name} holds now: {', '.join(changed)}")
    dataset = run_dataset(config, config.data_root, config.resolution)
    model = load_base(base)
    for adapter in folder.adapters:
        check_result(folder, adapter)
    load_adapters(model.unet, [(adapter, 1.0) for adapter in folder.adapters])
    pipeline = make_s2i_pipeline(model, hint_encoder).to(resolve_device(device))
    return pipeline, dataset, config, provenance
