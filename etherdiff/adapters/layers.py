"""The declarations of an adapted layer: how its adapter transforms the weight, its reach, and the LoRA that it equals.

Our own layers declare it themselves (`tuner.UpdateLayer`); PEFT's are wrapped in one of the classes below. Nothing asks a layer
for its class: `methods.METHODS` names the class of every method.
"""

import contextlib
import copy
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from etherdiff.system.errors import UserError

BISECTIONS = 100
FULL_RANK_ROTATIONS = "its rotations change the weights by matrices of full rank"
Draw = Callable[..., Tensor]
"""Standard normal float64 numbers of a shape, given as `draw(*shape)`."""


class Reach(NamedTuple):
    """Range of the distance ‖T - I‖_F of a block's random transformation."""

    lowest: float
    highest: float
    included: bool
    """Whether `highest` itself can be reached."""


class AdapterLayer:
    """A layer and its adapters, each by its name. As it stands, one of PEFT's of a method that only adds to the weight."""

    is_scalable: ClassVar[bool] = False
    """Whether its update can be multiplied by a factor other than 1."""
    why_no_lora: ClassVar[str | None] = "nothing here writes its update as matrices of low rank"
    """Why a LoRA cannot hold its update exactly; None if it can."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Tensors that are saved with the adapter but drawn at random and not trained, by the last part of their names."""
    merges_backwards: ClassVar[bool] = False
    """Whether several adapters have to be merged last first, to equal the forward pass."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    @classmethod
    def of(cls, layer: Any) -> Self:
        """Return what says everything below about the layer of a model; of ours, the layer itself."""
        return cls(layer)

    def in_float64(self) -> Self:
        """Return a copy in float64."""
        return self.of(copy.deepcopy(self.layer).double())

    def holds(self, name: str) -> bool:
        """Return whether the adapter is on this layer."""
        return any(name in getattr(self.layer, names) for names in self.layer.adapter_layer_names)

    def base_weight(self) -> Tensor:
        """Return the weight without its adapters."""
        return self.layer.get_base_layer().weight

    def weight_update(self, name: str) -> Tensor:
        """Return W' - W in the layer's precision, at the scale that was trained. The layer is of no use afterwards."""
        base = self.base_weight().clone()
        self.layer.merge(adapter_names=[name])
        return self.base_weight() - base

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        """Return ‖T - I‖_F on the input and on the output side of W' = T_out W T_in; None where nothing multiplies."""
        return None, None

    def reach(self, name: str) -> Reach | None:
        """Return how far its random transformations can be; None where there are none."""
        return None

    def random_parameters(self, name: str, distance: float, draw: Draw) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield parameters and the values with which each block, on each side, is at this distance."""
        raise NotImplementedError

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Return down (r, in) and up (out, r), with up @ down the update at its present scale."""
        raise NotImplementedError


def norm(matrix: Tensor) -> float:
    """Return ‖M‖_F."""
    return float(torch.linalg.vector_norm(matrix))


def from_identity(matrices: Tensor) -> float:
    """Return ‖T - I‖_F of a matrix, or of diagonal blocks (n, size, size)."""
    return norm(matrices - torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device))


class WholeModel(AdapterLayer):
    """Full fine-tuning: it has no layers of its own, and stands in the table for what it cannot do."""

    is_scalable = True
    why_no_lora = "full fine-tuning changes every weight, not linear layers by a low-rank update"


class LoraLayer(AdapterLayer):
    """W' = W + s B A."""

    is_scalable = True
    why_no_lora = None

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        layer = self.layer
        if not isinstance(layer.get_base_layer(), nn.Linear):
            raise UserError("only LoRA on linear layers can be exported, and this one has others: use `etherdiff merge`.")
        return layer.lora_A[name].weight, layer.scaling[name] * layer.lora_B[name].weight


class VeraLayer(AdapterLayer):
    """W' = W + diag(b) B diag(d) A, with A and B shared by all layers and not trained."""

    why_no_lora = None
    untrained = ("vera_A", "vera_B")

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        layer = self.layer
        down = layer.vera_lambda_d[name][:, None] * layer.vera_A[name][:, : layer.in_features]
        return down, layer.vera_lambda_b[name][:, None] * layer.vera_B[name][: layer.out_features]


class HraLayer(AdapterLayer):
    """W' = W Q, with Q a chain of reflections."""

    why_no_lora = None

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        return from_identity(self._rotation(name)), None

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Factor W Q - W = (W (Q - I) B) Bᵀ, with B an orthonormal basis of the span of the reflections' vectors."""
        basis = torch.linalg.qr(self.layer.hra_u[name].double()).Q
        moved = self._rotation(name).double() @ basis - basis
        return basis.T, self.base_weight().double() @ moved

    def _rotation(self, name: str) -> Tensor:
        return self.layer.get_delta_weight(name)  # PEFT's name for Q itself


class OftLayer(AdapterLayer):
    """W' = W Q, with Q block-diagonal and each block the Cayley transform of a skew matrix."""

    why_no_lora = FULL_RANK_ROTATIONS
    merges_backwards = True  # PEFT 0.21 merges in the opposite order of its forward pass

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        return from_identity(self.layer.get_delta_weight(name)), None

    def reach(self, name: str) -> Reach | None:
        size = self.layer.oft_R[name].block_size
        return Reach(0.0, 2 * math.sqrt(size - size % 2), False)

    def random_parameters(self, name: str, distance: float, draw: Draw) -> Iterator[tuple[nn.Parameter, Tensor]]:
        rotation = self.layer.oft_R[name]
        yield rotation.weight, scaled_skew(draw(*rotation.weight.shape), rotation.block_size, distance)


class BoftLayer(AdapterLayer):
    """W' = diag(s) W Q, with Q a product of permuted block-diagonal rotations."""

    why_no_lora = FULL_RANK_ROTATIONS

    def transformations(self, name: str) -> tuple[float | None, float | None]:
        rotation, scale = self.layer.get_delta_weight(name)
        return from_identity(rotation), norm(scale - 1)


def scaled_skew(entries: Tensor, size: int, distance: float) -> Tensor:
    """Scale the entries (n, size (size - 1) / 2) above the diagonal of skew matrices, so that each Cayley transform is at
    `distance` from the identity.

    Where ±iσ are the eigenvalues of S, those of the Cayley transform of t S are 2 tσ / √(1 + t²σ²) from 1, so that any
    distance below 2 √r can be reached, r the rank of S.
    """
    skew = torch.zeros(len(entries), size, size, dtype=entries.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = entries
    sigma = torch.linalg.svdvals(skew - skew.mT)
    return entries * torch.stack([_cayley_scale(values, distance) for values in sigma])[:, None]


def _cayley_scale(sigma: Tensor, distance: float) -> Tensor:
    """Return the t at which Σ 4 t²σ² / (1 + t²σ²), which grows with t, is distance²; by bisection."""

    def reached(t: Tensor) -> bool:
        squares = (t * sigma).square()
        return float((4 * squares / (1 + squares)).sum()) >= distance**2

    if distance == 0:
        return torch.zeros((), dtype=sigma.dtype)
    low = distance / (2 * torch.linalg.vector_norm(sigma))  # too small: 1 + t²σ² is more than 1
    high = 2 * low
    while not reached(high):
        high = 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return low


@contextlib.contextmanager
def quiet_boft() -> Iterator[None]:
    """Silence PEFT's BOFT, which tries to compile a CUDA extension for every layer and warns each time that it fails.

    The compiler's output goes to stderr, as stdout may be read as JSON.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")
            # PEFT warns of it even where one factor is what was asked for
            warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
            yield
    finally:
        logger.setLevel(level)
