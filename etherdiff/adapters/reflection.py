"""The maths of ETHER and ETHER+ (Bini et al., ICML 2024, section 3) as pure functions on tensors.

Both transforms are the identity plus a term of low rank, and are kept in that form throughout:

    ETHER    H  = I - 2 û ûᵀ        = I + Lᵀ R      L = -2 û             R = û
    ETHER+   H⁺ = I - û ûᵀ + v̂ v̂ᵀ   = I + Lᵀ R      L = ½ [v̂-û; v̂+û]     R = [v̂+û; v̂-û]

The second line is the same matrix written in sums and differences: where v = -u, as at the start of training, v̂+û is zero and
the update vanishes exactly, in any precision; where the update is small, it keeps its relative precision.

Shapes: n blocks of a layer with d features have vectors (n, d/n); L and R are (k, d) with k = n for ETHER and 2n for ETHER+.
`weight` is torch's (out, in). No function here builds a d x d matrix other than a weight.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

EPS = 1e-12  # below this length a vector has no direction, as in F.normalize
FEW_TOKENS = 128  # up to here a copy of the activations costs less than one more pass over the weight


class Vectors(NamedTuple):
    """One side's vectors: u's rows and, for ETHER+ (m = 2), v's below them."""

    unit: Tensor
    """(m n, d/n), each row of unit length."""
    length: Tensor
    """(m n, 1), what was divided away."""
    relaxed: bool
    """ETHER+ rather than ETHER."""


def normalise(u: Tensor, v: Tensor | None) -> Vectors:
    """Divide u and v, (n, d/n), by their lengths: only their directions count. No v: ETHER."""
    rows = u if v is None else torch.cat([u, v])
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min(EPS)
    return Vectors(rows / length, length, v is not None)


def left_right(vectors: Vectors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return L and R, each (k, d), of H = I + Lᵀ R: a reflection (paper eq. 1) or its relaxation (eq. 2)."""
    unit = vectors.unit
    mixing = _mixing(vectors.relaxed, unit.dtype, unit.device)
    rows = (mixing @ unit.reshape(mixing.shape[1], -1)).view(len(mixing), -1, unit.shape[1])
    return _embed(rows).to(dtype).chunk(2)  # type: ignore[return-value]


def vectors_backward(vectors: Vectors, d_left: Tensor, d_right: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return gradients of u and v from those of L and R: the adjoint of `left_right` after `normalise`."""
    unit = vectors.unit
    mixing = _mixing(vectors.relaxed, unit.dtype, unit.device)
    d_rows = _extract(torch.cat([d_left, d_right]).to(unit.dtype), parts=len(mixing))
    d_unit = (mixing.T @ d_rows.reshape(len(mixing), -1)).view(unit.shape)
    across = torch.addcmul(d_unit, unit, (unit * d_unit).sum(-1, keepdim=True), value=-1)
    d_vectors = across / vectors.length
    return d_vectors.chunk(2) if vectors.relaxed else (d_vectors, None)  # type: ignore[return-value]


_MIXINGS: dict[tuple[bool, torch.dtype, torch.device], Tensor] = {}


def _mixing(relaxed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return what makes [L; R] of û, or of [û; v̂]; kept, since every layer of every step asks for it."""
    key = (relaxed, dtype, device)
    if key in _MIXINGS:
        return _MIXINGS[key]
    rows = [[-0.5, 0.5], [0.5, 0.5], [1.0, 1.0], [-1.0, 1.0]] if relaxed else [[-2.0], [1.0]]
    mixing = torch.tensor(rows, dtype=dtype, device=device)
    if type(mixing) is Tensor:  # where only shapes are computed it has no numbers, and must not be kept
        _MIXINGS[key] = mixing
    return mixing


def _embed(blocks: Tensor) -> Tensor:
    """Return rows (parts, n, d/n), one per diagonal block, as rows (parts n, d) that are zero outside their block."""
    parts, n, size = blocks.shape
    if n == 1:
        return blocks.view(parts, size)
    selector = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    return (selector[:, :, None] * blocks[:, :, None, :]).reshape(parts * n, n * size)


def _extract(rows: Tensor, parts: int) -> Tensor:
    """Return the adjoint of `_embed`: from rows (parts n, d) the part (parts, n, d/n) that is in each row's own block."""
    n = len(rows) // parts
    if n == 1:
        return rows
    return rows.reshape(parts, n, n, -1).diagonal(dim1=1, dim2=2).transpose(1, 2)


def update_factors(
    weight: Tensor, u: Tensor, v: Tensor | None, u_out: Tensor | None, v_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return `down` (r, in) and `up` (out, r) with  H̃ W H - W = up @ down,  the weight update as a LoRA of rank r.

    r is n for ETHER, 2n for one-sided ETHER+, twice that with vectors on the output side. Differentiable in all arguments;
    computed in the vectors' precision.
    """
    weight = weight.to(u.dtype)
    left, right = left_right(normalise(u, v), u.dtype)
    up = weight @ left.T
    if u_out is None:
        return right, up
    left_out, right_out = left_right(normalise(u_out, v_out), u.dtype)
    return torch.cat([right, right_out @ weight]), torch.cat([up + left_out.T @ (right_out @ up), left_out.T], dim=1)


def distance_from_identity(u: Tensor, v: Tensor | None) -> float:
    """Return ‖H - I‖_F = ‖Lᵀ R‖_F, by the k x k products of its factors; H is not built."""
    left, right = left_right(normalise(u, v), u.dtype)
    return math.sqrt(max(0.0, float(((left @ left.T) * (right @ right.T)).sum())))


def at_angle(u: Tensor, other: Tensor, angle: float) -> Tensor:
    """Return v, each row at `angle` from the line of u's, towards `other`; all (n, size). At 0 it is −û, ETHER+'s start."""
    unit = u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    if angle == 0:
        return -unit
    across = other - (other * unit).sum(-1, keepdim=True) * unit
    across /= torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    return -(math.cos(angle) * unit + math.sin(angle) * across)


class ReflectedLinear(torch.autograd.Function):
    """y = H̃ W H x + b for a frozen W and b: the same as adding `update_factors`, at the cost of a LoRA of that rank.

    Each transform updates the activations on its side of W by k numbers per token, kept as rows (k, tokens): BLAS projects
    a tall matrix on a few vectors up to three times faster that way round. Autograd keeps x, those numbers and parameters,
    as it does for a LoRA. Not twice differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        u: Tensor,
        v: Tensor | None,
        u_out: Tensor | None,
        v_out: Tensor | None,
    ) -> Tensor:
        """x: (..., in) in the weight's dtype; vectors (n, features/n) in float32. Returns (..., out)."""
        tokens = x.reshape(-1, x.shape[-1])
        left, right = left_right(normalise(u, v), x.dtype)
        t = right @ tokens.T
        y = _product_of_updated(tokens, t, left, weight.T)
        r = None
        if u_out is not None:
            left_out, right_out = left_right(normalise(u_out, v_out), x.dtype)
            r = right_out @ y.T
            y.addmm_(r.T, left_out)
        if bias is not None:
            y += bias  # last: the output side's transform leaves it alone
        ctx.save_for_backward(x, weight, t, r, u, v, u_out, v_out)
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, r, u, v, u_out, v_out = ctx.saved_tensors
        tokens, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1])
        vectors = normalise(u, v)
        left, right = left_right(vectors, x.dtype)
        d_r: Tensor | None = None
        right_out = d_u_out = d_v_out = None
        if r is not None:
            vectors_out = normalise(u_out, v_out)
            left_out, right_out = left_right(vectors_out, x.dtype)
            d_r = left_out @ d_y.T
            d_right_out = torch.addmm(d_r @ tokens, d_r @ t.T, left) @ weight.T
            d_u_out, d_v_out = vectors_backward(vectors_out, r @ d_y, d_right_out)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_moved = _product_of_updated(d_y, d_r, right_out, weight)
            d_t, d_left = left @ d_moved.T, t @ d_moved
            d_x = d_moved.addmm_(d_t.T, right).view(x.shape)
        else:  # as for a text embedding: two thin products instead of the whole one
            d_inner = d_y if d_r is None or right_out is None else torch.addmm(d_y, d_r.T, right_out)
            d_t, d_left = (left @ weight.T) @ d_inner.T, (t @ d_inner) @ weight
        d_u, d_v = vectors_backward(vectors, d_left, d_t @ tokens)
        return d_x, None, None, d_u, d_v, d_u_out, d_v_out


def _product_of_updated(tokens: Tensor, numbers: Tensor | None, rows: Tensor | None, matrix: Tensor) -> Tensor:
    """Return (tokens + numbersᵀ rows) @ matrix, by whichever of the two orders moves less memory; a new tensor."""
    if numbers is None or rows is None:
        return tokens @ matrix
    if len(tokens) <= FEW_TOKENS:
        return torch.addmm(tokens, numbers.T, rows) @ matrix
    return (tokens @ matrix).addmm_(numbers.T, rows @ matrix)
