"""`etherdiff export`: a run's adapter as a LoRA file, proved, or as a PEFT folder."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etherdiff.adapters.io import (
    BASE,
    CONFIG,
    WEIGHTS,
    Factors,
    SavedAdapter,
    load_adapter,
    lora_factors,
    read_adapter,
    refuse_inexact_lora,
)
from etherdiff.config import ExportOptions
from etherdiff.families.sd1 import Base, StableDiffusion, encode_prompts, load_base, make_pipeline
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import save_tensors, staged_file, staged_folder
from etherdiff.use.generate import run_source
from etherdiff.use.metadata import file_metadata, network_metadata
from etherdiff.use.proof import PROOF_PROMPT, TOLERANCE, predict, prove, refuse_existing, refuse_unfit_file, trained_on

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
MIN_KOHYA_RANK = 2
"""stable-diffusion.cpp drops a matrix's trailing 1 and then finds no rank: a file of rank 1 does nothing there."""


def export_run(run: Path, options: ExportOptions) -> dict[str, Any]:
    """Write a run's adapter: see `export_adapter`. UserError if the run has none, or more than the format can hold."""
    source = run_source(run)
    if not source.adapters:
        raise UserError(
            f"{run} was trained with the method none: it has no adapter to export (etherdiff merge takes its encoder)"
        )
    if source.hint_encoder is not None and options.format != "peft":
        raise UserError(
            f"no {options.format} file holds a control encoder: use etherdiff merge, or --format peft for the adapter alone"
        )
    return export_adapter(source.base, source.adapters[0], options.output, options.format, options.scale, source.run)


def export_adapter(
    base: Base,
    adapter: Path,
    output: Path,
    format: Literal["lora", "kohya", "peft"],  # noqa: A002  the option's name
    scale: float = 1.0,
    run: Run | None = None,
) -> dict[str, Any]:
    """Write an adapter as a LoRA file, or copy it as a PEFT folder.

    kohya: sd-scripts' key names, which every program reads. lora: diffusers' own names, which no other program reads.
    Both are float32 and exact on `base` alone, with `scale` inside; output is a folder, which gets the standard file
    name, or a path that ends in .safetensors. peft: the adapter's own folder; its scale is chosen where it is loaded.
    run: whose adapter it is; the file then says how it was trained.

    Returns path, files and same_base (None: not recorded); for a LoRA also layers, rank (the largest of the updates;
    a kohya file is padded to MIN_KOHYA_RANK), max_abs_difference and relative_difference of one denoising pass.
    Raises UserError where the adapter is for another base, cannot be exact as a LoRA, or the output exists; ProofError
    where the file does not do what the adapter does. Both leave nothing behind.
    """
    saved, output = read_adapter(adapter), Path(output).resolve()
    if format == "peft":
        return _copy_adapter(saved, output, scale) | {"same_base": trained_on(saved, base)}
    refuse_inexact_lora(saved.peft_type)
    path = _lora_path(output, kohya=format == "kohya")
    refuse_unfit_file(path)
    same_base = trained_on(saved, base)
    if same_base is False:
        raise UserError(
            f"adapter {saved.folder} was trained on {saved.base_name}, whose UNet is not that of {base.name}, and a "
            "LoRA made from it would be exact on neither: give the base it was trained on, in the same files."
        )
    factors, reference = _factors_and_reference(base, saved, scale)
    tensors = {"lora": _diffusers_tensors, "kohya": _kohya_tensors}[format](factors)
    with staged_file(path, own_name=True) as staged:
        title = output.stem if output.suffix == ".safetensors" else output.name
        own = network_metadata(_kohya_rank(factors)) if format == "kohya" else _diffusers_metadata(factors)
        save_tensors(tensors, staged, file_metadata(base, "lora", title, run) | own)
        pipeline: Any = make_pipeline(load_base(base))
        pipeline.load_lora_weights(str(staged))
        difference = prove(pipeline, reference, TOLERANCE[torch.float32], "the LoRA file")
    report = {"path": path, "files": 1, "same_base": same_base}
    return report | {"layers": len(factors), "rank": _largest_rank(factors)} | difference.as_dict()


def _copy_adapter(saved: SavedAdapter, output: Path, scale: float) -> dict[str, Any]:
    if output.suffix == ".safetensors":
        raise UserError(f"--output {output}: a PEFT adapter is a folder, not a file.")
    if scale != 1:
        raise UserError("a PEFT adapter does not hold a scale: set it where the adapter is loaded, or export a LoRA.")
    refuse_existing(output)
    names = [name for name in (CONFIG, WEIGHTS, BASE) if (saved.folder / name).is_file()]
    saved.tensors()  # refuses a damaged file
    with staged_folder(output) as staged:
        for name in names:
            shutil.copyfile(saved.folder / name, staged / name)
    return {"path": output, "files": len(names)}


def _lora_path(output: Path, kohya: bool) -> Path:
    if output.suffix == ".safetensors":
        return output
    return output / (f"{output.name}.safetensors" if kohya else LORA_FILE)


def _factors_and_reference(base: Base, saved: SavedAdapter, scale: float) -> tuple[Factors, Tensor]:
    """The adapter's LoRA factors on this base, and the adapted model's prediction."""
    model: StableDiffusion = load_base(base)
    adapted: nn.Module = load_adapter(model.unet, saved.folder, scale=scale)
    text = encode_prompts(model.tokenizer, model.text_encoder, [PROOF_PROMPT])
    return lora_factors(adapted), predict(model.unet, text)


def _diffusers_tensors(factors: Factors) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora_A.weight"] = down
        tensors[f"unet.{name}.lora_B.weight"] = up
    return tensors


def _kohya_tensors(factors: Factors) -> dict[str, Tensor]:
    """sd-scripts' names, with alpha = rank, so that every reader's factor alpha / rank is one.

    All are padded with zeros to one rank: where ranks differ, diffusers 0.42 loses track of each layer's own alpha.
    """
    rank = _kohya_rank(factors)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in factors.items():
        key, lacking = "lora_unet_" + name.replace(".", "_"), rank - len(down)
        tensors |= {
            f"{key}.lora_down.weight": F.pad(down, (0, 0, 0, lacking)),
            f"{key}.lora_up.weight": F.pad(up, (0, lacking)),
            f"{key}.alpha": torch.tensor(float(rank)),
        }
    return tensors


def _largest_rank(factors: Factors) -> int:
    return max(len(down) for down, _ in factors.values())


def _kohya_rank(factors: Factors) -> int:
    return max(_largest_rank(factors), MIN_KOHYA_RANK)


def _diffusers_metadata(factors: Factors) -> dict[str, str]:
    """PEFT's LoRA configuration, spelled out: not every diffusers infers alpha = rank where ranks differ."""
    ranks = {layer: len(down) for layer, (down, _) in factors.items()}
    most_common = max(set(ranks.values()), key=list(ranks.values()).count)
    others = {f"^{layer}": rank for layer, rank in ranks.items() if rank != most_common}
    config = {
        "r": most_common,
        "lora_alpha": most_common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
    }
    prefixed = {f"unet.{key}": value for key, value in config.items()}
    return {"lora_adapter_metadata": json.dumps(prefixed, sort_keys=True)}
