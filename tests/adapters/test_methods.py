"""One contract over every method, and the parameter counts of Stable Diffusion 1.5."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import OFTConfig, PeftModel, VeraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.oft.layer import OFTLayer
from torch import nn

import etherdiff
from etherdiff.adapters.methods import (
    METHODS,
    TARGETS,
    MethodOptions,
    add_adapter,
    magnitude_config,
    resolve_options,
    trainable_parameters,
)

SD15_UNET = Path(etherdiff.__file__).parent / "assets/sd15/unet"
ADAPTERS = [name for name, method in METHODS.items() if method.config]
NAMES = ["ether", "ether+", "ether+one-sided", "oft", "naive", "lora", "boft", "hra", "vera", "full"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*CUDA.*"),  # BOFT's, on its missing kernel
    pytest.mark.filterwarnings("ignore:.*projection_prng_key.*"),
    pytest.mark.filterwarnings("ignore:.*BOFT.*"),
]


def options(name: str) -> MethodOptions:
    """The defaults, but for ranks that would be more than the tiny UNet's."""
    return MethodOptions(rank=2) if "rank" in METHODS[name].options else MethodOptions()


@pytest.fixture
def build(tiny):
    def build(name: str, seed: int = 0):
        made = tiny("unet")
        return made._replace(model=add_adapter(made.model, name, options(name), seed).eval())

    return build


def test_the_methods_are_those_of_the_contract():
    assert sorted(METHODS) == sorted(NAMES)
    for method in METHODS.values():
        assert method.summary
        assert method.learning_rate > 0


@pytest.mark.parametrize("name", METHODS)
def test_training_a_step_changes_the_output_and_only_its_own_parameters(name, build, relative_error):
    made = build(name)
    trained = trainable_parameters(made.model)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    output = made.run(made.model)
    optimizer = torch.optim.AdamW(trained.values(), lr=METHODS[name].learning_rate, weight_decay=0.0)
    made.model.train()
    (made.run(made.model) - 1).square().mean().backward()
    optimizer.step()
    made.model.eval()
    assert relative_error(made.run(made.model), output) > 1e-6
    changed = {key for key, value in made.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert changed <= set(trained)
    if name == "full":
        assert trained.keys() == dict(made.model.named_parameters()).keys()
    else:
        assert not any("base_layer" in key for key in trained)


@pytest.mark.parametrize("name", ADAPTERS)
def test_parameters_are_drawn_from_the_seed_alone(name, build):
    states = []
    for global_seed, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(global_seed)
        undisturbed = torch.get_rng_state()
        states.append(get_peft_model_state_dict(build(name, seed).model))
        assert torch.equal(torch.get_rng_state(), undisturbed)
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    if name in ("ether", "ether+", "ether+one-sided", "lora", "hra"):  # the others start from zeros or the identity
        assert not all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_on_a_fresh_base_gives_the_same_output(name, build, tiny, tmp_path):
    made = build(name)
    with torch.no_grad():
        for parameter in trainable_parameters(made.model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made.model.save_pretrained(tmp_path)
    fresh = tiny("unet")
    loaded = PeftModel.from_pretrained(fresh.model, tmp_path).eval()
    torch.testing.assert_close(made.run(loaded), made.run(made.model), rtol=0, atol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_all_targets_and_nothing_else_are_adapted(name, tiny):
    for targets in TARGETS.values():
        made = tiny("unet")
        expected = {key for key, _ in made.model.named_modules() if key.endswith(tuple(f".{t}" for t in targets))}
        assert len(expected) > len(targets)
        chosen = MethodOptions(**{**vars(options(name)), "targets": targets})
        model = add_adapter(made.model, name, chosen)
        assert set(model.base_model.targeted_module_names) == expected


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("option", ["blocks", "rank", "dropout"])
def test_options_it_does_not_have_are_refused(name, option):
    given = MethodOptions(**{option: {"blocks": 2, "rank": 3, "dropout": 0.1}[option]})
    if option in METHODS[name].options:
        assert getattr(resolve_options(name, given), option) == getattr(given, option)
    else:
        with pytest.raises(ValueError, match=f"method {name.replace('+', '[+]')} does not have {option}"):
            resolve_options(name, given)


def test_full_refuses_options_when_it_is_added(tiny):
    with pytest.raises(ValueError, match="method full does not have rank"):
        add_adapter(tiny("unet").model, "full", MethodOptions(rank=4))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_refused_option_leaves_the_unet_alone(name, tiny):
    model = tiny("unet").model
    option = next(o for o in ("rank", "blocks", "dropout") if o not in METHODS[name].options)
    with pytest.raises(ValueError, match="does not have"):
        add_adapter(model, name, MethodOptions(**{option: 1}))
    assert type(model) is UNet2DConditionModel
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("name", [name for name in ADAPTERS if METHODS[name].lora_exact])
def test_methods_called_exact_as_lora_have_updates_of_low_rank(name, build):
    made = build(name)
    with torch.no_grad():
        for parameter in trainable_parameters(made.model).values():
            parameter.add_(torch.randn_like(parameter))
    ranks = {"ether": 1, "ether+": 4, "ether+one-sided": 2, "lora": 2, "hra": 2, "vera": 2}
    before = {key: value.clone() for key, value in made.model.state_dict().items() if "base_layer.weight" in key}
    made.model.merge_adapter()
    for key, value in made.model.state_dict().items():
        if key in before:
            singular = torch.linalg.svdvals((value - before[key]).double())
            assert singular[0] > 1e-3
            assert (singular[ranks[name] :] < 1e-5 * singular[0]).all()


# --- Stable Diffusion 1.5 ---------------------------------------------------------------------------------------------


def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15_UNET))


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


# Section 2.2 of the design notes; its first row is what the paper prints.
COLUMNS = ("layers", "ether", "ether+", "ether+one-sided", "lora", "oft", "naive", "magnitudes")
COUNTS = {
    "attention": (128, 99_456, 398_592, 198_912, 797_184, 11_602_368, 23_304_192, 99_840),
    "attention+geglu": (144, 111_936, 623_232, 223_872, 1_246_464, 13_144_928, 26_401_792, 199_680),
    "attention+feedforward": (160, 161_856, 748_032, 323_712, 1_496_064, 37_900_768, 75_963_392, 212_160),
}


@pytest.mark.parametrize("targets", TARGETS)
def test_trainable_parameters_of_sd15(targets):
    counted = {"magnitudes": count(get_peft_model(sd15().requires_grad_(False), magnitude_config(TARGETS[targets])))}
    for name in COLUMNS[1:-1]:
        model = add_adapter(sd15(), name, MethodOptions(targets=TARGETS[targets]))
        counted[name] = count(model)
        counted["layers"] = len(model.base_model.targeted_module_names)
    assert counted == dict(zip(COLUMNS, COUNTS[targets], strict=True))


@pytest.mark.parametrize("blocks", [2, 4, 8])
def test_ether_counts_do_not_depend_on_the_blocks(blocks):
    assert count(add_adapter(sd15(), "ether+", MethodOptions(blocks=blocks))) == 398_592


def test_the_whole_unet_of_sd15():
    assert count(add_adapter(sd15(), "full", MethodOptions())) == 859_520_964


# --- PEFT's methods, as we set them up --------------------------------------------------------------------------------


def test_oft_is_the_exact_cayley_transform_of_the_paper(build):
    made = build("oft")
    layers = [m for m in made.model.modules() if isinstance(m, OFTLayer)]
    assert layers
    with torch.no_grad():
        for layer in layers:
            layer.oft_R["default"].weight.normal_(std=0.3)  # far from where the Neumann series would do
    for layer in layers:
        rotation = layer.oft_R["default"]
        size, entries = layer.in_features // 4, rotation.weight.double()
        assert entries.shape == (4, size * (size - 1) // 2)
        Q = torch.zeros(4, size, size, dtype=torch.float64)
        rows, columns = torch.triu_indices(size, size, 1)
        Q[:, rows, columns] = entries
        Q = Q - Q.mT
        eye = torch.eye(size, dtype=torch.float64)
        R = (eye - Q) @ torch.linalg.inv(eye + Q)  # PEFT's sign: the paper's (I + Q)(I - Q)⁻¹ with Q for -Q
        weight = rotation.get_weight().detach().double()
        torch.testing.assert_close(weight, torch.block_diag(*R), rtol=0, atol=1e-6)
        assert (weight @ weight.T - torch.eye(layer.in_features)).abs().max() <= 1e-6
        assert (R @ R.mT - eye).abs().max() <= 1e-12
        torch.testing.assert_close(torch.linalg.det(R), torch.ones(4, dtype=torch.float64))
        base, x = layer.get_base_layer(), torch.randn(3, layer.in_features)
        turned = nn.functional.linear(x @ weight.float(), base.weight, base.bias)  # it acts on the input
        torch.testing.assert_close(layer(x), turned, rtol=1e-4, atol=1e-5)


def test_pefts_default_oft_is_only_near_a_rotation(tiny):
    """Why we ask for use_cayley_neumann=False."""
    made = tiny("unet")
    model = get_peft_model(made.model, OFTConfig(r=4, oft_block_size=0, target_modules=made.targets))
    layer = next(m for m in model.modules() if isinstance(m, OFTLayer))
    with torch.no_grad():
        layer.oft_R["default"].weight.normal_(std=0.3)
        weight = layer.oft_R["default"].get_weight()
    assert (weight @ weight.T - torch.eye(len(weight))).abs().max() > 1e-2


def test_vera_shares_state_so_diffusers_refuses_it_and_we_do_not(tiny, build):
    made = tiny("unet")
    made.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"shared state|not supported|get_peft_model"):
        made.model.add_adapter(VeraConfig(r=2, target_modules=made.targets))
    made = build("vera")
    assert torch.isfinite(made.run(made.model)).all()
