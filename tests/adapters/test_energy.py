"""Hyperspherical energy against a naive double loop, numbers worked out by hand, and what must leave it alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from etherdiff.adapters import analysis
from etherdiff.adapters.analysis import energy_difference, energy_differences, hyperspherical_energy
from etherdiff.adapters.io import merge_adapter
from etherdiff.adapters.methods import MethodOptions, add_adapter, trainable_parameters


def naive(weight: Tensor, half_space: bool) -> float:
    """Σ_{i≠j} ‖ŵ_i − ŵ_j‖⁻¹ over the neurons, and their opposites in the half-space variant, pair by pair."""
    units = [row / row.norm() for row in weight.double()]
    units += [-unit for unit in units] if half_space else []
    return sum(1 / float((a - b).norm()) for i, a in enumerate(units) for j, b in enumerate(units) if i != j)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(size, size, seed=seed)).Q


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (33, 4)])
def test_against_a_double_loop(shape, half_space):
    weight = 3 * random(*shape)
    assert hyperspherical_energy(weight, half_space) == pytest.approx(naive(weight, half_space), rel=1e-10)


@pytest.mark.parametrize("half_space", [False, True])
def test_chunks_change_nothing(half_space, monkeypatch):
    weight = random(37, 6)
    whole = hyperspherical_energy(weight, half_space)
    for pairs in (1, 37, 100, 37 * 36):
        monkeypatch.setattr(analysis, "CHUNK", pairs)
        assert hyperspherical_energy(weight, half_space) == pytest.approx(whole, rel=1e-12)


def test_by_hand():
    orthonormal = torch.eye(5)  # 20 ordered pairs, √2 apart; with their opposites 80, and 10 of opposites, 2 apart
    assert hyperspherical_energy(orthonormal) == pytest.approx(20 / math.sqrt(2))
    assert hyperspherical_energy(orthonormal, half_space=True) == pytest.approx(80 / math.sqrt(2) + 10 / 2)
    opposite = torch.tensor([[3.0, 0.0], [-0.1, 0.0]])
    assert hyperspherical_energy(opposite) == pytest.approx(2 / 2)
    sixty_degrees = torch.tensor([[1.0, 0.0], [1.0, math.sqrt(3)]])
    assert hyperspherical_energy(sixty_degrees) == pytest.approx(2)
    assert hyperspherical_energy(torch.ones(1, 3)) == 0


def test_neurons_without_a_direction_or_of_one_direction():
    zero_row = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    assert hyperspherical_energy(zero_row) == pytest.approx(6 / math.sqrt(2))
    assert hyperspherical_energy(torch.ones(2, 3)) == pytest.approx(2 / analysis.NEAREST)
    assert math.isnan(hyperspherical_energy(torch.tensor([[1.0, 0.0], [math.nan, 1.0]])))
    assert hyperspherical_energy(torch.zeros(4, 3)) == 0


def test_a_kernels_neurons_are_its_outputs():
    kernel = random(6, 3, 2, 2)
    assert hyperspherical_energy(kernel) == hyperspherical_energy(kernel.reshape(6, 12))


def test_a_batch_of_neurons():
    weight = random(40, 6)
    some = hyperspherical_energy(weight, neurons=10, seed=1)
    assert some == hyperspherical_energy(weight, neurons=10, seed=1) != hyperspherical_energy(weight, neurons=10, seed=2)
    assert hyperspherical_energy(weight, neurons=40, seed=1) == hyperspherical_energy(weight)
    before = torch.get_rng_state()
    assert hyperspherical_energy(weight, neurons=40, seed=1) > some > 0
    assert torch.equal(before, torch.get_rng_state())


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(2, 9), st.integers(0, 10**6), st.booleans(), st.data())
def test_it_keeps_under_rotation_and_scaling_of_neurons(neurons, size, seed, half_space, data):
    weight = random(neurons, size, seed=seed)
    found = hyperspherical_energy(weight, half_space)
    lengths = data.draw(st.lists(st.floats(0.01, 100), min_size=neurons, max_size=neurons))
    scaled = weight * torch.tensor(lengths, dtype=torch.float64)[:, None]
    assert hyperspherical_energy(weight @ rotation(size, seed + 1), half_space) == pytest.approx(found, rel=1e-6)
    assert hyperspherical_energy(scaled, half_space) == pytest.approx(found, rel=1e-6)


def test_difference_of_two_state_dicts():
    before = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1)).state_dict()
    before["0.weight"] = torch.eye(2)  # energy √2
    after = {**before, "0.weight": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), "1.weight": before["1.weight"] + 1}  # energy 1
    assert energy_differences(before, after) == {"0": pytest.approx(1 - 1 / math.sqrt(2))}  # a lone neuron has no energy
    assert energy_difference(before, after) == pytest.approx(1 - 1 / math.sqrt(2))
    with pytest.raises(ValueError, match="two neurons"):
        energy_difference({"bias": torch.ones(3)}, {"bias": torch.ones(3)})


@pytest.mark.parametrize("method", ["ether", "ether+one-sided", "ether+", "oft", "naive", "lora"])
@pytest.mark.parametrize("half_space", [False, True])
def test_only_orthogonal_transformations_of_the_input_side_keep_it(method, half_space, tiny):
    unet = tiny("unet").model
    model = add_adapter(unet, method, MethodOptions())
    names = [f"{name}.weight" for name, layer in unet.named_modules() if hasattr(layer, "base_layer")]
    before = {name: unet.get_submodule(name.removesuffix(".weight")).base_layer.weight.clone() for name in names}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    after = merge_adapter(model).state_dict()
    found = energy_difference(before, after, half_space)
    assert (found < 1e-5) == (method in ("ether", "oft"))


def test_the_batch_is_of_the_same_neurons_before_and_after():
    before = {"layer.weight": random(50, 8)}
    after = {"layer.weight": before["layer.weight"] @ rotation(8, 3)}
    assert energy_difference(before, after, neurons=7, seed=5) < 1e-9
