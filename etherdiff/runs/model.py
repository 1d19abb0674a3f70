"""Models of a run: its base, its changes to the weights, and the pipeline of a controllable run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from safetensors import SafetensorError
from torch import Tensor, nn

from etherdiff.adapters.analysis import LayerDrift, adapter_drift, full_drift
from etherdiff.adapters.io import FULL, load_adapter, load_adapters, merge_adapter, read_adapter
from etherdiff.adapters.methods import TARGETS
from etherdiff.config import S2IConfig
from etherdiff.control.datasets import ControlDataset, find_dataset
from etherdiff.control.pipeline import HintEncoder, StableDiffusionS2IPipeline
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base, StableDiffusion, fingerprint, load_base
from etherdiff.runs.folder import RunFolder, check_result
from etherdiff.runs.run import Run
from etherdiff.system.devices import resolve_device
from etherdiff.system.errors import UserError
from etherdiff.system.text import program

# --- Weights --------------------------------------------------------------------------------------------------------


def refuse_other_base(run: Run, base: Base, hashes: Mapping[str, str] | None = None) -> None:
    """Raise UserError where a base holds other weights than the run was trained on. `hashes`: its known fingerprint."""
    now = fingerprint(base) if hashes is None else hashes
    if changed := _changed_parts(run, now):
        raise UserError(f"{run.path} was trained on other weights than {base.name} holds now: {', '.join(changed)}")


def _changed_parts(run: Run, hashes: Mapping[str, str]) -> list[str]:
    """List the parts of the base whose weights are not those that the run recorded."""
    return sorted(part for part, sha256 in run.provenance.base.fingerprint.items() if hashes.get(part) != sha256)


def find_local_base(run: Run) -> Base:
    """Find the base where the run found it, without a download. UserError where it is gone or holds other weights."""
    place = Path(run.provenance.base.path or run.config.base)
    is_there = place.is_absolute() and place.exists()
    if not is_there and run.config.base != "tiny" and not Path(run.config.base).exists():
        raise UserError("its base is no longer where the run found it")
    base = find_base(str(place) if is_there else run.config.base, run.config.prediction_type)
    if _changed_parts(run, fingerprint(base)):
        raise UserError("its base holds other weights now")
    return base


def count_trained(run: Run) -> int:
    """Count the trained numbers of the run's adapters; the control encoder is not counted, as in the paper."""
    if not run.adapters and run.config.method != "none":
        raise UserError("it has no adapter")
    return sum(read_adapter(folder).trained_parameters() for folder in run.adapters)


def measure_drift(run: Run) -> dict[str, LayerDrift]:
    """Measure how far each layer has moved from the base; of magnitudes, with the adapter that they were learned on."""
    if len(run.adapters) > 1:
        return full_drift(*merged_weights(run))
    unet, saved = load_local_unet(run), read_adapter(run.folder.adapter)
    if saved.peft_type == FULL:
        return full_drift(unet.state_dict(), saved.tensors())
    return adapter_drift(load_adapter(unet, saved.folder))


def merged_weights(run: Run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the targeted layers' weights (out, in) of the base, and of the base with the run's adapters merged."""
    unet = load_local_unet(run)
    before = {name: weight.clone() for name, weight in _targeted(unet, run).items()}
    adapted = load_adapters(unet, [(folder, 1.0) for folder in run.adapters])
    return before, _targeted(merge_adapter(adapted), run)


def load_local_unet(run: Run) -> Any:
    """Load the base's UNet as the run found it. UserError where it is not there any more, or nothing was trained yet."""
    if not run.adapters and run.config.method != "none":
        raise UserError("it has no adapter")
    return load_base(find_local_base(run)).unet


def _targeted(unet: nn.Module, run: Run) -> dict[str, Tensor]:
    endings = tuple(f".{ending}" for ending in TARGETS[run.config.targets])
    linear = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    return {f"{name}.weight": layer.weight.detach() for name, layer in linear.items() if f".{name}".endswith(endings)}


# --- Controllable runs ----------------------------------------------------------------------------------------------


def make_s2i_pipeline(model: StableDiffusion, hint_encoder: HintEncoder | None = None) -> StableDiffusionS2IPipeline:
    """Make a pipeline of the model's own modules, with DDIM as in the paper. Without a hint encoder: no control."""
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


def run_dataset(config: S2IConfig, root: Path | None, resolution: int, read_files: bool = False) -> ControlDataset:
    """Find the dataset that a configuration names; read_files: look into every file. UserError where it cannot be used."""
    return find_dataset(
        config.dataset,
        root,
        signal=config.signal,
        palette=config.palette,
        captions=config.captions,
        make_captions=config.make_captions,
        resolution=resolution,
        device=config.device,
        read_files=read_files,
    )


def load_hint_encoder(run: RunFolder) -> HintEncoder:
    """Load the run's control encoder. UserError where it is damaged."""
    check_result(run, run.control_encoder)
    try:
        encoder = HintEncoder.from_pretrained(run.control_encoder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{run.control_encoder} cannot be read ({error}): {program('resume', run.path)} writes it again"
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
