"""What a method would train and what a step of it would cost, counted on the base's architecture: no weight is read.

The UNet is built without storage and one training step runs through it on shapes alone: forward with the
mean-squared loss, and backward. Counted is the UNet's step. Text and images are encoded before training; the S2I
control encoder, the optimizer's update and elementwise work (which moves memory rather than computes) are left out.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from rich import box
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from etherdiff.adapters.methods import (
    METHODS,
    TARGETS,
    MethodOptions,
    add_adapter,
    magnitude_config,
    resolve_options,
    trainable_parameters,
)
from etherdiff.config import InspectOptions
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import Base
from etherdiff.system.errors import Problems, UserError
from etherdiff.system.terminal import warn

TASK_TARGETS = {"dreambooth": "attention", "s2i": "attention+geglu"}
MAGNITUDE = "magnitude"  # re-fitting after OFT: inspected like a method, though it is not one
FLOAT32_BYTES = 4
THROUGHPUT_SIDE = {"cpu": 512, "mps": 2048, "cuda": 8192}  # enough to fill the device, little enough to be quick
THROUGHPUT_SECONDS = 0.2


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
    is_local = options.base == "tiny" or Path(options.base).expanduser().exists()
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
    """What a training run would take: trainable_parameters, step_flops, and memory in bytes by what holds it.

    batch_size: images in one forward pass, those of prior preservation included. weight_bytes: per frozen weight, 4 or
    2; with 2 the step computes in half precision as under CUDA's autocast. optimizer_bytes: per trainable parameter.

    total = weights (frozen) + trainable_and_optimizer (float32 value, gradient, optimizer state) + activations (what
    autograd saves; with gradient checkpointing the blocks' inputs and the most that one block saves when it is computed
    again). What kernels and the allocator need on top is not in it. activations, total and step_flops are None, with a
    "note", where a step cannot be counted.
    """
    half = weight_bytes < FLOAT32_BYTES
    adapted = _adapt(base, method, options, torch.bfloat16 if half else torch.float32)
    trainable = _numel(trainable_parameters(adapted.model).values())
    frozen = sum(t.nbytes for t in _tensors(adapted.model) if not t.requires_grad)
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


def measure_throughput(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product on the device, timed for a fifth of a second.

    A training step reaches only part of it, so FLOPs divided by this is the least time a step can take.
    """
    kind = torch.device(device).type
    side = THROUGHPUT_SIDE.get(kind, THROUGHPUT_SIDE["cpu"])
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    _synchronised_product(matrix)  # the first one also loads and chooses kernels
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < THROUGHPUT_SECONDS:
        _synchronised_product(matrix)
        products += 1
    return products * 2 * side**3 / (time.perf_counter() - start)


def _synchronised_product(matrix: Tensor) -> None:
    (matrix @ matrix)[0, 0].item()


def render_inspection(result: dict[str, Any]) -> Table:
    """The result of `inspect_base` for a person to read."""
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


# --- What was asked for ----------------------------------------------------------------------------------------------


def _check_method(name: str, options: MethodOptions) -> None:
    """UserError or ValueError if the method does not have an option."""
    if name != MAGNITUDE:
        resolve_options(name, options)
    elif options.blocks is not None or options.rank is not None:
        raise UserError("magnitude re-fitting has neither blocks nor rank")


def _readable(name: str, options: MethodOptions) -> MethodOptions:
    """The options without those that the method does not have."""
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
    """The linear layers whose names end in one of these module names."""
    dotted = tuple(f".{ending}" for ending in endings)
    return sum(isinstance(module, nn.Linear) and f".{name}".endswith(dotted) for name, module in unet.named_modules())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


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
    """What a reader has to know about a method's figures on this machine, if anything."""
    if _runs_own_kernel(adapted.unet):
        return {"note": "FLOPs and memory cannot be counted with PEFT's CUDA extension for BOFT"}
    return {}


def _runs_own_kernel(unet: nn.Module) -> bool:
    """Whether a compiled extension computes a layer, which needs real tensors."""
    return any(getattr(module, "fbd_cuda_available", False) for module in unet.modules())


# --- Size on disk ----------------------------------------------------------------------------------------------------


def _saved_state(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, PeftModel):
        return model.state_dict()
    # save_embedding_layers: its default asks the hub about the base
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def safetensors_bytes(tensors: dict[str, Tensor]) -> int:
    """The exact size of the file that safetensors writes for these tensors in float32.

    Its layout: 8 bytes for the header's length, the header (compact JSON, tensors by name, padded to 8), the data.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + FLOAT32_BYTES * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


# --- A step on shapes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepCost:
    """One forward and backward. activation_bytes: the most that is saved for backward at one time."""

    flops: int
    activation_bytes: int


def _step_cost(
    base: Base,
    adapted: _Adapted,
    resolution: int,
    batch_size: int,
    half: bool = False,
    gradient_checkpointing: bool = False,
) -> StepCost | None:
    """A step of the base's UNet at this size, which uses the UNet up; None where only real tensors would do."""
    if _runs_own_kernel(adapted.unet):
        return None
    side, unet = resolution // base.latent_scale, adapted.unet.config
    latents = (batch_size, unet.in_channels, side, side)
    text = (batch_size, base.config("text_encoder")["max_position_embeddings"], unet.cross_attention_dim)
    return count_step(adapted.unet, latents, text, half, gradient_checkpointing)


def count_step(
    unet: Any,
    latents: tuple[int, ...],
    text: tuple[int, ...],
    half: bool = False,
    gradient_checkpointing: bool = False,
) -> StepCost:
    """Count one step from its inputs' shapes.

    unet: a UNet2DConditionModel on the meta device; it is left with fake tensors. They claim to be on the CPU, so that
    attention is fused and autocast works as in training. On the meta device attention would fall apart into plain
    products, and its whole map would be saved.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet.to_empty(device="cpu")
        saved, flops = _SavedBytes(_tensors(unet)), _Flops()
        checkpoint = _CountingCheckpoint(saved, flops)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing(checkpoint)
        dtype = torch.bfloat16 if half else torch.float32
        inputs = (
            torch.empty(latents, dtype=dtype),
            torch.empty(latents[:1], dtype=torch.long),
            torch.empty(text, dtype=dtype),
        )
        with flops:
            with saved, _cuda_like_autocast() if half else contextlib.nullcontext():
                loss = unet(*inputs, return_dict=False)[0].float().square().mean()
            loss.backward()
    for operator in sorted(flops.uncounted):
        _warn_of_uncounted(operator)
    return StepCost(flops.total + checkpoint.recomputed_flops, saved.total + checkpoint.largest_block)


def _solve_flops(a: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """LU decomposition, 2/3 n³, and two triangular solves, 2 n² per right-hand side; a (..., n, n)."""
    return 2 * a.numel() * a[-1] // 3 + 2 * a[-1] * b.numel()


def _lu_solve_flops(lu: torch.Size, pivots: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Two triangular solves with a decomposition that is there already."""
    return 2 * lu[-1] * b.numel()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Scores, and their mean of the values; shapes (batch, heads, tokens, width)."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """The scores once more, and the gradients of scores, values, queries and keys."""
    return 2 * query[:-1].numel() * key[-2] * (3 * query[-1] + 2 * value[-1])


def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """Of torch's fused attentions, those that this release has. Its own registry lacks the CPU's before 2.15."""
    names = [f"{kind}_attention" for kind in ("flash", "efficient", "cudnn")]
    names += ["flash_attention_for_cpu", "fused_attention_overrideable"]
    formulas: dict[str, Callable[..., int]]
    formulas = {f"_scaled_dot_product_{name}": _attention_flops for name in [*names, "attention_math_for_mps"]}
    formulas |= {f"_scaled_dot_product_{name}_backward": _attention_backward_flops for name in names}
    return {getattr(torch.ops.aten, name): of for name, of in formulas.items() if hasattr(torch.ops.aten, name)}


OWN_FORMULAS = {
    # of OFT's and BOFT's Cayley transform and its backward
    torch.ops.aten._linalg_solve_ex: _solve_flops,
    torch.ops.aten.linalg_lu_solve: _lu_solve_flops,
    **_attention_formulas(),
}
FLOP_FORMULAS = {op: shape_wrapper(formula) for op, formula in OWN_FORMULAS.items()} | flop_registry
MATRIX_WORK = re.compile(
    r"(^|_)((add|b|badd|addb)?mm|(add)?mv|v?dot|matmul|(bi|tri)?linear|attention|conv[123]d|conv(olution)?|cdist|lstm|gru|rnn"
    r"|solve|lu|qr|svd|eigh?|eigvalsh?|inv|cholesky|lstsq|(slog)?det)(_|$)"
)
"""In the names of operators that multiply or decompose matrices."""


class _Flops(TorchDispatchMode):
    """Adds up FLOP formulas. So does torch's FlopCounterMode, but by module, which takes half as long again.

    uncounted: the operators that do matrix work and have no formula; `total` leaves them out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = FLOP_FORMULAS.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        elif MATRIX_WORK.search(func.overloadpacket.__name__):
            self.uncounted.add(str(func.overloadpacket))
        return out


@lru_cache  # once for each operator, however many steps are counted
def _warn_of_uncounted(operator: str) -> None:
    warn(f"step_flops leaves {operator} out: torch {torch.__version__} has no FLOP formula for it, nor has etherdiff")


class _SavedBytes(saved_tensors_hooks):
    """Adds up what autograd saves for backward while this is entered: each storage once, `ignored` ones never."""

    def __init__(self, ignored: Iterable[Tensor] = (), seen: Iterable[StorageWeakRef] = ()) -> None:
        super().__init__(self.add, lambda tensor: tensor)
        self.total = 0
        # weak references also keep a freed storage's identity from being given to a new one
        self.seen = {*seen, *(StorageWeakRef(tensor.untyped_storage()) for tensor in ignored)}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self.seen:
            self.seen.add(reference)
            self.total += storage.nbytes()
        return tensor


class _CountingCheckpoint:
    """Stands in for torch's checkpoint: keeps a block's inputs, and counts what computing it again would take."""

    def __init__(self, kept: _SavedBytes, flops: _Flops) -> None:
        self.kept, self.flops = kept, flops
        self.largest_block = self.recomputed_flops = 0

    def __call__(self, block: Any, *inputs: Any) -> Any:
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                self.kept.add(tensor)
        before = self.flops.total
        inside = _SavedBytes(seen=self.kept.seen)
        with inside:
            output = block(*inputs)
        self.recomputed_flops += self.flops.total - before
        self.largest_block = max(self.largest_block, inside.total)
        return output


class _Float32Norms(TorchFunctionMode):
    """Normalises in float32 as CUDA's autocast does, and the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _cuda_like_autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), _Float32Norms():
        yield
