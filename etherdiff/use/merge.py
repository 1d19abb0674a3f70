"""`etherdiff merge`: a run as a plain diffusers pipeline, and as a single-file checkpoint, each proved.

What is written is read back with plain diffusers, and one denoising pass and one decoding are compared with the adapted
model's, before it takes its final name.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from torch import Tensor

from etherdiff.adapters.io import load_adapters, merge_adapter, read_adapter
from etherdiff.config import MergeOptions
from etherdiff.control.pipeline import HintEncoder, add_code
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import COMPONENTS, Base, encode_prompts, load_base, save_text_encoder, variant_of, weight_files
from etherdiff.families.single_file import write_single_file
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.system.files import save_tensors, staged_file, staged_folder
from etherdiff.system.terminal import say
from etherdiff.use.generate import Source, run_source
from etherdiff.use.metadata import file_metadata
from etherdiff.use.proof import PROOF_PROMPT, TOLERANCE, decode, predict, prove, refuse_existing, refuse_unfit_file, trained_on

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CONFIG_SUFFIXES = {".json", ".txt", ".model"}
PICKLE_SUFFIXES = {".bin", ".ckpt", ".pt", ".pth"}
UNET_WEIGHTS = VAE_WEIGHTS = "diffusion_pytorch_model.safetensors"


def merge_run(run: Path | None, options: MergeOptions) -> dict[str, Any]:
    """Write the pipeline of a run, or of a base and adapters: see `merge_to_folder`.

    The report also has holds_code: whether the run is controllable.
    """
    if (run is None) == (options.base is None) or bool(options.adapter) != (options.base is not None):
        raise UserError("give either a run, or --base with --adapter")
    source = (
        run_source(run, "everything") if run else Source(find_base(str(options.base), parts="everything"), [*options.adapter])
    )
    adapters, precision = [(path, options.scale) for path in source.adapters], PRECISIONS[options.dtype]
    report = merge_to_folder(
        source.base, adapters, options.output, precision, options.single_file, source.hint_encoder, source.run
    )
    return report | {"holds_code": source.hint_encoder is not None}


def merge_to_folder(
    base: Base,
    adapters: list[tuple[Path, float]],
    output: Path,
    dtype: torch.dtype = torch.float32,
    single_file: Path | None = None,
    hint_encoder: Path | None = None,
    run: Run | None = None,
) -> dict[str, Any]:
    """Write a plain diffusers pipeline whose UNet has the adapters, each at its scale, folded in; prove it; report.

    Everything but the UNet is the base's own, byte for byte; a single-file base, which has no folder, gives its weights
    in `dtype`. single_file: also one WebUI/ComfyUI checkpoint there. The work is done in float32; `dtype`, that or
    float16 or bfloat16, is what is written. hint_encoder: the folder of a controllable run's; the pipeline then is a
    StableDiffusionS2IPipeline that holds its own code, and opens with DiffusionPipeline and trust_remote_code=True.
    run: whose result it is; the single file then says how it was trained.

    Returns max_abs_difference and relative_difference of one denoising pass (of the worse, if there are two outputs),
    files, the number of files written, left_out, optional components that the base names but does not have, and
    same_base, whether every adapter was trained on this base (None: not recorded).
    Raises UserError where the input or the output is wrong, ProofError where the result does not do what the adapted
    model does; both leave nothing behind, but for the proved folder where it is the single file that fails.
    """
    output = Path(output).resolve()
    refuse_existing(output)
    if single_file is not None:
        single_file = Path(single_file).resolve()
        refuse_unfit_file(single_file)
    if not adapters and hint_encoder is None:
        raise UserError("nothing to merge: give at least one adapter.")
    if single_file is not None and hint_encoder is not None:
        raise UserError("--single-file: no such file holds a control encoder; the folder of --output does")
    saved = [read_adapter(folder) for folder, _ in adapters]
    with staged_folder(output) as staged:
        (reference, image), left_out = _write_merged(base, adapters, staged, dtype, hint_encoder)
        pipeline = _read_plainly(staged) if hint_encoder is None else _read_with_its_code(staged)
        differences = [prove(pipeline, reference, TOLERANCE[dtype], "the merged pipeline", image)]
        files = sum(path.is_file() for path in staged.rglob("*"))
    if single_file is not None:
        try:
            with staged_file(single_file, own_name=True) as file:
                metadata = file_metadata(base, "checkpoint", single_file.stem, run)
                write_single_file(pipeline.unet, pipeline.vae, pipeline.text_encoder, file, dtype, metadata)
                pipeline = _read_single_file(file, output, pipeline)
                differences.append(prove(pipeline, reference, TOLERANCE[dtype], "the single file", image))
        except BaseException:
            say(f"{output} is written and proved; the single file failed.")
            raise
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
) -> tuple[tuple[Tensor, Tensor], list[str]]:
    """Fill `folder`; returns the adapted model's prediction and decoded image from before, and what was left out."""
    model = load_base(base)
    adapted = load_adapters(model.unet, list(adapters))
    encoder = HintEncoder.from_pretrained(hint_encoder, local_files_only=True) if hint_encoder else None
    reference = predict(model.unet, encode_prompts(model.tokenizer, model.text_encoder, [PROOF_PROMPT]), encoder)
    image = decode(model.vae)
    left_out = _copy_components(base, folder)
    if encoder is not None:
        encoder.to(dtype).save_pretrained(folder / "hint_encoder")
        add_code(folder)
    _save_weights(merge_adapter(adapted), folder / "unet" / UNET_WEIGHTS, dtype)
    if base.single_file is not None:
        _save_weights(model.vae, folder / "vae" / VAE_WEIGHTS, dtype)
        text_encoder: Any = model.text_encoder
        save_text_encoder(text_encoder.to(dtype), folder / "text_encoder")
    return (reference, image), left_out


def _copy_components(base: Base, folder: Path) -> list[str]:
    """Copy what model_index.json names, but not the UNet's weights; returns the optional components left out."""
    index = json.loads((base.folder / "model_index.json").read_text(encoding="utf-8"))
    named = [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    left_out = [name for name in named if name not in COMPONENTS and not _is_complete(base, name)]
    for name in named:
        if name not in left_out:
            (folder / name).mkdir()
            _copy_component(base, name, folder / name)
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


def _copy_component(base: Base, name: str, folder: Path) -> None:
    """Copy configurations, vocabularies, and the weights that etherdiff reads.

    Weights that exist only as a variant, such as fp16, lose it in their names and in the index of their shards, or plain
    diffusers would not find them.
    """
    weights = weight_files(base, name) if name != "unet" else []
    variant = variant_of(weights[0]) if weights else None
    names = {path.name: re.sub(rf"\.{variant}(?=[-.])", "", path.name) for path in weights}
    for path in weights:
        shutil.copyfile(path, folder / names[path.name])  # follows the links of a hub cache
    for path in (base.folder / name).iterdir():
        if path.suffix in CONFIG_SUFFIXES and ".index." not in path.name:
            shutil.copyfile(path, folder / path.name)
    ending = f".safetensors.index.{variant}.json" if variant else ".safetensors.index.json"
    for path in (base.folder / name).glob(f"*{ending}") if len(weights) > 1 else ():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] = {key: names.get(file, file) for key, file in index["weight_map"].items()}
        _write_json(folder / (path.name.removesuffix(ending) + ".safetensors.index.json"), index)


def _save_weights(module: Any, path: Path, dtype: torch.dtype) -> None:
    state = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for key, value in module.state_dict().items()
    }
    save_tensors(state, path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _read_plainly(folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(str(folder), local_files_only=True).to(torch.float32)


def _read_with_its_code(folder: Path) -> Any:
    """As a user without etherdiff would: the code is the folder's own."""
    return DiffusionPipeline.from_pretrained(str(folder), local_files_only=True, trust_remote_code=True).to(torch.float32)


def _read_single_file(path: Path, config: Path, folder: Any) -> Any:
    """Read what the file holds; what it does not hold is that of the folder's pipeline.

    diffusers asks transformers for every other class that model_index.json names, also for those that it no longer has.
    """
    others = {"tokenizer": folder.tokenizer, "scheduler": folder.scheduler, "feature_extractor": None, "safety_checker": None}
    pipeline = StableDiffusionPipeline.from_single_file(str(path), config=str(config), local_files_only=True, **others)
    return pipeline.to(torch.float32)
