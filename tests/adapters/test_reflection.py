"""reflection.py against the paper's formulas with every matrix built, in float64."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from etherdiff.adapters.reflection import FEW_TOKENS, ReflectedLinear, left_right, normalise, update_factors

TOKENS = [1, 2, 3, 17, FEW_TOKENS - 1, FEW_TOKENS, FEW_TOKENS + 1, 300]
KINDS = [(relaxed, two_sided) for relaxed in (False, True) for two_sided in (False, True)]
KIND_NAMES = ["ether", "ether-two-sided", "ether+one-sided", "ether+"]

checked = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
checked_briefly = settings(checked, max_examples=40)


class Case(NamedTuple):
    """The arguments of ReflectedLinear."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    u: Tensor
    v: Tensor | None
    u_out: Tensor | None
    v_out: Tensor | None

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self[3:]


def make(
    seed: int,
    shape: tuple[int, ...],
    features: tuple[int, int],
    blocks: int,
    relaxed: bool,
    two_sided: bool,
    bias: float | None = None,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """A layer of (in, out) `features` with N(0, 1/in) weights and inputs of the given rank; all else is normal."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    d_in, d_out = features
    x = normal(math.prod(shape), d_in) if rank is None else normal(math.prod(shape), rank) @ normal(rank, d_in)
    side_in, side_out = (blocks, d_in // blocks), (blocks, d_out // blocks)
    return Case(
        x.reshape(*shape, d_in),
        normal(d_out, d_in) / math.sqrt(d_in),
        None if bias is None else bias * normal(d_out),
        normal(*side_in),
        normal(*side_in) if relaxed else None,
        normal(*side_out) if two_sided else None,
        normal(*side_out) if relaxed and two_sided else None,
    )


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype = torch.float32, largest: int = 64) -> Case:
    blocks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    features = draw(st.tuples(*[st.integers(1, largest // blocks).map(lambda size: size * blocks)] * 2))
    tokens = draw(st.sampled_from(TOKENS) | st.integers(1, 300))
    shapes = [(tokens,), (1, tokens), (tokens, 1, 1)] + [(2, tokens // 2)] * (tokens % 2 == 0) + [()] * (tokens == 1)
    relaxed, two_sided = draw(st.sampled_from(KINDS))
    return make(
        draw(st.integers(0, 2**32 - 1)),
        draw(st.sampled_from(shapes)),
        features,
        blocks,
        relaxed,
        two_sided,
        bias=draw(st.sampled_from([None, 0.0, 1.0, 1e3, 1e6])),
        rank=draw(st.sampled_from([None, 1, 2])),
        dtype=dtype,
    )


def size_of_terms(case: Case) -> float:
    """What ‖y‖ would be, did its terms not cancel: those of x and W where they are unrelated, plus the bias's."""
    x, weight = case.x.double(), case.weight.double()
    product = x.norm() * weight.norm() / math.sqrt(weight.shape[1])
    bias = 0.0 if case.bias is None else case.bias.double().norm() * math.sqrt(x.numel() / x.shape[-1])
    return float(2 * product + bias)


@checked
@given(case=cases())
def test_forward_in_float32_is_the_dense_formula_to_1e_6(case, dense, relative_error):
    """Where y is not the small difference of large terms, which no float32 arithmetic resolves (next test)."""
    reference = dense.forward(*case)
    assume(reference.norm() > 0.2 * size_of_terms(case))
    y = ReflectedLinear.apply(*case)
    assert y.shape == reference.shape
    assert y.dtype == torch.float32
    assert relative_error(y, reference) <= 1e-6


@checked
@given(case=cases())
def test_forward_error_is_1e_6_of_its_terms_even_where_they_cancel(case, dense):
    """Every draw: also those where H̃ W H x + b almost vanishes, as where u and v are orthogonal, a projection."""
    error = (ReflectedLinear.apply(*case).double() - dense.forward(*case)).norm()
    assert error <= 1e-6 * math.sqrt(case.weight.shape[1]) * size_of_terms(case)


def trainable(case: Case) -> Case:
    x, *rest = case
    tensors = [None if t is None else t.clone().requires_grad_() for t in (x, *case.vectors)]
    return Case(tensors[0], *rest[:2], *tensors[1:])


def gradients(case: Case, formula, out_gradient: Tensor) -> list[Tensor]:
    case = trainable(case)
    wanted = [t for t in (case.x, *case.vectors) if t is not None]
    y = formula(*case)
    return torch.autograd.grad(y, wanted, out_gradient.to(y.dtype))


@checked_briefly
@given(case=cases(dtype=torch.float64))
def test_gradients_in_float64_are_autograds_of_the_dense_formula(case, dense):
    out_gradient = torch.randn(*case.x.shape[:-1], len(case.weight), dtype=torch.float64)
    actual = gradients(case, ReflectedLinear.apply, out_gradient)
    reference = gradients(case, dense.forward, out_gradient)
    bias = 1.0 if case.bias is None else 1 + float(case.bias.abs().max())
    for got, expected in zip(actual, reference, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11 * bias * (1 + float(expected.norm())))


@pytest.mark.parametrize("tokens", [5, FEW_TOKENS + 5])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(("relaxed", "two_sided"), KINDS, ids=KIND_NAMES)
def test_gradients_in_float32(relaxed, two_sided, blocks, tokens, dense, relative_error):
    case = make(0, (tokens,), (48, 40), blocks, relaxed, two_sided, bias=1.0)
    out_gradient = torch.randn(tokens, 40)
    actual = gradients(case, ReflectedLinear.apply, out_gradient)
    reference = gradients(case, dense.forward, out_gradient)
    assert max(map(relative_error, actual, reference)) <= 2e-6


@pytest.mark.parametrize(("dtype", "bias", "most"), [(torch.float32, 1e3, 2e-6), (torch.bfloat16, 30.0, 1e-2)])
@pytest.mark.parametrize("tokens", [5, FEW_TOKENS + 5])
def test_gradients_do_not_suffer_from_a_large_bias(tokens, dtype, bias, most, dense, relative_error):
    """No gradient depends on the bias at all."""
    x, weight, b, *rest = make(0, (tokens,), (48, 40), 1, True, True, bias=bias)
    case = Case(x.to(dtype), weight.to(dtype), b.to(dtype), *rest)
    out_gradient = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    actual = gradients(case, ReflectedLinear.apply, out_gradient)
    reference = gradients(case, dense.forward, out_gradient)
    assert max(map(relative_error, actual, reference)) <= most


@pytest.mark.parametrize("tokens", [2, FEW_TOKENS + 1])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("relaxed", "two_sided"), KINDS, ids=KIND_NAMES)
def test_gradcheck(relaxed, two_sided, blocks, tokens):
    case = make(1, (tokens,), (4, 6), blocks, relaxed, two_sided, bias=1.0, dtype=torch.float64)
    case = trainable(case)
    assert torch.autograd.gradcheck(ReflectedLinear.apply, tuple(case), fast_mode=tokens > 2)


@pytest.mark.parametrize("tokens", [3, FEW_TOKENS + 3])
@pytest.mark.parametrize(("relaxed", "two_sided"), KINDS, ids=KIND_NAMES)
def test_gradients_of_the_vectors_do_not_need_the_inputs(relaxed, two_sided, tokens):
    """The first adapted layer's input needs no gradient; leaving it out changes no other."""
    case = trainable(make(2, (tokens,), (8, 12), 2, relaxed, two_sided, bias=1.0, dtype=torch.float64))
    vectors = [t for t in case.vectors if t is not None]
    whole = torch.autograd.grad(ReflectedLinear.apply(*case).square().sum(), vectors)
    without = torch.autograd.grad(ReflectedLinear.apply(case.x.detach(), *case[1:]).square().sum(), vectors)
    for a, b in zip(whole, without, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_second_derivatives_are_refused():
    case = trainable(make(0, (3,), (8, 12), 1, True, True))
    (first,) = torch.autograd.grad(ReflectedLinear.apply(*case).square().sum(), case.u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens_at_all_as_for_a_linear_layer(shape):
    case = trainable(make(0, shape, (8, 12), 2, True, True, bias=1.0))
    y = ReflectedLinear.apply(*case)
    assert y.shape == (*shape, 12)
    y.sum().backward()
    assert case.x.grad.shape == case.x.shape
    assert not case.u.grad.any()


@pytest.mark.parametrize("view", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("tokens", [6, FEW_TOKENS + 6])
def test_inputs_that_are_not_contiguous_and_are_left_alone(view, tokens, dense, relative_error):
    case = make(0, (tokens, 2), (8, 12), 2, True, True, bias=1.0)
    x = {
        "transposed": case.x.transpose(0, 1),
        "strided": case.x[::2],
        "expanded": case.x[:, :1].expand(tokens, 3, 8),
    }[view]
    before, weight, bias = x.clone(), case.weight.clone(), case.bias.clone()
    # GPT-2 keeps the weight transposed
    for stored in (case.weight, case.weight.T.contiguous().T):
        y = ReflectedLinear.apply(x, stored, *case[2:])
        assert relative_error(y, dense.forward(x, *case[1:])) <= 1e-6
    assert torch.equal(x, before)
    assert torch.equal(case.weight, weight)
    assert torch.equal(case.bias, bias)


@checked
@given(case=cases(dtype=torch.float64))
def test_update_factors_multiply_to_the_dense_update(case, dense):
    down, up = update_factors(case.weight, *case.vectors)
    blocks = len(case.u)
    rank = blocks * (1 if case.v is None else 2) * (1 if case.u_out is None else 2)
    assert down.shape == (rank, case.weight.shape[1])
    assert up.shape == (len(case.weight), rank)
    torch.testing.assert_close(up @ down, dense.update(case.weight, *case.vectors), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("relaxed", "two_sided"), KINDS, ids=KIND_NAMES)
def test_update_factors_are_differentiable_in_everything(relaxed, two_sided):
    case = make(3, (1,), (4, 6), 2, relaxed, two_sided, dtype=torch.float64)
    tensors = [None if t is None else t.requires_grad_() for t in (case.weight, *case.vectors)]
    assert torch.autograd.gradcheck(update_factors, tensors)


def matrix(u: Tensor, v: Tensor | None) -> Tensor:
    """H from the transform under test."""
    left, right = left_right(normalise(u, v), u.dtype)
    return torch.eye(u.numel(), dtype=u.dtype) + left.T @ right


@st.composite
def vector_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    size = (draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    u, v = torch.randn(2, *size, generator=generator, dtype=torch.float64)
    return u, v


@checked_briefly
@given(pair=vector_pairs())
def test_ether_is_a_reflection_in_each_block(pair, dense):
    u, _ = pair
    n, d = len(u), u.numel()
    H, eye = matrix(u, None), torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(H, dense.side(u, None))
    torch.testing.assert_close(H @ H.T, eye)
    torch.testing.assert_close(H @ H, eye)
    blocks = torch.stack([H[i : i + d // n, i : i + d // n] for i in range(0, d, d // n)])
    torch.testing.assert_close(torch.linalg.det(blocks), -torch.ones(n, dtype=torch.float64))
    assert float((H - eye).norm()) == pytest.approx(2 * math.sqrt(n))


@checked_briefly
@given(pair=vector_pairs())
def test_ether_plus_keeps_the_distance_the_paper_bounds(pair, dense):
    u, v = pair
    H = matrix(u, v)
    torch.testing.assert_close(H, dense.side(u, v))
    assert float((H - torch.eye(u.numel())).norm()) <= math.sqrt(2 * len(u)) + 1e-12


def test_ether_plus_reaches_that_bound_where_it_is_singular():
    eye = torch.eye(4, dtype=torch.float64)
    u, v = eye[:2].reshape(2, 4), eye[2:].reshape(2, 4)  # orthogonal, block by block
    H = matrix(u, v)
    assert torch.linalg.matrix_rank(H) == 6
    assert float((H - torch.eye(8)).norm()) == pytest.approx(2)


@checked_briefly
@given(pair=vector_pairs(), factor=st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_only_directions_count(pair, factor):
    u, v = pair
    torch.testing.assert_close(matrix(factor * u, v), matrix(u, v))
    torch.testing.assert_close(matrix(u, v / factor), matrix(u, v))
    torch.testing.assert_close(matrix(factor * u, None), matrix(u, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 40, FEW_TOKENS + 40])
@pytest.mark.parametrize("blocks", [1, 4])
def test_ether_plus_starts_as_the_identity_bit_for_bit(dtype, tokens, blocks):
    case = make(0, (tokens,), (48, 40), blocks, True, True, bias=1e3)
    x, weight, bias = (t.to(dtype) for t in case[:3])
    start = [case.u, -case.u, case.u_out, -case.u_out]
    y = ReflectedLinear.apply(x, weight, bias, *start)
    # the same product as the layer itself, to which the bias is added last
    assert torch.equal(y, torch.nn.functional.linear(x, weight) + bias)
    down, up = update_factors(weight, *start)
    assert not (up @ down).any()


@pytest.mark.parametrize("relaxed", [False, True])
def test_parameters_do_not_grow_with_the_blocks(relaxed):
    counts = {
        n: sum(t.numel() for t in make(0, (1,), (48, 24), n, relaxed, True).vectors if t is not None) for n in (1, 2, 4, 8)
    }
    assert set(counts.values()) == {(48 + 24) * (2 if relaxed else 1)}


@pytest.mark.parametrize("relaxed", [False, True])
def test_a_vector_of_zeros_gives_no_nan(relaxed):
    case = make(0, (3,), (8, 12), 2, relaxed, True)
    vectors = [None if t is None else torch.zeros_like(t) for t in case.vectors]
    case = trainable(Case(*case[:3], *vectors))
    ReflectedLinear.apply(*case).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in case.vectors if t is not None)


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor made that is no view of one of `known`."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.made: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.made.append((str(func), t.shape))
        return out


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(("relaxed", "two_sided"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("tokens", [3, FEW_TOKENS + 1])
def test_no_matrix_of_features_by_features_is_ever_made(relaxed, two_sided, blocks, tokens):
    case = trainable(make(0, (tokens,), (1440, 1600), blocks, relaxed, two_sided, bias=1.0))
    with Allocations(case.weight) as allocations:
        ReflectedLinear.apply(*case).sum().backward()
        update_factors(case.weight, *case.vectors)
    assert len(allocations.made) > 20
    assert any("mm" in name for name, _ in allocations.made)
    # the tokens and the vectors of both sides, at the wider side: far below in², out², in²/blocks or in x out
    most = (tokens + 8 * blocks) * 1600
    assert most < 1440**2 / blocks
    assert max(shape.numel() for _, shape in allocations.made) <= most


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(("relaxed", "two_sided"), KINDS, ids=KIND_NAMES)
@pytest.mark.parametrize("tokens", [3, FEW_TOKENS + 1])
def test_autograd_keeps_the_input_and_k_numbers_per_token_and_side(relaxed, two_sided, blocks, tokens):
    case = trainable(make(0, (2, tokens), (48, 40), blocks, relaxed, two_sided, bias=1.0))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ReflectedLinear.apply(*case)
    parameters = [t.data_ptr() for t in (case.x, case.weight, *case.vectors) if t is not None]
    activations = [t for t in saved if t.data_ptr() not in parameters]
    k, sides = blocks * (2 if relaxed else 1), 2 if two_sided else 1
    assert [t.shape for t in activations] == [(k, 2 * tokens)] * sides
    for activation in activations:  # none is a window of something larger
        assert activation.untyped_storage().nbytes() == 4 * 2 * tokens * k
    assert len(saved) == len(parameters) + sides


def test_computing_with_shapes_alone_leaves_nothing_behind():
    """`etherdiff inspect` runs a step without numbers; what is computed afterwards in the same process has them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from etherdiff.adapters import reflection

    reflection._MIXINGS.clear()
    vectors = torch.randn(1, 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        reflection.left_right(reflection.normalise(torch.randn(1, 6), None), torch.float32)
    left, right = reflection.left_right(reflection.normalise(vectors, None), torch.float32)
    unit = vectors / vectors.norm()
    torch.testing.assert_close(left.T @ right, -2 * unit.T @ unit)
