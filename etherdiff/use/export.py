"""The way out: a trained adapter as a plain diffusers pipeline, a single-file checkpoint or a LoRA file, each proved.

Whatever is written is read back with plain diffusers, and one denoising pass is compared with the adapted model's,
before it takes its final name.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from etherdiff import __version__
from etherdiff.adapters.io import (
    BASE,
    CONFIG,
    WEIGHTS,
    Factors,
    SavedAdapter,
    load_adapter,
    load_adapters,
    lora_factors,
    merge_adapter,
    read_adapter,
    refuse_inexact_lora,
)
from etherdiff.control.pipeline import HintEncoder, add_code, added_hint
from etherdiff.families.bases import (
    COMPONENTS,
    Base,
    StableDiffusion,
    encode_prompts,
    fingerprint,
    load_base,
    make_pipeline,
    weight_files,
)
from etherdiff.families.single_file import write_single_file
from etherdiff.families.text_encoder import save_text_encoder
from etherdiff.system.errors import ProofError, UserError
from etherdiff.system.files import save_tensors, staged_file, staged_folder

PROOF_PROMPT = "a photo of a dog"
PROOF_TIMESTEP = 500
PROOF_LATENTS = 32  # side in latents at most: the weights are the same at every size, and attention's memory is not
TOLERANCE = {
    torch.float32: 1e-4,
    # the weights that were written are rounded, by up to eps / 2 each; measured on SD 1.5's size: 0.7 eps
    torch.float16: 8 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps,
}
CONFIG_SUFFIXES = {".json", ".txt", ".model"}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth"}
UNET_WEIGHTS = VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
SD_VERSIONS = {768: "sd_v1", 1024: "sd_v2"}  # width of the text embeddings -> sd-scripts' name of the version

Format = Literal["lora", "kohya", "peft"]


def parse_format(text: str) -> Format:
    """lora, kohya or peft; UserError for anything else."""
    if text not in get_args(Format):
        raise UserError(f"format: must be {', '.join(get_args(Format))}, not {text!r}")
    return text  # type: ignore[return-value]


def parse_dtype(text: str) -> torch.dtype:
    """fp32, fp16 or bf16; UserError for anything else."""
    known = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if text not in known:
        raise UserError(f"dtype: must be {', '.join(known)}, not {text!r}")
    return known[text]


class Difference(NamedTuple):
    """Between two predictions: max |a - b|, and ‖a - b‖ / ‖b‖."""

    max_abs: float
    relative: float

    def as_dict(self) -> dict[str, float]:
        return {"max_abs_difference": self.max_abs, "relative_difference": self.relative}


# --- Merge -----------------------------------------------------------------------------------------------------------


def merge_to_folder(
    base: Base,
    adapters: list[tuple[Path, float]],
    output: Path,
    dtype: torch.dtype = torch.float32,
    single_file: Path | None = None,
    hint_encoder: Path | None = None,
) -> dict[str, Any]:
    """Write a plain diffusers pipeline whose UNet has the adapters, each at its scale, folded in; prove it; report.

    Everything but the UNet is the base's own, byte for byte; a single-file base, which has no folder, gives its weights
    in `dtype`. single_file: also one WebUI/ComfyUI checkpoint there. The work is done in float32; `dtype`, that or
    float16 or bfloat16, is what is written. hint_encoder: the folder of a controllable run's; the pipeline then is a
    StableDiffusionS2IPipeline that holds its own code, and opens with DiffusionPipeline and trust_remote_code=True.

    Returns max_abs_difference and relative_difference of one denoising pass (of the worse, if there are two outputs),
    files, the number of files written, left_out, optional components that the base names but does not have, and
    same_base, whether every adapter was trained on this base (None: not recorded).
    Raises UserError where the input or the output is wrong, ProofError where the result does not do what the adapted
    model does; both leave nothing behind.
    """
    output = Path(output).expanduser().resolve()
    _refuse_existing(output)
    if single_file is not None:
        single_file = Path(single_file).expanduser().resolve()
        _refuse_unfit_file(single_file)
    if not adapters and hint_encoder is None:
        raise UserError("nothing to merge: give at least one adapter.")
    if single_file is not None and hint_encoder is not None:
        raise UserError("--single-file: no such file holds a control encoder; the folder of --output does")
    saved = [read_adapter(folder) for folder, _ in adapters]
    with staged_folder(output) as staged:
        reference, left_out = _write_merged(base, adapters, staged, dtype, hint_encoder)
        pipeline = _read_plainly(staged) if hint_encoder is None else _read_with_its_code(staged)
        differences = [_prove(pipeline, reference, TOLERANCE[dtype], "the merged pipeline")]
        files = sum(path.is_file() for path in staged.rglob("*"))
        if single_file is not None:
            write_single_file(pipeline.unet, pipeline.vae, pipeline.text_encoder, single_file, dtype)
            with _removed_on_error(single_file):
                pipeline = _read_single_file(single_file, staged)
                differences.append(_prove(pipeline, reference, TOLERANCE[dtype], "the single file"))
            files += 1
    worst = max(differences, key=lambda difference: difference.relative)
    same = [trained_on(adapter, base) for adapter in saved]
    return worst.as_dict() | {
        "files": files,
        "left_out": left_out,
        "same_base": False if False in same else None if None in same else True,
    }


def _write_merged(
    base: Base, adapters: list[tuple[Path, float]], folder: Path, dtype: torch.dtype, hint_encoder: Path | None
) -> tuple[Tensor, list[str]]:
    """Fill `folder`; returns the adapted model's prediction from before the merge, and what was left out."""
    model = load_base(base)
    adapted = load_adapters(model.unet, list(adapters))
    encoder = HintEncoder.from_pretrained(hint_encoder, local_files_only=True) if hint_encoder else None
    reference = _predict(model.unet, encode_prompts(model.tokenizer, model.text_encoder, [PROOF_PROMPT]), encoder)
    left_out = _copy_components(base, folder)
    if encoder is not None:
        encoder.to(dtype).save_pretrained(folder / "hint_encoder")
        add_code(folder)
    _save_weights(merge_adapter(adapted), folder / "unet" / UNET_WEIGHTS, dtype)
    if base.single_file is not None:
        _save_weights(model.vae, folder / "vae" / VAE_WEIGHTS, dtype)
        text_encoder: Any = model.text_encoder
        save_text_encoder(text_encoder.to(dtype), folder / "text_encoder")
    return reference, left_out


def _copy_components(base: Base, folder: Path) -> list[str]:
    """Copy what model_index.json names, but not the UNet's weights; returns the optional components left out."""
    index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
    named = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    left_out = [name for name in named if name not in COMPONENTS and not _is_complete(base, name)]
    for name in named:
        if name not in left_out:
            (folder / name).mkdir()
            for target, source in _component_files(base, name).items():
                shutil.copyfile(source, folder / name / target)  # follows the links of a hub cache
    if left_out:
        changes: dict[str, Any] = {name: [None, None] for name in left_out}
        if "safety_checker" in left_out:
            changes["requires_safety_checker"] = False
        _write_json(folder / "model_index.json", index | changes)
    else:
        shutil.copyfile(base.folder / "model_index.json", folder / "model_index.json")
    scheduler = base.config("scheduler")
    if base.prediction_type is not None and scheduler.get("prediction_type", "epsilon") != base.prediction_type:
        changed = scheduler | {"prediction_type": base.prediction_type}
        _write_json(folder / "scheduler" / "scheduler_config.json", changed)
    return left_out


def _is_complete(base: Base, name: str) -> bool:
    """Whether an optional component can be copied: it is there, and its weights, if it has any, are safetensors."""
    source = base.folder / name
    if not source.is_dir():
        return False
    pickled = any(path.suffix in PICKLE_SUFFIXES for path in source.iterdir())
    return bool(weight_files(base, name)) or not pickled


def _component_files(base: Base, name: str) -> dict[str, Path]:
    """File name in the output -> source: configurations, vocabularies, and the weights that etherdiff reads.

    Weights that exist only as a variant, such as fp16, lose it in their name, or plain diffusers would not find them.
    """
    weights = weight_files(base, name) if name != "unet" else []
    variant = weights[0].name.split(".")[1] if weights and weights[0].name.count(".") > 1 else None
    files = {path.name.replace(f".{variant}.", ".") if variant else path.name: path for path in weights}
    for path in (base.folder / name).iterdir():
        is_index = ".index." in path.name
        if path.suffix in CONFIG_SUFFIXES and (not is_index or (len(weights) > 1 and "safetensors" in path.name)):
            files[path.name] = path
    return files


def _save_weights(module: Any, path: Path, dtype: torch.dtype) -> None:
    state = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for key, value in module.state_dict().items()
    }
    save_tensors(state, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- Export ----------------------------------------------------------------------------------------------------------


def export_adapter(
    base: Base,
    adapter: Path,
    output: Path,
    format: Format,  # noqa: A002  the option's name
    scale: float = 1.0,
) -> dict[str, Any]:
    """Write an adapter as a LoRA file, or copy it as a PEFT folder.

    lora: diffusers' `load_lora_weights` reads it. kohya: sd-scripts' key names, for WebUI and ComfyUI too. Both are
    float32 and exact on `base` alone, with `scale` inside; output is a folder, which gets the standard file name, or a
    path that ends in .safetensors. peft: the adapter's own folder; its scale is chosen where it is loaded.

    Returns path, files and same_base (None: not recorded); for a LoRA also layers, rank (the largest),
    max_abs_difference and relative_difference of one denoising pass.
    Raises UserError where the adapter is for another base, cannot be exact as a LoRA, or the output exists; ProofError
    where the file does not do what the adapter does. Both leave nothing behind.
    """
    if format not in ("lora", "kohya", "peft"):
        raise UserError(f"there is no export format {format!r}: choose lora, kohya or peft.")
    saved, output = read_adapter(adapter), Path(output).expanduser().resolve()
    if format == "peft":
        return _copy_adapter(saved, output, scale) | {"same_base": trained_on(saved, base)}
    refuse_inexact_lora(saved.peft_type)
    path = _lora_path(output, kohya=format == "kohya")
    _refuse_unfit_file(path)
    same_base = trained_on(saved, base)
    if same_base is False:
        raise UserError(
            f"adapter {saved.folder} was trained on {saved.base_name}, whose UNet is not that of {base.name}, and a "
            "LoRA made from it would be exact on neither: give the base it was trained on, in the same files."
        )
    factors, reference = _factors_and_reference(base, saved, scale)
    tensors = _kohya_tensors(factors) if format == "kohya" else _diffusers_tensors(factors)
    with staged_file(path, own_name=True) as staged:
        save_tensors(tensors, staged, _metadata(base, factors, kohya=format == "kohya"))
        pipeline: Any = make_pipeline(load_base(base))
        pipeline.load_lora_weights(str(staged))
        difference = _prove(pipeline, reference, TOLERANCE[torch.float32], "the LoRA file")
    report = {"path": path, "files": 1, "same_base": same_base}
    return report | {"layers": len(factors), "rank": _largest_rank(factors)} | difference.as_dict()


def trained_on(adapter: SavedAdapter, base: Base) -> bool | None:
    """Whether an adapter was trained on this base's UNet, by the files' hashes; None where that is not recorded."""
    recorded, present = (adapter.base or {}).get("fingerprint", {}), fingerprint(base)
    kind = "unet" if base.single_file is None else "single_file"
    return recorded[kind] == present[kind] if kind in recorded else None


def _copy_adapter(saved: SavedAdapter, output: Path, scale: float) -> dict[str, Any]:
    if output.suffix == ".safetensors":
        raise UserError(f"--output {output}: a PEFT adapter is a folder, not a file.")
    if scale != 1:
        raise UserError("a PEFT adapter does not hold a scale: set it where the adapter is loaded, or export a LoRA.")
    _refuse_existing(output)
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
    return lora_factors(adapted), _predict(model.unet, text)


def _diffusers_tensors(factors: Factors) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"unet.{name}.lora_A.weight"] = down
        tensors[f"unet.{name}.lora_B.weight"] = up
    return tensors


def _kohya_tensors(factors: Factors) -> dict[str, Tensor]:
    """sd-scripts' names, with alpha = rank, so that every reader's factor alpha / rank is one.

    Where ranks differ, all are padded with zeros to the largest: diffusers 0.42 loses track of each layer's own alpha.
    """
    rank = _largest_rank(factors)
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


def _metadata(base: Base, factors: Factors, kohya: bool) -> dict[str, str]:
    """The safetensors header's texts: where the file comes from, and what its format's readers look for."""
    name = Path(base.name).name if base.local_path == Path(base.name).expanduser().resolve() else base.name
    common = {
        "made_by": f"etherdiff {__version__}",
        "base_model": name,
        "base_fingerprint": json.dumps(fingerprint(base), sort_keys=True),
        "note": "exact only on this base",
    }
    return common | (_kohya_metadata(base, name, _largest_rank(factors)) if kohya else _diffusers_metadata(factors))


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


def _kohya_metadata(base: Base, base_name: str, rank: int) -> dict[str, str]:
    """What sd-scripts, WebUI and ComfyUI's managers read; only what is true of a file that sd-scripts did not train."""
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
        "ss_sd_model_name": base_name,
    }
    version = SD_VERSIONS.get(base.config("unet")["cross_attention_dim"])
    if version is not None:
        is_velocity = (base.prediction_type or base.config("scheduler").get("prediction_type")) == "v_prediction"
        metadata["ss_base_model_version"] = f"{version}_v" if is_velocity and version == "sd_v2" else version
        metadata["ss_v2"] = str(version == "sd_v2")
    return metadata


# --- Proof -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _predict(unet: Any, text: Tensor, hint_encoder: Any = None) -> Tensor:
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


def _prove(pipeline: Any, reference: Tensor, tolerance: float, what: str) -> Difference:
    """Compare a pipeline that was read back with the adapted model's prediction. ProofError above the tolerance."""
    text = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, [PROOF_PROMPT])
    error = _predict(pipeline.unet, text, getattr(pipeline, "hint_encoder", None)) - reference
    difference = Difference(error.abs().max().item(), (error.norm() / reference.norm()).item())
    if not difference.relative <= tolerance:  # also where it is NaN
        raise ProofError(
            f"{what}, read back with plain diffusers, differs from the adapted model by {difference.relative:.1e} "
            f"(relative; at most {tolerance:.1e} is expected), so it was removed. This is a bug: please report it with "
            "the versions of etherdiff, diffusers, peft and torch."
        )
    return difference


def _read_plainly(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True).to(torch.float32)


def _read_with_its_code(folder: Path) -> Any:
    """As a user without etherdiff would: the code is the folder's own."""
    return DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, trust_remote_code=True).to(torch.float32)


def _read_single_file(path: Path, config: Path) -> Any:
    pipeline = StableDiffusionPipeline.from_single_file(
        str(path), config=str(config), local_files_only=True, safety_checker=None
    )
    return pipeline.to(torch.float32)


# --- Outputs ---------------------------------------------------------------------------------------------------------


def _refuse_existing(output: Path) -> None:
    if output.is_file():
        raise UserError(f"--output {output} is a file: give a folder that does not exist yet.")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"--output {output} exists and is not empty: give another folder, or remove it first.")


def _refuse_unfit_file(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must be named *.safetensors: the tools that read such files go by it.")
    if path.exists():
        raise UserError(f"{path} exists: give another name, or remove it first.")


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
