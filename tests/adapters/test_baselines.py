"""Naive (W N) and magnitude re-fitting (diag(m) W) against dense formulas in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from etherdiff.adapters.baselines import MagnitudeConfig, NaiveConfig

pytestmark = pytest.mark.filterwarnings("ignore:Already following adapters were merged")

CONFIGS = {
    "naive": lambda blocks, **options: NaiveConfig(blocks=blocks, **options),
    "magnitude": lambda blocks, **options: MagnitudeConfig(**options),
}


def layer(kind: str, blocks: int = 1, features=(12, 8), bias=True, base=nn.Linear, shaken=True, **options):
    """One adapted layer and its wrapper, parameters random unless `shaken` is False."""
    torch.manual_seed(0)
    made = base(*features, bias=bias) if base is nn.Linear else base(features[1], features[0])
    config = CONFIGS[kind](blocks, target_modules=["0"], **options)
    model = get_peft_model(nn.Sequential(made), config).eval()
    adapted = model.base_model.model[0]
    if shaken:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default" in name:
                    parameter.add_(torch.randn(parameter.shape))
    return adapted, model


def parameter(adapted: nn.Module, name: str = "default") -> Tensor:
    return getattr(adapted, adapted.adapter_layer_names[0])[name]


def changed_weight(weight: Tensor, value: Tensor) -> Tensor:
    """W N of Naive's (blocks, in/blocks, in/blocks), or diag(m) W of magnitudes (out,); float64."""
    weight, value = weight.double(), value.double()
    return torch.diag(value) @ weight if value.dim() == 1 else weight @ torch.block_diag(*value)


def expected_output(x: Tensor, adapted: nn.Module, scales: dict[str, float]) -> Tensor:
    base = adapted.get_base_layer()
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).double()
    total = weight.clone()
    for name, scale in scales.items():
        total = total + scale * (changed_weight(weight, parameter(adapted, name)) - weight)
    y = x.double() @ total.T
    return y if base.bias is None else y + base.bias.double()


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(list(CONFIGS)),
    blocks=st.sampled_from([1, 2, 3, 4]),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 20)),
    bias=st.booleans(),
    shape=st.sampled_from([(), (1,), (5,), (2, 3), (2, 1, 4)]),
    scale=st.sampled_from([1.0, 0.0, -0.5]),
)
def test_forward_and_gradients_are_the_dense_formula(kind, blocks, sizes, bias, shape, scale):
    adapted, _ = layer(kind, blocks, (sizes[0] * blocks, sizes[1]), bias)
    adapted.set_scale("default", scale)
    adapted.double()
    x = torch.randn(*shape, sizes[0] * blocks, dtype=torch.float64, requires_grad=True)
    wanted = [x, parameter(adapted)]
    actual, expected = adapted(x), expected_output(x, adapted, {"default": scale})
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(torch.autograd.grad(actual, wanted, gradient), torch.autograd.grad(expected, wanted, gradient))


@pytest.mark.parametrize(
    "kind",
    [
        "naive",
        "magnitude",
    ],
)
def test_no_tokens_at_all_as_for_a_linear_layer(kind):
    adapted, _ = layer(kind, 4)
    assert adapted(torch.randn(0, 12)).shape == (0, 8)


@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
@pytest.mark.parametrize("kind", CONFIGS)
def test_start_is_the_identity_bit_for_bit(kind, base):
    adapted, _ = layer(kind, 4, base=base, shaken=False)
    x = torch.randn(7, 12)
    assert torch.equal(adapted(x), adapted.get_base_layer()(x))
    assert not adapted.get_delta_weight("default").any()


@pytest.mark.parametrize(
    ("kind", "blocks", "shape"), [("naive", 4, (4, 3, 3)), ("naive", 1, (1, 12, 12)), ("magnitude", 1, (8,))]
)
def test_shapes_and_precision_of_the_parameters(kind, blocks, shape):
    adapted, model = layer(kind, blocks)
    assert parameter(adapted).shape == shape
    assert parameter(adapted).dtype == torch.float32
    assert [p for p in model.parameters() if p.requires_grad] == [parameter(adapted)]


@pytest.mark.parametrize("base", [nn.Linear, Conv1D])
@pytest.mark.parametrize("kind", CONFIGS)
def test_two_adapters_add_up_merge_and_come_out(kind, base):
    adapted, model = layer(kind, 4, base=base)
    model.add_adapter("b", CONFIGS[kind](2, target_modules=["0"]))
    with torch.no_grad():
        parameter(adapted, "b").mul_(0.5).add_(0.1)
    model.base_model.set_adapter(["default", "b"])
    adapted.set_scale("b", 0.7)
    x = torch.randn(7, 12)
    expected = expected_output(x, adapted, {"default": 1.0, "b": 0.7})
    torch.testing.assert_close(adapted(x).double(), expected, rtol=1e-5, atol=1e-5)
    for keep in (False, True):
        original = adapted.get_base_layer().weight.clone()
        model.base_model.merge_adapter(["b"], keep_original=keep)
        model.base_model.merge_adapter(["default"], keep_original=keep, safe_merge=True)
        torch.testing.assert_close(adapted(x).double(), expected, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(adapted.get_base_layer().weight, original, rtol=0, atol=0 if keep else 1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(adapted(x), adapted.get_base_layer()(x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_safe_merge_refuses_what_is_broken(kind):
    adapted, _ = layer(kind)
    with torch.no_grad():
        parameter(adapted).view(-1)[0] = float("nan")
    original = adapted.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="'default'"):
        adapted.merge(safe_merge=True)
    assert torch.equal(adapted.get_base_layer().weight, original)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision_bases(kind, dtype):
    adapted, _ = layer(kind, 4)
    adapted.base_layer.to(dtype)
    x = torch.randn(50, 12).to(dtype)
    y = adapted(x)
    assert y.dtype == dtype
    expected = expected_output(x, adapted, {"default": 1.0})
    assert (y.double() - expected).norm() <= 4 * torch.finfo(dtype).eps * expected.norm()
    y.float().sum().backward()
    assert parameter(adapted).grad.dtype == torch.float32


@pytest.mark.parametrize("kind", CONFIGS)
def test_folder_round_trip(kind, tmp_path):
    adapted, model = layer(kind, 4)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 8)), tmp_path).eval()
    x = torch.randn(7, 12)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(parameter(loaded.base_model.model[0]), parameter(adapted))


def test_dropout_of_naive_keeps_the_expected_update():
    adapted, _ = layer("naive", 4, dropout=0.4)
    x = torch.randn(12)
    with torch.no_grad():
        exact = adapted(x)
        draws = adapted.train()(x.expand(20000, 12))
    assert ((draws.mean(0) - exact).abs() / (draws.std(0) / 20000**0.5)).max() < 5


def test_naive_names_the_layer_that_its_blocks_do_not_divide():
    with pytest.raises(ValueError, match=r"layer '0': 12 input features do not divide into 5 blocks .*1, 2, 3, 4, 6, 12"):
        layer("naive", 5)


def test_naive_blocks_need_not_divide_the_output():
    adapted, _ = layer("naive", 4, features=(12, 7))
    assert adapted(torch.randn(2, 12)).shape == (2, 7)


def test_magnitude_has_no_dropout():
    with pytest.raises(ValueError, match="magnitude re-fitting has no dropout"):
        MagnitudeConfig(target_modules=["0"], dropout=0.1)


def test_magnitude_leaves_the_bias_alone():
    """A neuron's factor scales its weights, as in the OFT paper, not its bias."""
    adapted, _ = layer("magnitude")
    at_zero = adapted(torch.zeros(1, 12))
    torch.testing.assert_close(at_zero[0], adapted.get_base_layer().bias)
