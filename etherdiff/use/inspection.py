"""Count what a method trains and what a step costs, on the base's architecture: no weight is read.

The UNet is built without storage and one training step runs through it on shapes alone: forward with the
mean-squared loss, and backward. Only the UNet's step is counted. Text and images are encoded before training; the S2I
control encoder, the optimizer's update and elementwise work (which moves memory rather than computes) are left out.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from rich import box
from rich.table import Table
from torch import Tensor, nn

from etherdiff.adapters.methods import (
    METHODS,
    TARGETS,
    MethodOptions,
    add_adapter,
    magnitude_config,
    resolve_options,
    trainable_parameters,
)
from etherdiff.config import InspectOptions, TrainConfig
from etherdiff.eval.best import find_scorer
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base
from etherdiff.system.devices import DTYPES, resolve_device
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.terminal import say
from etherdiff.system.text import duration, size
from etherdiff.tasks import plan_training
from etherdiff.train.loop import optimizer_state_bytes
from etherdiff.use.flops import StepCost, count_step, iterate_tensors, measure_throughput

TASK_TARGETS = {"dreambooth": "attention", "s2i": "attention+geglu"}
MAGNITUDE = "magnitude"  # re-fitting after OFT: inspected like a method, though it is not one
FLOAT32_BYTES = 4


# --- The two questions -----------------------------------------------------------------------------------------------


def inspect_base(options: InspectOptions) -> dict[str, Any]:
    """Compare methods on a base: the content of `etherdiff inspect --json`.

    The task decides the targets unless they are given. Where methods are named, blocks and rank go to those that have them.

    Per method: parameters, bytes of the adapter's file (float32), FLOPs of a step, and bytes that autograd saves in it
    (float32); the last two are None, with a "note", where they cannot be counted. "path" is where the base is (a folder
    or a .safetensors file) if it is local, else None. UserError with every mistake.
    """
    names: Sequence[str] = options.method if options.method is not None else [*METHODS, MAGNITUDE]
    targets, problems = options.targets or TASK_TARGETS[options.task], Problems()
    wanted = MethodOptions(TARGETS[targets], options.blocks, options.rank)
    for name in options.method or ():
        problems.attempt(_check_method, name, wanted)
    found = problems.attempt(find_base, options.base, parts="configs")
    resolution = options.resolution or (found.value.resolution if found.value else 0)
    if found.value:
        problems.check(found.value.resolution_problems, resolution)
    (base,) = problems.settle(found)
    is_local = options.base == "tiny" or Path(options.base).exists()
    plain = _meta_unet(base)
    return {
        "base": options.base,
        "task": options.task,
        "targets": targets,
        "layers": count_layers(plain, wanted.targets),
        "unet_parameters": _numel(plain.parameters()),
        "path": str(base.local_path) if is_local else None,
        "resolution": resolution,
        "batch_size": options.batch_size,
        "methods": {
            name: _inspect_method(base, name, _readable(name, wanted), resolution, options.batch_size) for name in names
        },
    }


def training_estimate(
    base: Base,
    method: str,
    options: MethodOptions,
    *,
    resolution: int,
    batch_size: int,
    gradient_checkpointing: bool = False,
    weight_bytes: int = FLOAT32_BYTES,
    optimizer_bytes: int = 8,
) -> dict[str, Any]:
    """Estimate what a training run takes: trainable_parameters, step_flops, and memory in bytes by purpose.

    batch_size: images in one forward pass, those of prior preservation included. weight_bytes: per frozen weight, 4 or
    2; with 2 the step computes in half precision as under CUDA's autocast. optimizer_bytes: per trainable parameter.

    total = weights (frozen) + trainable_and_optimizer (float32 value, gradient, optimizer state) + activations (what
    autograd saves; with gradient checkpointing the blocks' inputs and the most that one block saves when it is computed
    again). What kernels and the allocator need besides is left out. activations, total and step_flops are None, with a
    "note", where a step cannot be counted.
    """
    half = weight_bytes < FLOAT32_BYTES
    adapted = _adapt(base, method, options, torch.bfloat16 if half else torch.float32)
    trainable = _numel(trainable_parameters(adapted.model).values())
    frozen = sum(t.nbytes for t in iterate_tensors(adapted.model) if not t.requires_grad)
    cost = _step_cost(base, adapted, resolution, batch_size, half, gradient_checkpointing)
    kept = trainable * (2 * FLOAT32_BYTES + optimizer_bytes)
    return {
        "trainable_parameters": trainable,
        "weights": frozen,
        "trainable_and_optimizer": kept,
        "activations": cost and cost.activation_bytes,
        "total": cost and frozen + kept + cost.activation_bytes,
        "step_flops": cost and cost.flops,
    } | _note(adapted)


def render_inspection(result: dict[str, Any]) -> Table:
    """Show the result of `inspect_base` as a table."""
    title = (
        f"{result['base']}, {result['targets']}: {result['layers']} layers; "
        f"a step of {result['batch_size']} x {result['resolution']} px, float32"
    )
    notes = [f"{name}: {row['note']}" for name, row in result["methods"].items() if "note" in row]
    table = Table(title=title, caption="\n".join(notes) or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in ("trainable", "% of\nUNet", "file\nMB", "GFLOP\n/step", "saved\nMB", "learn.\nrate"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("LoRA\nexact", justify="center", no_wrap=True)
    for name, row in result["methods"].items():
        rate = row["default_learning_rate"]
        table.add_row(
            name,
            f"{row['trainable_parameters']:,}",
            f"{100 * row['trainable_parameters'] / result['unet_parameters']:.3g}",
            _scaled(row["adapter_bytes"], 1e6, ",.1f"),
            _scaled(row["step_flops"], 1e9, ",.1f"),
            _scaled(row["saved_bytes"], 1e6, ",.1f"),
            "–" if rate is None else f"{rate:g}",
            "yes" if row["lora_exact"] else "no",
        )
    return table


def _scaled(value: int | None, unit: float, form: str) -> str:
    return "–" if value is None else format(value / unit, form)


# --- A dry run -------------------------------------------------------------------------------------------------------


def dry_run(config: TrainConfig) -> None:
    """Plan the run and print what it would take. UserError as the run itself would raise."""
    task = plan_training(config, find_scorer=find_scorer)
    plan, config = task.plan, task.plan.config
    dtype = DTYPES[config.mixed_precision]
    say(f"Nothing is wrong: {config.method} on {plan.base.name}, {task.describe_data()}")
    if config.method == "none":  # no adapter, so nothing of the UNet to count
        _say_lines(task.dry_lines())
        return
    estimate = training_estimate(
        plan.base,
        config.method,
        plan.options,
        resolution=plan.resolution,
        batch_size=task.images_per_pass(),
        gradient_checkpointing=config.gradient_checkpointing,
        weight_bytes=dtype.itemsize,
        optimizer_bytes=optimizer_state_bytes(config),
    )
    device = resolve_device(config.device)
    say(f"  trainable parameters  {estimate['trainable_parameters']:,}")
    _say_lines(task.dry_lines())
    if estimate["step_flops"] is None:
        say(f"  memory and time       unknown: {estimate['note']}")
        return
    seconds = estimate["step_flops"] * config.gradient_accumulation * config.steps / measure_throughput(device, dtype)
    say(f"  memory                {size(estimate['total'])}")
    for part in ("weights", "trainable_and_optimizer", "activations"):
        say(f"    {part.replace('_', ' '):<24} {size(estimate[part])}")
    say(f"  compute               {estimate['step_flops'] / 1e9:,.1f} GFLOP per step")
    say(f"  time on this {device:<9} at least {duration(seconds)} for {config.steps} steps, at its speed in matrix products")


def _say_lines(lines: list[str]) -> None:
    """Print each on a line of its own, indented."""
    for line in lines:
        say(f"  {line}")


# --- What was asked for ----------------------------------------------------------------------------------------------


def _check_method(name: str, options: MethodOptions) -> None:
    """Raise UserError or ValueError if the method does not have an option."""
    if name != MAGNITUDE:
        resolve_options(name, options)
    elif options.blocks is not None or options.rank is not None:
        raise UserError("magnitude re-fitting has neither blocks nor rank")


def _readable(name: str, options: MethodOptions) -> MethodOptions:
    """Return the options without those that the method does not have."""
    has = METHODS[name].options if name in METHODS else frozenset()
    return replace(options, blocks=options.blocks if "blocks" in has else None, rank=options.rank if "rank" in has else None)


# --- The model without storage ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapted:
    """A UNet on the meta device, and what saves its trainable parameters: a PeftModel around it, or itself."""

    unet: Any  # a UNet2DConditionModel, whose bases mypy cannot see
    model: nn.Module


def _meta_unet(base: Base) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(base.config("unet"))


def _adapt(base: Base, method: str, options: MethodOptions, dtype: torch.dtype = torch.float32) -> _Adapted:
    """Put a method, or the magnitudes, into the base's UNet with frozen weights in `dtype`, ready to train."""
    unet = _meta_unet(base)
    is_full = method != MAGNITUDE and METHODS[method].config is None
    if not is_full:  # weights that are trained stay in float32
        for parameter in unet.parameters():
            parameter.data = parameter.data.to(dtype)
    try:
        if method == MAGNITUDE:
            model: nn.Module = get_peft_model(unet.requires_grad_(False), magnitude_config(options.targets))
        else:
            model = add_adapter(unet, method, options)
    except ValueError as error:
        raise UserError(f"method {method} does not fit {base.name}: {error}.") from error
    unet.train()
    return _Adapted(unet, model)


def count_layers(unet: nn.Module, endings: tuple[str, ...]) -> int:
    """Count the linear layers whose names end in one of these module names."""
    dotted = tuple(f".{ending}" for ending in endings)
    return sum(isinstance(module, nn.Linear) and f".{name}".endswith(dotted) for name, module in unet.named_modules())


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _inspect_method(base: Base, name: str, options: MethodOptions, resolution: int, batch_size: int) -> dict[str, Any]:
    adapted = _adapt(base, name, options)
    row: dict[str, Any] = {
        "trainable_parameters": _numel(trainable_parameters(adapted.model).values()),
        "adapter_bytes": safetensors_bytes(_saved_state(adapted.model)),
    }
    cost = _step_cost(base, adapted, resolution, batch_size)
    method = METHODS.get(name)
    return (
        row
        | {
            "step_flops": cost and cost.flops,
            "saved_bytes": cost and cost.activation_bytes,
            "default_learning_rate": method and method.learning_rate,
            "lora_exact": method is not None and method.lora_exact,
        }
        | _note(adapted)
    )


def _note(adapted: _Adapted) -> dict[str, str]:
    """Return a note on why a method's figures cannot be counted on this machine; empty where they can."""
    if _runs_own_kernel(adapted.unet):
        return {"note": "FLOPs and memory cannot be counted with PEFT's CUDA extension for BOFT"}
    return {}


def _runs_own_kernel(unet: nn.Module) -> bool:
    """Return whether a compiled extension, which needs real tensors, computes a layer."""
    return any(getattr(module, "fbd_cuda_available", False) for module in unet.modules())


# --- Size on disk ----------------------------------------------------------------------------------------------------


def _saved_state(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, PeftModel):
        return model.state_dict()
    # save_embedding_layers: its default asks the hub about the base
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """Compute the exact size of the file that safetensors writes for these tensors in float32.

    Its layout: 8 bytes for the header's length, the header (compact JSON, tensors by name, padded to 8), the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + FLOAT32_BYTES * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def _step_cost(
    base: Base,
    adapted: _Adapted,
    resolution: int,
    batch_size: int,
    half: bool = False,
    gradient_checkpointing: bool = False,
) -> StepCost | None:
    """Count a step of the base's UNet at this size, which uses the UNet up; None where it needs real tensors."""
    if _runs_own_kernel(adapted.unet):
        return None
    side, unet = resolution // base.latent_scale, adapted.unet.config
    latents = (batch_size, unet.in_channels, side, side)
    text = (batch_size, base.config("text_encoder")["max_position_embeddings"], unet.cross_attention_dim)
    return count_step(adapted.unet, latents, text, half, gradient_checkpointing)
