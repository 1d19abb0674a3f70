"""Drift per layer, against dense float64 matrices built as the papers print them."""

import copy
import math
from typing import NamedTuple

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from etherdiff.adapters import EtherConfig
from etherdiff.adapters.analysis import LayerDrift, adapter_drift, full_drift
from etherdiff.adapters.io import load_adapter, merge_adapter, save_adapter
from etherdiff.adapters.methods import METHODS, MethodOptions, add_adapter, magnitude_config

ADDITIVE = ("lora", "vera")
SMALL = {"vera": {"rank": 4}, "boft": {"blocks": 4}}
SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


class Adapted(NamedTuple):
    method: str
    model: nn.Module
    state: dict[str, Tensor]
    """The adapted model's, from before anything was measured."""
    found: dict[str, LayerDrift]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    """The plain UNet's weights and the merged ones."""


@pytest.fixture(scope="module", params=[name for name in METHODS if name != "full"])
def adapted(request, tiny) -> Adapted:
    """The tiny UNet under a method whose parameters are far from their start."""
    unet = tiny("unet").model
    before = copy.deepcopy(unet.state_dict())
    model = add_adapter(unet, request.param, MethodOptions(**SMALL.get(request.param, {})))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    state = copy.deepcopy(model.state_dict())
    found = adapter_drift(model)
    return Adapted(request.param, model, state, found, before, merge_adapter(copy.deepcopy(model)).state_dict())


def of_eye(matrix: Tensor) -> float:
    return float((matrix - torch.eye(len(matrix), dtype=matrix.dtype)).norm())


def test_weight_distance_is_that_of_the_merged_weights(adapted):
    for name, weight in adapted.before.items():
        layer = name.removesuffix(".weight")
        moved = float((adapted.after[name].double() - weight.double()).norm())
        assert (layer in adapted.found) == (moved > 0)
        if moved:
            assert adapted.found[layer].weight == pytest.approx(moved, rel=1e-5)
            assert adapted.found[layer].base_norm == pytest.approx(float(weight.double().norm()), rel=1e-12)


def test_the_model_is_left_as_it_was(adapted):
    assert all(torch.equal(adapted.state[key], value) for key, value in adapted.model.state_dict().items())


def test_what_only_adds_has_no_transformation(adapted):
    for drift in adapted.found.values():
        assert (drift.input_side is None) == (adapted.method in ADDITIVE)
        assert (drift.output_side is not None) == (adapted.method in ("ether+", "boft"))


def test_the_bounds_of_the_paper(adapted):
    for drift in adapted.found.values():
        if adapted.method == "ether":
            assert drift.input_side == pytest.approx(2)
        if adapted.method.startswith("ether+"):
            assert 0 < drift.input_side < math.sqrt(2)


def test_block_diagonal_and_rotated_against_dense_matrices(adapted):
    """W' = W T, or diag(s) W T for BOFT: T is found by solving, since this W is square."""
    if adapted.method not in ("oft", "boft", "hra", "naive"):
        return
    before, after = (state[f"{SQUARE}.weight"].double() for state in (adapted.before, adapted.after))
    if adapted.method == "boft":
        after = after * (before.norm(dim=1) / after.norm(dim=1))[:, None]  # a rotation keeps the length of rows
    assert adapted.found[SQUARE].input_side == pytest.approx(of_eye(torch.linalg.solve(before, after)), rel=1e-3)


@pytest.mark.parametrize("variant", ["ether", "ether+"])
@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("two_sided", [False, True])
def test_ether_against_dense_matrices(variant, blocks, two_sided, tiny, dense):
    """Far from the identity, and a millionth from it: small drifts keep their relative precision."""
    for size in (1.0, 1e-6):
        config = EtherConfig(variant=variant, blocks=blocks, two_sided=two_sided, target_modules=["first", "second"])
        model = get_peft_model(tiny("mlp").model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "ether_v" in name:
                    parameter.add_(size * parameter.abs().mean() * torch.randn(parameter.shape))
        found = adapter_drift(model)
        assert list(found) == ["first", "second"]
        for name, drift in found.items():
            layer = model.get_base_model().get_submodule(name)
            u, v, u_out, v_out = (getattr(layer, key)._parameters.get("default") for key in layer.adapter_layer_names)
            assert drift.input_side == pytest.approx(of_eye(dense.side(u, v).detach()), rel=1e-6)
            assert (drift.output_side is not None) == two_sided
            if two_sided:
                assert drift.output_side == pytest.approx(of_eye(dense.side(u_out, v_out).detach()), rel=1e-6)
            update = dense.update(layer.linear_weight(), u, v, u_out, v_out).detach()
            assert drift.weight == pytest.approx(float(update.norm()), rel=1e-6)


def test_saved_and_loaded_it_is_the_same(tiny, tmp_path):
    model = add_adapter(tiny("unet").model, "ether", MethodOptions())
    save_adapter(model, tmp_path / "adapter")
    assert adapter_drift(load_adapter(tiny("unet").model, tmp_path / "adapter")) == adapter_drift(model)


def test_magnitude(tiny):
    model = get_peft_model(tiny("mlp").model, magnitude_config(("first",)))
    with torch.no_grad():
        model.get_base_model().first.magnitude_factor["default"].fill_(1.5)
    drift = adapter_drift(model)["first"]
    assert drift.output_side == pytest.approx(0.5 * math.sqrt(24))
    assert drift.weight == pytest.approx(0.5 * drift.base_norm)
    assert drift.input_side is None


def test_full_fine_tuning():
    before = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Conv2d(2, 2, 3)).state_dict()
    after = {name: value + 0.5 for name, value in before.items()}
    found = full_drift(before, after)
    assert list(found) == ["0", "2"]
    assert found["0"].weight == pytest.approx(0.5 * math.sqrt(6), rel=1e-6)
    assert found["2"].weight == pytest.approx(0.5 * math.sqrt(36), rel=1e-6)
    assert found["0"].input_side is None
