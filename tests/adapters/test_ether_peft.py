"""ETHER inside PEFT, transformers and diffusers, held against models with dense float64 updates in their weights."""

import copy
import io
import json
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from torch import nn
from torch.utils.checkpoint import checkpoint

from etherdiff.adapters import EtherConfig
from etherdiff.adapters.ether import EtherLayer, EtherType
from etherdiff.adapters.reflection import FEW_TOKENS
from etherdiff.adapters.tuner import UpdateLayer

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*is deprecated and will be removed",  # transformers' words on gradient checkpointing
        "Already found a `peft_config` attribute",
        "Already following adapters were merged",
        "Already unmerged",
        "fan_in_fan_out is set to False",
        "Adapter b was active which is now deleted",
    )
]

KINDS = ["mlp", "llama", "gpt2", "unet"]
VARIANTS = {
    "ether": {"variant": "ether"},
    "ether-two-sided": {"variant": "ether", "two_sided": True},
    "ether+one-sided": {"variant": "ether+", "two_sided": False, "blocks": 2},
    "ether+": {"variant": "ether+", "blocks": 4},
}


def layers(model: nn.Module) -> dict[str, EtherLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, EtherLayer)}


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "ether_" in name}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of everything in the model that is not the adapters'."""
    return {
        name.replace("base_layer.", ""): value.clone() for name, value in model.state_dict().items() if "ether_" not in name
    }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def adapt(tiny, shake):
    """A tiny model wrapped by get_peft_model, its adapter's parameters random."""

    def build(kind: str, shaken: bool = True, **options):
        made = tiny(kind)
        options = {"target_modules": made.targets} | options
        model = get_peft_model(made.model, EtherConfig(**options)).eval()
        if shaken:
            shake(model)
        return made._replace(model=model)

    return build


@pytest.fixture
def two(adapt, shake):
    """A tiny model with the adapters "default" (ETHER+) and "b" (one-sided ETHER, other layers), both random."""

    def build(kind: str):
        made = adapt(kind)
        second = EtherConfig(variant="ether", blocks=2, target_modules=made.targets[1:])
        made.model.add_adapter("b", second)
        shake(made.model, only=".b", seed=2)
        return made

    return build


# --- the update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_is_that_of_dense_weights(kind, variant, tiny, adapt, dense, relative_error):
    made = adapt(kind, **VARIANTS[variant])
    base = tiny(kind)
    reference = dense.model(base.model, made.model, {"default": 1.0})
    expected = made.run(reference)
    assert relative_error(made.run(base.model), expected) > 1e-2  # the update is seen in the output
    assert relative_error(made.run(made.model), expected) <= 5e-6  # several layers deep


@pytest.mark.parametrize("kind", KINDS)
def test_ether_plus_starts_as_the_base_model(kind, tiny, adapt, relative_error):
    made, base = adapt(kind, shaken=False), tiny(kind)
    assert relative_error(made.run(made.model), made.run(base.model)) <= 1e-6  # rounding: few tokens ride along
    assert same(weights(made.model.base_model.model), weights(base.model))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_the_vectors_train_and_have_the_documented_shapes(kind, variant, adapt):
    options = VARIANTS[variant]
    model = adapt(kind, **options).model
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(vectors(model))
    blocks = options.get("blocks", 1)
    relaxed = options["variant"] == "ether+"
    two_sided = options.get("two_sided", relaxed)
    for layer in layers(model).values():
        expected = {"ether_u": layer.in_features}
        expected |= {"ether_v": layer.in_features} if relaxed else {}
        expected |= {"ether_u_out": layer.out_features} if two_sided else {}
        expected |= {"ether_v_out": layer.out_features} if relaxed and two_sided else {}
        shapes = {name: d["default"].shape for name in layer.adapter_layer_names if (d := getattr(layer, name))}
        assert shapes == {name: (blocks, features // blocks) for name, features in expected.items()}


def test_initialisation_is_kaiming_uniform_and_its_opposite(tiny):
    model = get_peft_model(nn.Sequential(nn.Linear(600, 300)), EtherConfig(blocks=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    u, v = layer.ether_u["default"], layer.ether_v["default"]
    assert torch.equal(u, -v)
    assert torch.equal(layer.ether_u_out["default"], -layer.ether_v_out["default"])
    bound = 1 / 300**0.5  # gain √(2 / (1 + 5)) times √3 / √fan_in, fan_in the 300 features of a block
    assert u.abs().max() <= bound
    assert float(u.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_dense_weights(kind, adapt):
    """Against the unfused path, whose factors autograd differentiates by itself, in float64."""
    made = adapt(kind)
    made.model.double()
    made.run(made.model).square().sum().backward()
    fused = {name: p.grad.clone() for name, p in vectors(made.model).items()}
    made.model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EtherLayer, "_can_fuse", lambda self, adapter: False)
        made.run(made.model).square().sum().backward()
    for name, parameter in vectors(made.model).items():
        torch.testing.assert_close(fused[name], parameter.grad, rtol=1e-8, atol=1e-10 * float(parameter.grad.norm()))
    assert any(grad.abs().max() > 1e-6 for grad in fused.values())


def test_a_trainable_base_weight_gets_its_gradient(adapt):
    """The fused path knows only frozen weights, so it steps aside."""
    made = adapt("mlp")
    layer = made.model.base_model.model.first
    layer.base_layer.weight.requires_grad_(True)
    made.run(made.model).sum().backward()
    assert layer.base_layer.weight.grad.abs().max() > 0


# --- several adapters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_active_adapters_add_up_in_forward_and_in_merge(kind, tiny, two, dense, relative_error):
    made, base = two(kind), tiny(kind).model
    for active in (["default"], ["b"], ["default", "b"], ["b", "default"]):
        made.model.base_model.set_adapter(active)
        expected = made.run(dense.model(base, made.model, dict.fromkeys(active, 1.0)))
        assert relative_error(made.run(made.model), expected) <= 5e-6
        made.model.merge_adapter()
        assert relative_error(made.run(made.model), expected) <= 5e-6
        made.model.unmerge_adapter()
    for name, value in base.state_dict().items():
        torch.testing.assert_close(weights(made.model.base_model.model)[name], value, rtol=1e-6, atol=1e-6)


def test_merging_in_any_order_or_one_after_another_is_the_same(two):
    merged = []
    for steps in ([["default", "b"]], [["b", "default"]], [["default"], ["b"]], [["b"], ["default"]]):
        made = two("mlp")
        for names in steps:
            made.model.merge_adapter(names)
        assert all(set(layer.merged_adapters) <= {"default", "b"} for layer in layers(made.model).values())
        merged.append(weights(made.model))
    for other in merged[1:]:
        for name, value in merged[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_adapters_of_different_layers(tiny, shake, dense, relative_error):
    made, base = tiny("mlp"), tiny("mlp").model
    model = get_peft_model(made.model, EtherConfig(target_modules=["first"])).eval()
    model.add_adapter("b", EtherConfig(target_modules=["second"]))
    shake(model)
    for active in (["default"], ["b"], ["default", "b"]):
        model.base_model.set_adapter(active)
        reference = dense.model(base, model, dict.fromkeys(active, 1.0))
        assert relative_error(made.run(model), made.run(reference)) <= 5e-6
        assert {name.split(".")[-1] for name, p in vectors(model).items() if p.requires_grad} == set(active)


def test_a_second_adapter_is_not_trained_until_it_is_active(two):
    model = two("mlp").model
    assert {name.split(".")[-1] for name, p in vectors(model).items() if p.requires_grad} == {"default"}
    model.set_adapter("b")
    assert {name.split(".")[-1] for name, p in vectors(model).items() if p.requires_grad} == {"b"}


def test_disable_enable_and_delete(tiny, two, relative_error):
    made = two("mlp")
    plain, adapted = made.run(tiny("mlp").model), made.run(made.model)
    with made.model.disable_adapter():
        assert torch.equal(made.run(made.model), plain)
    assert torch.equal(made.run(made.model), adapted)
    made.model.base_model.set_adapter(["default", "b"])
    both = made.run(made.model)
    assert relative_error(both, adapted) > 1e-3
    made.model.delete_adapter("b")
    assert not any(name.endswith(".b") for name in made.model.state_dict())
    assert torch.equal(made.run(made.model), adapted)


def test_disabling_while_merged_gives_the_base_back(tiny, adapt):
    made = adapt("mlp")
    plain = made.run(tiny("mlp").model)
    made.model.merge_adapter()
    with made.model.disable_adapter():
        torch.testing.assert_close(made.run(made.model), plain, rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_cannot_be_deleted_by_peft(two):
    made = two("mlp")
    made.model.base_model.set_adapter(["default", "b"])
    made.model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        made.model.delete_adapter("b")


@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_scale_multiplies_the_update(kind, tiny, two, dense, relative_error):
    made, base = two(kind), tiny(kind).model
    made.model.base_model.set_adapter(["default", "b"])
    for layer in layers(made.model).values():
        layer.set_scale("default", 0.3)
        layer.set_scale("b", -2)
        layer.set_scale("unknown", 5.0)  # as diffusers does for layers that lack the adapter
    reference = dense.model(base, made.model, {"default": 0.3, "b": -2.0})
    assert relative_error(made.run(made.model), made.run(reference)) <= 5e-6
    for layer in layers(made.model).values():
        layer.scale_layer(0.5)
    half = made.run(dense.model(base, made.model, {"default": 0.15, "b": -1.0}))
    assert relative_error(made.run(made.model), half) <= 5e-6
    made.model.merge_adapter()  # the scale holds in a merge as well
    assert relative_error(made.run(made.model), half) <= 5e-6
    made.model.unmerge_adapter()
    for layer in layers(made.model).values():
        layer.unscale_layer(0.5)
    assert relative_error(made.run(made.model), made.run(reference)) <= 5e-6
    for layer in layers(made.model).values():
        layer.unscale_layer()
        assert set(layer.scale.values()) == {1.0}


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def unet(tiny, shake):
    """The tiny UNet with adapters a and b by its own add_adapter."""
    made = tiny("unet")
    made.model.requires_grad_(False)
    made.model.add_adapter(EtherConfig(target_modules=made.targets), "a")
    made.model.add_adapter(EtherConfig(variant="ether", blocks=2, target_modules=made.targets), "b")
    shake(made.model)
    made.model.eval()
    return made


def test_unet_add_adapter_set_adapters_with_weights(unet, tiny, dense, relative_error):
    base = tiny("unet").model
    for names, scales in ((["a"], [1.0]), (["a", "b"], [0.3, 0.7]), (["b", "a"], [1.0, 0.0]), (["b"], [0.5])):
        unet.model.set_adapters(names, scales)
        reference = dense.model(base, unet.model, dict(zip(names, scales, strict=True)))
        assert relative_error(unet.run(unet.model), unet.run(reference)) <= 5e-6


def test_unet_block_wise_weights(unet, tiny, dense, relative_error):
    unet.model.set_adapters(["a"], [{"down": 0.5, "mid": 0.0, "up": 1.0}])
    scales = {(name.split("_")[0], layer.scale["a"]) for name, layer in layers(unet.model).items()}
    assert scales == {("down", 0.5), ("mid", 0.0), ("up", 1.0)}


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_unet_scale_argument_of_the_call(unet, tiny, dense, relative_error, scale):
    unet.model.set_adapters(["a"], [1.0])
    before = unet.run(unet.model)
    reference = dense.model(tiny("unet").model, unet.model, {"a": scale})
    scaled = unet.run(unet.model, cross_attention_kwargs={"scale": scale})
    assert relative_error(scaled, unet.run(reference)) <= 5e-6
    assert torch.equal(unet.run(unet.model), before)  # and it is gone after the call


def test_unet_scale_argument_multiplies_the_weights_set(unet, tiny, dense, relative_error):
    unet.model.set_adapters(["a", "b"], [0.5, 0.8])
    reference = dense.model(tiny("unet").model, unet.model, {"a": 0.25, "b": 0.4})
    scaled = unet.run(unet.model, cross_attention_kwargs={"scale": 0.5})
    assert relative_error(scaled, unet.run(reference)) <= 5e-6


def test_unet_disable_enable_delete(unet, tiny):
    plain = unet.run(tiny("unet").model)
    unet.model.set_adapters(["a", "b"])
    both = unet.run(unet.model)
    unet.model.disable_adapters()
    assert torch.equal(unet.run(unet.model), plain)
    unet.model.enable_adapters()
    assert torch.equal(unet.run(unet.model), both)
    unet.model.set_adapter("a")
    assert unet.model.active_adapters() == ["a"]
    only_a = unet.run(unet.model)
    unet.model.delete_adapters("b")
    assert torch.equal(unet.run(unet.model), only_a)


def test_unet_fuse_and_unfuse(unet, tiny, dense, relative_error):
    unet.model.set_adapters(["a", "b"])
    both = unet.run(unet.model)
    unet.model.fuse_lora(lora_scale=0.5, safe_fusing=True)
    reference = dense.model(tiny("unet").model, unet.model, {"a": 0.5, "b": 0.5})
    assert relative_error(unet.run(unet.model), unet.run(reference)) <= 5e-6
    unet.model.unfuse_lora()
    for layer in layers(unet.model).values():
        layer.unscale_layer(0.5)
    assert relative_error(unet.run(unet.model), both) <= 5e-6


def test_unet_deleting_a_fused_adapter_takes_it_out(unet, relative_error):
    """diffusers asks the layers themselves."""
    unet.model.set_adapters(["b"])
    only_b = unet.run(unet.model)
    unet.model.set_adapters(["a", "b"])
    unet.model.fuse_lora()
    unet.model.delete_adapters("a")
    assert relative_error(unet.run(unet.model), only_b) <= 5e-6


def test_unet_state_dict_round_trip(unet, tiny):
    fresh = tiny("unet")
    for name in ("a", "b"):
        fresh.model.add_adapter(unet.model.peft_config[name], name)
        state = get_peft_model_state_dict(unet.model, adapter_name=name)
        assert all(key.rsplit(".", 1)[-1].startswith("ether_") for key in state)
        loaded = set_peft_model_state_dict(fresh.model, state, adapter_name=name)
        assert not loaded.unexpected_keys
    for model in (unet.model, fresh.model.eval()):
        model.set_adapters(["a", "b"], [0.3, 0.7])
    assert torch.equal(unet.run(unet.model), unet.run(fresh.model))


# --- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_keeps_the_expected_update_and_ends_with_training(adapt):
    layer = adapt("mlp", dropout=0.4).model.base_model.model.first
    torch.manual_seed(0)
    x = torch.randn(12)
    with torch.no_grad():
        exact = layer(x)
        layer.train()
        draws = layer(x.expand(20000, 12))
        layer.eval()
        assert torch.equal(layer(x), exact)
    assert draws.std(0).min() > 1e-3
    standard_error = draws.std(0) / 20000**0.5
    assert ((draws.mean(0) - exact).abs() / standard_error).max() < 5


def test_dropout_acts_on_the_update_alone(tiny, adapt):
    """ETHER+ at its start has no update, so there is nothing to drop."""
    made, base = adapt("mlp", shaken=False, dropout=0.9), tiny("mlp")
    made.model.train()
    torch.testing.assert_close(made.run(made.model), made.run(base.model), rtol=1e-6, atol=1e-6)


def test_dropout_trains(adapt):
    made = adapt("mlp", dropout=0.5)
    made.model.train()
    made.run(made.model).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in vectors(made.model).values())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_folder_round_trip_is_bit_for_bit(kind, variant, tiny, adapt, tmp_path):
    made = adapt(kind, **VARIANTS[variant])
    made.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(kind).model, tmp_path).eval()
    assert same(get_peft_model_state_dict(made.model), get_peft_model_state_dict(loaded))
    assert torch.equal(made.run(loaded), made.run(made.model))
    assert not any(p.requires_grad for p in loaded.parameters())
    trainable = PeftModel.from_pretrained(tiny(kind).model, tmp_path, is_trainable=True)
    assert {name for name, p in trainable.named_parameters() if p.requires_grad} == set(vectors(trainable))


def test_the_config_file_says_what_the_adapter_is(adapt, tmp_path):
    adapt("mlp", blocks=4, dropout=0.25, exclude_modules=["head"]).model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["peft_type"] == "ETHER"
    expected = {"variant": "ether+", "blocks": 4, "two_sided": True, "dropout": 0.25, "exclude_modules": ["head"]}
    assert {key: content[key] for key in expected} == expected
    assert sorted(content["target_modules"]) == ["first", "second"]
    config = EtherConfig.from_pretrained(tmp_path)
    assert isinstance(config, EtherConfig)
    assert config.peft_type is EtherType.ETHER or config.peft_type == "ETHER"
    assert (config.blocks, config.two_sided, config.dropout) == (4, True, 0.25)


def test_several_adapters_in_one_folder(tiny, two, tmp_path):
    made = two("mlp")
    made.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("mlp").model, tmp_path).eval()
    loaded.load_adapter(tmp_path / "b", "b")
    for model in (made.model, loaded):
        model.base_model.set_adapter(["default", "b"])
    assert torch.equal(made.run(loaded), made.run(made.model))


def test_loading_without_materialising_first(tiny, adapt, tmp_path):
    made = adapt("mlp")
    made.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("mlp").model, tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(made.run(loaded), made.run(made.model))


def test_deepcopy_pickle_and_state_dict(two, tiny):
    made = two("mlp")
    made.model.base_model.set_adapter(["default", "b"])
    expected = made.run(made.model)
    duplicate = copy.deepcopy(made.model)
    assert torch.equal(made.run(duplicate), expected)
    with torch.no_grad():
        for parameter in vectors(duplicate).values():
            parameter.zero_()
    assert torch.equal(made.run(made.model), expected)  # nothing is shared

    file = io.BytesIO()
    torch.save(made.model.base_model.model, file)
    file.seek(0)
    assert torch.equal(made.run(torch.load(file, weights_only=False)), expected)

    other = two("mlp")
    with torch.no_grad():
        for parameter in vectors(other.model).values():
            parameter.normal_()
    other.model.base_model.set_adapter(["default", "b"])
    other.model.load_state_dict(made.model.state_dict())
    assert torch.equal(made.run(other.model), expected)


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind, variant, tiny, adapt, dense, relative_error):
    made = adapt(kind, **VARIANTS[variant])
    before, adapted = weights(made.model), made.run(made.model)
    made.model.merge_adapter(safe_merge=True)
    reference = dense.model(tiny(kind).model, made.model, {"default": 1.0})
    for name, layer in layers(made.model).items():
        expected = reference.get_submodule(name.removeprefix("base_model.model.")).weight
        assert relative_error(layer.get_base_layer().weight, expected) <= 1e-6
    assert relative_error(made.run(made.model), adapted) <= 5e-6
    made.model.unmerge_adapter()
    for name, value in weights(made.model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)
    assert relative_error(made.run(made.model), adapted) <= 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_is_bit_for_bit_where_the_original_was_kept(two, dtype):
    made = two("mlp")
    for layer in layers(made.model).values():
        layer.base_layer.to(dtype)
    before = weights(made.model)
    for names in (["default"], ["b"]):  # one after another: the first merge's copy is the one that counts
        made.model.base_model.merge_adapter(names, keep_original=True)
    assert not same(weights(made.model), before)
    made.model.unmerge_adapter()
    assert same(weights(made.model), before)


@pytest.mark.parametrize("keep", [False, True])
def test_a_singular_transform_comes_out_again(adapt, keep):
    made = adapt("mlp")
    with torch.no_grad():
        for layer in layers(made.model).values():
            for u, v in ((layer.ether_u, layer.ether_v), (layer.ether_u_out, layer.ether_v_out)):
                u["default"].zero_()[:, 0] = 1
                v["default"].zero_()[:, 1] = 1
    before, adapted = weights(made.model), made.run(made.model)
    made.model.base_model.merge_adapter(keep_original=keep)
    merged = made.model.base_model.model.first.base_layer.weight
    assert merged[:, 0].abs().max() < 1e-7  # H⁺ maps e₀ to 0: nothing of this column is left to invert
    made.model.unmerge_adapter()
    assert same(weights(made.model), before) or not keep
    for name, value in weights(made.model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(made.run(made.model), adapted, rtol=1e-5, atol=1e-6)


def test_merging_twice_adds_once(adapt):
    made = adapt("mlp")
    made.model.merge_adapter()
    once = weights(made.model)
    with pytest.warns(UserWarning, match="merged"):
        made.model.merge_adapter()
    assert same(weights(made.model), once)
    made.model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        made.model.unmerge_adapter()


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload_leaves_a_plain_model(kind, tiny, adapt, relative_error):
    made, base = adapt(kind), tiny(kind).model
    adapted = made.run(made.model)
    plain = made.model.merge_and_unload(safe_merge=True)
    assert {name: type(m) for name, m in plain.named_modules()} == {name: type(m) for name, m in base.named_modules()}
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert relative_error(made.run(plain), adapted) <= 5e-6


def test_unload_gives_the_base_back(tiny, adapt):
    made, base = adapt("mlp"), tiny("mlp").model
    assert same(weights(made.model.unload()), weights(base))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_a_broken_adapter(adapt, value):
    layer = adapt("mlp").model.base_model.model.first
    with torch.no_grad():
        layer.ether_u["default"][0, 3] = value
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match="'default'"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_of_a_model_touches_no_layer_if_one_is_broken(adapt, call):
    model = adapt("mlp").model
    with torch.no_grad():
        model.base_model.model.second.ether_u["default"][0, 3] = float("nan")
    before = weights(model)
    with pytest.raises(ValueError, match="'default'"):
        getattr(model, call)(safe_merge=True)
    assert same(weights(model), before)


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_bases(kind, dtype, variant, tiny, shake, relative_error):
    """Float32 parameters, and an output whose error is of the size that the base model's own rounding makes."""
    made = tiny(kind)
    exact = made.run(made.model)
    made.model.to(dtype)
    model = get_peft_model(made.model, EtherConfig(target_modules=made.targets, **VARIANTS[variant])).eval()
    of_base = relative_error(made.run(tiny(kind).model.to(dtype)), exact)
    assert {p.dtype for p in vectors(model).values()} == {torch.float32}
    shake(model)
    output = made.run(model)
    assert output.dtype == dtype
    full = get_peft_model(tiny(kind).model, EtherConfig(target_modules=made.targets, **VARIANTS[variant])).eval()
    shake(full)
    assert relative_error(output, made.run(full)) <= 6 * of_base + 4 * torch.finfo(dtype).eps
    made.run(model).float().square().mean().backward()
    for parameter in vectors(model).values():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_half_precision_weights_are_the_exact_ones_rounded_once(kind, tiny, shake, dense):
    made = tiny(kind)
    made.model.bfloat16()
    base = copy.deepcopy(made.model)
    model = get_peft_model(made.model, EtherConfig(target_modules=made.targets)).eval()
    shake(model)
    model.merge_adapter()
    reference = dense.model(base, model, {"default": 1.0})
    for name, layer in layers(model).items():
        exact = reference.get_submodule(name.removeprefix("base_model.model.")).weight
        half_a_unit = torch.finfo(torch.bfloat16).eps / 2 * exact.abs()
        assert ((layer.get_base_layer().weight - exact).abs() <= half_a_unit + 1e-6).all()


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_to_bfloat16(kind, several, tiny, two, relative_error):
    made = two(kind)
    if several:
        made.model.base_model.set_adapter(["default", "b"])
    exact = made.run(made.model)
    base = tiny(kind).model
    base_exact = made.run(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        base_output, output = made.run(base), made.run(made.model)
    assert output.dtype == base_output.dtype
    assert relative_error(output, exact) <= 6 * relative_error(base_output, base_exact) + 0.02
    output.float().square().mean().backward()
    trained = [p for p in vectors(made.model).values() if p.requires_grad]
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in trained)


@pytest.mark.parametrize("active", [["default"], ["default", "b"]])
def test_weights_offloaded_by_accelerate(two, active):
    """What `enable_sequential_cpu_offload` does; LoRA and OFT work with it."""
    made = two("mlp")
    made.model.base_model.set_adapter(active)
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        expected = made.model(x)
        cpu_offload(made.model, torch.device("cpu"))
        torch.testing.assert_close(made.model(x), expected, rtol=1e-5, atol=1e-6)


# --- training machinery -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_an_mlp(adapt, reentrant):
    made = adapt("mlp", dropout=0.3)
    model = made.model.train()
    x = torch.randn(3, 12, requires_grad=True)
    collected = []
    for call in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        torch.manual_seed(5)  # of the dropout
        call(x).square().sum().backward()
        collected.append({name: p.grad.clone() for name, p in vectors(model).items()})
    assert same(*collected)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "unet"])
def test_gradient_checkpointing_as_the_libraries_do_it(kind, adapt):
    made = adapt(kind)
    model = made.model.train()  # none of these models has dropout above 0 in its adapted form
    if kind != "unet":  # whose inputs are single precision; what is computed again may round otherwise
        model.double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made.run(model).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in vectors(model).items()}
    model.zero_grad()
    inner = model.base_model.model
    if kind == "unet":
        inner.enable_gradient_checkpointing()
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.run(model).square().sum().backward()
    for name, parameter in vectors(model).items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


@pytest.fixture
def compiled_like_eager(relative_error):
    def check(model: nn.Module, tokens: int, backend: str) -> None:
        if not hasattr(torch._dynamo.config, "enable_trace_contextlib"):  # before torch 2.7, which traces PEFT's own hooks
            model = model.base_model
        x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(0))
        results = []
        torch._dynamo.reset()
        for call in (model, torch.compile(model, fullgraph=True, backend=backend)):
            model.zero_grad()
            output = call(x)
            output.square().sum().backward()
            results.append([output, *(p.grad.clone() for p in vectors(model).values() if p.requires_grad)])
        assert max(map(relative_error, *results)) <= 1e-5

    return check


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("tokens", [5, FEW_TOKENS + 5])
@pytest.mark.parametrize("variant", ["ether", "ether+"])
def test_compiled_whole_without_graph_breaks(adapt, compiled_like_eager, variant, tokens, backend):
    compiled_like_eager(adapt("mlp", **VARIANTS[variant]).model, tokens, backend)


def test_two_active_adapters_compile_whole(two, compiled_like_eager):
    model = two("mlp").model
    model.base_model.set_adapter(["default", "b"])
    compiled_like_eager(model, 5, "eager")


def test_attention_of_a_scaled_unet_compiles_whole(unet, relative_error):
    unet.model.set_adapters(["a"], [0.5])
    attention = unet.model.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(2, 9, 32)
    expected = attention(x)
    torch._dynamo.reset()
    assert relative_error(torch.compile(attention, fullgraph=True, backend="eager")(x), expected) <= 1e-5


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"blocks": 5, "target_modules": ["first"]}, ["first", "12 input", "24 output", "5 blocks", "1, 2, 3, 4, 6, 12"]),
    ({"blocks": 8, "target_modules": ["first", "second"]}, ["'first'", "12 input", "1, 2, 3, 4, 6, 12"]),
    ({"blocks": 3, "two_sided": False, "target_modules": ["second", "head"]}, ["'head'", "16 input", "1, 2, 4, 8, 16"]),
    ({"target_modules": ["first", "conv"]}, ["'conv'", "Conv2d", "linear"]),
    ({"target_modules": "conv"}, ["'conv'", "Conv2d"]),
    ({"target_modules": ["frist"]}, ["frist", "Did you mean first?", "first, head, second"]),
    ({"target_modules": ".*nothing"}, [".*nothing", "first, head, second"]),
    ({"blocks": 5, "target_modules": ["first", "second"]}, ["'first'", "'second'"]),  # every problem at once
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_layers_that_cannot_be_adapted_are_named_and_nothing_is_touched(options, said, tiny):
    model = tiny("mlp").model
    before, structure = weights(model), {name: type(m) for name, m in model.named_modules()}
    config = EtherConfig(**options)
    for refuse in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        with pytest.raises(ValueError, match=r"layer|target") as refusal:
            refuse(model, config)
        assert all(part in str(refusal.value) for part in said), str(refusal.value)
        assert {name: type(m) for name, m in model.named_modules()} == structure
        assert same(weights(model), before)
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "peft_config")
    adapted = get_peft_model(model, EtherConfig(target_modules=["first"]))  # the model is as good as new
    assert len(layers(adapted)) == 1


def test_all_linear_touches_nothing_where_one_layer_does_not_fit(tiny):
    model = tiny("mlp").model
    with pytest.raises(ValueError, match="layer 'head': 16 input features"):
        get_peft_model(model, EtherConfig(blocks=12, two_sided=False, target_modules="all-linear"))
    assert not layers(model)  # so far first and second, which 12 divides, are left adapted


@pytest.mark.parametrize("options", [{"blocks": 5}, {"target_modules": ["frist"]}])
def test_a_refused_second_adapter_leaves_the_first_working(options, two):
    made = two("mlp")
    before, names = made.run(made.model), set(made.model.state_dict())
    with pytest.raises(ValueError, match=r"'first'|frist"):
        made.model.add_adapter("c", EtherConfig(**({"target_modules": ["first"]} | options)))
    assert set(made.model.state_dict()) == names
    assert set(made.model.peft_config) == {"default", "b"}
    assert torch.equal(made.run(made.model), before)
    made.model.add_adapter("c", EtherConfig(target_modules=["first"]))
    assert torch.equal(made.run(made.model), before)


def test_layers_that_carry_an_adapter_are_offered_for_a_second(two):
    with pytest.raises(ValueError, match=r"Did you mean first.* end in: first, head, second"):
        two("mlp").model.add_adapter("c", EtherConfig(target_modules=["frist"]))


def test_a_unet_that_refused_can_still_be_adapted(tiny):
    """By PEFT. diffusers' add_adapter marks the UNet as adapted before it asks PEFT, whatever the adapter's type."""
    made = tiny("unet")
    with pytest.raises(ValueError, match="do not divide into 3 blocks"):
        made.model.add_adapter(EtherConfig(blocks=3, target_modules=made.targets))
    assert not layers(made.model)
    assert layers(get_peft_model(made.model, EtherConfig(target_modules=made.targets)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"variant": "ether++"}, "variant must be 'ether' or 'ether\\+', not 'ether\\+\\+'"),
        ({"blocks": 0}, "blocks must be a whole number of at least 1, not 0"),
        ({"blocks": 2.0}, "blocks must be a whole number"),
        ({"blocks": True}, "blocks must be a whole number"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, not 1.0"),
        ({"dropout": -0.1}, "dropout must be"),
        ({"dropout": 2, "blocks": 0, "variant": "x"}, "dropout.*blocks.*variant"),
        ({"target_modules": "first", "layers_to_transform": [0]}, "layers_to_transform needs"),
    ],
)
def test_settings_that_cannot_be(options, said):
    with pytest.raises(ValueError, match=said):
        EtherConfig(**({"target_modules": ["first"]} | options))


def test_a_layer_that_carries_a_lora_is_refused(tiny):
    made = tiny("unet")
    made.model.add_adapter(LoraConfig(r=2, target_modules=made.targets), "lora")
    names = set(made.model.state_dict())
    with pytest.raises(ValueError, match=r"already carries an adapter of another kind \(Linear\); delete it first"):
        made.model.add_adapter(EtherConfig(target_modules=made.targets), "ether")
    assert set(made.model.state_dict()) == names
    made.run(made.model)


def test_quantised_weights_are_refused(tiny):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layer '0' holds quantised weights \(torch.int8\); load the model in"):
        get_peft_model(model, EtherConfig(target_modules=["0"]))


# --- choosing layers --------------------------------------------------------------------------------------------------


def adapted_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name in layers(model)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": r"model\.layers\.1\..*\.[qk]_proj"}, ["1.q", "1.k"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, ["1.q"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, ["0.q"]),
        ({"target_modules": ["o_proj", "q_proj"], "exclude_modules": r".*layers\.0.*|.*o_proj"}, ["1.q"]),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["o_proj"]}, ["0.q", "1.q"]),
        ({"target_modules": None}, ["0.q", "1.q", "0.v", "1.v"]),  # PEFT's choice for Llama
    ],
)
def test_targets(options, expected, tiny):
    model = get_peft_model(tiny("llama").model, EtherConfig(**options))
    names = {"model.layers.{}.self_attn.{}_proj".format(*name.split(".")) for name in expected}
    assert adapted_names(model) == names


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_linear_takes_every_linear_layer_but_the_head(kind, tiny):
    made = tiny(kind)
    model = get_peft_model(made.model, EtherConfig(target_modules="all-linear"))
    per_block = {"llama": 7, "gpt2": 4}[kind]
    assert len(adapted_names(model)) == 2 * per_block
    assert "lm_head" not in adapted_names(model)
    made.run(model)


def test_modules_to_save_are_trained_whole_and_saved(tiny, adapt, tmp_path):
    made = adapt("mlp", modules_to_save=["head"])
    trainable = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trainable - set(vectors(made.model)) == {
        f"base_model.model.head.modules_to_save.default.{part}" for part in ("weight", "bias")
    }
    with torch.no_grad():
        made.model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    made.model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("mlp").model, tmp_path).eval()
    assert torch.equal(made.run(loaded), made.run(made.model))


# --- PEFT's own conversion to LoRA --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "rank"),
    [
        ({"variant": "ether"}, 1),
        ({"variant": "ether", "two_sided": True}, 2),
        ({"variant": "ether+", "two_sided": False, "blocks": 2}, 4),
        ({"variant": "ether+"}, 4),
    ],
    ids=VARIANTS,
)
@pytest.mark.parametrize(
    "kind",
    [
        "mlp",
        "llama",
        "gpt2",
        "unet",
    ],
)
def test_pefts_conversion_to_lora_is_exact_at_the_transforms_rank(kind, options, rank, tiny, adapt, relative_error, tmp_path):
    made = adapt(kind, **options)
    save_as_lora(tmp_path, made.model, rank=rank)
    loaded = PeftModel.from_pretrained(tiny(kind).model, tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert relative_error(made.run(loaded), made.run(made.model)) <= 2e-5


def test_pefts_conversion_finds_the_rank_by_itself(adapt):
    config, _ = convert_to_lora(adapt("unet").model, rank=1 - 1e-5)
    assert max(config.rank_pattern.values()) == 4


def test_every_layer_is_ours_and_says_it_can_be_converted(two):
    for layer in layers(two("gpt2").model).values():
        assert isinstance(layer, UpdateLayer)
        assert layer.supports_lora_conversion("default")


def test_nothing_here_warns(adapt, tmp_path):
    """Building, running, merging and saving are silent, so that a user's warnings are their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = adapt("mlp")
        made.run(made.model)
        made.model.merge_adapter()
        made.model.unmerge_adapter()
        made.model.save_pretrained(tmp_path)
