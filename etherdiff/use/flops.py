"""Count the FLOPs and the saved bytes of a training step from its shapes, and time what a device reaches."""

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from etherdiff.system.terminal import warn

THROUGHPUT_SIDE = {"cpu": 512, "mps": 2048, "cuda": 8192}  # enough to fill the device, little enough to be quick
THROUGHPUT_SECONDS = 0.2


@dataclass(frozen=True)
class StepCost:
    """One forward and backward. activation_bytes: the most that is saved for backward at one time."""

    flops: int
    activation_bytes: int


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
        saved, flops = _SavedBytes(iterate_tensors(unet)), _Flops()
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
    """Count LU decomposition, 2/3 n³, and two triangular solves, 2 n² per right-hand side; a (..., n, n)."""
    return 2 * a.numel() * a[-1] // 3 + 2 * a[-1] * b.numel()


def _lu_solve_flops(lu: torch.Size, pivots: torch.Size, b: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count two triangular solves with a decomposition that exists already."""
    return 2 * lu[-1] * b.numel()


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Count the scores, and the means of the values that they weight; shapes (batch, heads, tokens, width)."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _attention_backward_flops(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Count the scores again, and the gradients of scores, values, queries and keys."""
    return 2 * query[:-1].numel() * key[-2] * (3 * query[-1] + 2 * value[-1])


def _attention_formulas() -> dict[Any, Callable[..., int]]:
    """Return the formulas of the fused attentions that this torch has. Its own registry lacks the CPU's before 2.15."""
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
"""Pattern in the names of operators that multiply or decompose matrices."""


class _Flops(TorchDispatchMode):
    """Adds up FLOP formulas. torch's FlopCounterMode does so by module, which takes half as long again.

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
    """Replaces torch's checkpoint: keeps a block's inputs, and counts the work of computing it again."""

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
    """Normalises in float32, as CUDA's autocast does and the CPU's does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.group_norm, F.layer_norm):
            args = [value.float() if isinstance(value, Tensor) else value for value in args]
            kwargs = {k: v.float() if isinstance(v, Tensor) else v for k, v in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _cuda_like_autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16), _Float32Norms():
        yield


def iterate_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters and buffers."""
    yield from model.parameters()
    yield from model.buffers()


def measure_throughput(device: str, dtype: torch.dtype) -> float:
    """Return FLOP/s of a square matrix product on the device, timed for a fifth of a second.

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
