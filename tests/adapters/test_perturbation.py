"""Random transformations are at the distance asked for: by the drift of the layer, and by dense matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor

from etherdiff.adapters import EtherConfig
from etherdiff.adapters.analysis import adapter_drift, distance_problem, perturb_adapter
from etherdiff.adapters.baselines import away_from_identity
from etherdiff.adapters.ether import REFLECTION_DISTANCE
from etherdiff.adapters.layers import scaled_skew
from etherdiff.adapters.methods import METHODS, MethodOptions, add_adapter
from etherdiff.adapters.reflection import at_angle
from etherdiff.config import PERTURB_METHOD_NAMES

SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # 16 features


def normal(number: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + number))


def perturbed(tiny, method: str, distance: float, blocks: int, seed: int = 0):
    model = add_adapter(tiny("unet").model, method, MethodOptions(blocks=blocks))
    perturb_adapter(model, distance, lambda number, shape: normal(number, shape, seed))
    return model


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize(
    ("method", "distance"),
    [
        ("ether", 2.0),
        *(("ether+", d) for d in (0.0, 1e-3, 0.7, math.sqrt(2))),
        ("ether+one-sided", 1.2),
        *(("naive", d) for d in (0.0, 0.5, 30.0)),
        *(("oft", d) for d in (0.0, 1e-3, 1.5, 3.9)),
    ],
)
def test_every_layer_is_at_the_distance(method, distance, blocks, tiny):
    """‖T − I‖ of n blocks at a distance d each is √n d."""
    for drift in adapter_drift(perturbed(tiny, method, distance, blocks)).values():
        expected = pytest.approx(math.sqrt(blocks) * distance, rel=1e-5, abs=1e-6)
        assert drift.input_side == expected
        assert (drift.output_side is not None) == (method == "ether+")
        assert drift.output_side is None or drift.output_side == expected
        assert (drift.weight > 1e-5) == (distance > 0)


@pytest.mark.parametrize(("method", "distance"), [("ether", 2.0), ("ether+one-sided", 0.9), ("naive", 5.0), ("oft", 2.5)])
def test_each_block_of_the_matrix_that_multiplies_the_weight(method, distance, tiny):
    """T of W' = W T is found by solving, since this W is square."""
    model = perturbed(tiny, method, distance, blocks=2)
    layer = model.get_base_model().get_submodule(SQUARE)
    before = layer.get_base_layer().weight.detach().double().clone()
    layer.merge()
    found = torch.linalg.solve(before, layer.get_base_layer().weight.detach().double())
    for block in (slice(0, 8), slice(8, 16)):
        assert float((found[block, block] - torch.eye(8)).norm()) == pytest.approx(distance, rel=1e-3)
    assert float(found[:8, 8:].norm() + found[8:, :8].norm()) < 1e-3


def test_a_seed_gives_the_same_and_layers_differ(tiny):
    one, again, other = (perturbed(tiny, "ether+", 1.0, 1, seed).state_dict() for seed in (0, 0, 1))
    vectors = [name for name in one if "ether_" in name]
    assert all(torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name]) for name in vectors)
    assert len({tuple(one[name].flatten()[:4].tolist()) for name in vectors}) == len(vectors)


@pytest.mark.parametrize(
    ("method", "distance", "said"),
    [
        ("ether", 1.0, "always at 2 from the identity, not 1"),
        ("ether+", 1.5, "up to 1.41421"),
        ("oft", 4.0, "below 4 "),  # blocks of 4: 2 √4
        ("naive", -1.0, "not -1"),
    ],
)
def test_a_distance_that_cannot_be_is_refused(method, distance, said, tiny):
    model = add_adapter(tiny("unet").model, method, MethodOptions(blocks=4))
    assert said in str(distance_problem(model, distance))
    with pytest.raises(ValueError, match="identity"):
        perturb_adapter(model, distance, normal)


def test_blocks_of_one_feature(tiny):
    """There is no angle between numbers, and no skew number to draw."""
    skew = scaled_skew(torch.zeros(3, 0), 1, 0.0)
    assert skew.shape == (3, 0)
    model = get_peft_model(tiny("mlp").model, EtherConfig(blocks=12, two_sided=False, target_modules=["first"]))
    assert "up to 0" in str(distance_problem(model, 0.5))
    perturb_adapter(model, 0.0, normal)
    assert adapter_drift(model)["first"].input_side == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 9), st.floats(0, 1), st.integers(0, 10**6))
def test_each_formula_against_dense_matrices(blocks, size, share, seed):
    """share: of the largest distance that there is."""
    eye = torch.eye(size, dtype=torch.float64)
    first, second = (torch.randn(blocks, size, generator=torch.Generator().manual_seed(seed + n)).double() for n in (0, 1))
    unit = first / first.norm(dim=1, keepdim=True)
    v = at_angle(first, second, math.asin(share))
    relaxed = eye - unit[:, :, None] * unit[:, None] + v[:, :, None] * v[:, None]
    assert torch.allclose((relaxed - eye).norm(dim=(1, 2)), torch.tensor(math.sqrt(2) * share).double(), atol=1e-9)
    entries = torch.randn(blocks, size * (size - 1) // 2, generator=torch.Generator().manual_seed(seed)).double()
    distance = 0.99 * share * 2 * math.sqrt(size - size % 2)
    for row in scaled_skew(entries, size, distance):
        upper = torch.zeros(size, size, dtype=torch.float64)
        upper[torch.triu_indices(size, size, 1).unbind()] = row
        skew = upper - upper.T
        rotation = torch.linalg.solve(eye + skew, eye - skew, left=False)
        assert float((rotation - eye).norm()) == pytest.approx(distance, rel=1e-9, abs=1e-12)
        assert torch.allclose(rotation @ rotation.T, eye, atol=1e-9)
    free = torch.randn(blocks, size, size, generator=torch.Generator().manual_seed(seed)).double()
    assert torch.allclose((away_from_identity(free, 7 * share) - eye).norm(dim=(1, 2)), torch.tensor(7 * share).double())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_the_methods_that_perturb_offers_are_those_with_random_transformations(method, tiny):
    model = add_adapter(tiny("unet").model, method, MethodOptions(rank=4 if method == "vera" else None))
    known = "could be random" not in str(distance_problem(model, REFLECTION_DISTANCE))
    assert known == (method in PERTURB_METHOD_NAMES)
