"""Saving, loading, stacking, merging and LoRA factors of every method, on the tiny base."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from etherdiff.adapters import io, methods
from etherdiff.adapters.io import (
    adapter_names,
    load_adapter,
    load_adapters,
    lora_factors,
    merge_adapter,
    read_adapter,
    save_adapter,
)
from etherdiff.adapters.methods import METHODS, MethodOptions, add_adapter, trainable_parameters
from etherdiff.families import bases, sd1
from etherdiff.system.errors import UserError

BASE = {"name": "tiny", "fingerprint": {"unet": "0" * 64}}
EXACT = [name for name, method in METHODS.items() if method.lora_exact]
UNSCALED = ["oft", "boft", "hra", "vera"]


@pytest.fixture(scope="module")
def plain_unet():
    return sd1.load_base(bases.find_base("tiny")).unet


@pytest.fixture
def unet(plain_unet):
    return copy.deepcopy(plain_unet)


def predict(unet):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    weight = unet.conv_in.weight
    with torch.no_grad():
        return unet(latents.to(weight.dtype), 500, text.to(weight.dtype), return_dict=False)[0].float()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def randomise(model, seed=0):
    """Move every parameter well away from where it starts, which for most methods is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            spread = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 0.1
            parameter += 0.3 * spread * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(unet, method, seed=0, **options):
    return randomise(add_adapter(unet, method, MethodOptions(**options)), seed)


@pytest.fixture(scope="module")
def saved(plain_unet, tmp_path_factory):
    """Method -> folder of a randomised adapter, and what the UNet predicts with it."""
    made = {}
    for method in METHODS:
        unet = copy.deepcopy(plain_unet)
        folder = tmp_path_factory.mktemp("adapters") / method
        save_adapter(make(unet, method), folder, BASE)
        made[method] = folder, predict(unet)
    return made


# --- Round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_loads_as_it_was(method, saved, unet):
    folder, expected = saved[method]
    assert relative(expected, predict(unet)) > 1e-4  # it does something
    rng = torch.get_rng_state()

    model = load_adapter(unet, folder)

    assert torch.equal(predict(unet), expected)
    assert torch.equal(torch.get_rng_state(), rng)  # loading takes nothing from the global generator
    assert not trainable_parameters(model)
    assert not any(module.training for module in unet.modules())
    assert read_adapter(folder).method == method
    assert adapter_names(model) == ([] if method == "full" else ["default"])


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_safetensors_in_float32_and_json(method, saved):
    folder = saved[method][0]
    assert sorted(path.name for path in folder.iterdir()) == [io.CONFIG, io.WEIGHTS, io.BASE]
    assert {tensor.dtype for tensor in load_file(folder / io.WEIGHTS).values()} == {torch.float32}
    assert json.loads((folder / io.BASE).read_text()) == BASE
    assert json.loads((folder / io.CONFIG).read_text())["base_model_name_or_path"] == "tiny"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {(folder / io.CONFIG).stat().st_mode & 0o777}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_plain_peft_loads_it(method, saved, unet):
    folder, expected = saved[method]
    PeftModel.from_pretrained(unet, folder, torch_device="cpu")
    assert torch.equal(predict(unet), expected)


def test_importing_io_is_all_that_plain_peft_needs(saved):
    code = (
        "import sys, etherdiff.adapters.io\n"
        "from diffusers import UNet2DConditionModel\n"
        "from peft import PeftModel\n"
        "unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder='unet')\n"
        "PeftModel.from_pretrained(unet, sys.argv[2], torch_device='cpu')"
    )
    tiny = bases.find_base("tiny").folder
    subprocess.run([sys.executable, "-c", code, str(tiny), str(saved["naive"][0])], check=True, capture_output=True)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_bases_save_float32_and_predict_alike(method, saved, unet, tmp_path):
    folder, expected = saved[method]
    half = unet.to(torch.bfloat16)
    model = load_adapter(half, folder)
    assert relative(predict(half), expected) < 0.05
    save_adapter(model, tmp_path / "again")
    again, before = load_file(tmp_path / "again" / io.WEIGHTS), load_file(folder / io.WEIGHTS)
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}
    if method not in ("full", "vera"):  # whose tensors are (also) frozen ones, in the base's precision
        assert all(torch.equal(again[key], before[key]) for key in before)


def test_a_loaded_adapter_can_be_trained_further(saved, unet):
    model = load_adapter(unet, saved["ether+"][0], trainable=True)
    names = trainable_parameters(model)
    assert names
    assert all(".ether_" in name for name in names)


def test_a_fully_fine_tuned_unet_can_be_trained_further(saved, unet):
    assert len(trainable_parameters(load_adapter(unet, saved["full"][0], trainable=True))) == len(list(unet.parameters()))


def test_dropout_stays_off_in_an_evaluated_unet(unet, tmp_path):
    save_adapter(make(unet, "ether+", dropout=0.5), tmp_path / "a")
    fresh = copy.deepcopy(sd1.load_base(bases.find_base("tiny")).unet)
    load_adapter(fresh, tmp_path / "a")
    assert torch.equal(predict(fresh), predict(fresh))


def test_a_run_folder_is_accepted(saved, unet, tmp_path):
    (tmp_path / "adapter").symlink_to(saved["lora"][0])
    load_adapter(unet, tmp_path)
    assert torch.equal(predict(unet), saved["lora"][1])


# --- Scale and several adapters ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in METHODS if name not in UNSCALED])
def test_scale_multiplies_the_weight_update(method, saved, plain_unet):
    def update(scale):
        merged = merge_adapter(load_adapter(copy.deepcopy(plain_unet), saved[method][0], scale=scale))
        name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
        return merged.get_parameter(name) - plain_unet.get_parameter(name)

    torch.testing.assert_close(update(0.25), 0.25 * update(1.0), rtol=1e-4, atol=1e-6)
    assert update(0).abs().max() < 1e-7


@pytest.mark.parametrize("method", UNSCALED)
def test_what_has_no_scale_says_so(method, saved, unet):
    with pytest.raises(UserError, match=rf"{method} has no scale, so 0.5 .* lora"):
        load_adapter(unet, saved[method][0], scale=0.5)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "full"])
def test_several_adapters_act_together_and_merge_as_they_act(method, saved, plain_unet, tmp_path):
    save_adapter(make(copy.deepcopy(plain_unet), method, seed=1), tmp_path / "second")
    unet = copy.deepcopy(plain_unet)
    model = load_adapters(unet, [(saved[method][0], 1.0), (tmp_path / "second", 1.0)])
    together = predict(unet)
    assert adapter_names(model) == model.active_adapters == ["default", "default_1"]
    assert relative(together, saved[method][1]) > 1e-4
    assert relative(predict(merge_adapter(model)), together) < 1e-5


def test_trainability_of_a_stack_is_each_adapters_own(saved, unet, tmp_path):
    model = load_adapter(unet, saved["lora"][0], "first", trainable=True)
    model = load_adapter(model, saved["lora"][0], "second")
    assert trainable_parameters(model)
    assert all(".first." in name for name in trainable_parameters(model))
    save_adapter(model, tmp_path / "first", name="first")
    assert torch.equal(*(load_file(folder / io.WEIGHTS).popitem()[1] for folder in (tmp_path / "first", saved["lora"][0])))


def test_different_methods_do_not_mix(saved, unet):
    model = load_adapter(unet, saved["ether+"][0])
    for other in ("lora", "full"):
        with pytest.raises(UserError, match="type ETHER: merge one of them into the base first"):
            load_adapter(model, saved[other][0], "other")
    with pytest.raises(UserError, match="fully fine-tuned"):
        load_adapters(unet, [(saved["full"][0], 1.0), (saved["lora"][0], 1.0)])


def test_misuse_is_an_error(saved, unet):
    model = load_adapter(unet, saved["lora"][0])
    with pytest.raises(ValueError, match="named 'default' already"):
        load_adapter(model, saved["lora"][0])
    with pytest.raises(ValueError, match="carries an adapter inside"):
        load_adapter(unet, saved["lora"][0])
    with pytest.raises(ValueError, match="carries an adapter inside"):
        merge_adapter(unet)


# --- Merge and LoRA factors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_unet_is_plain(method, saved, unet, plain_unet, tmp_path):
    folder, expected = saved[method]
    merged = merge_adapter(load_adapter(unet, folder))
    assert relative(predict(merged), expected) < 1e-5
    assert merged is unet
    assert not [name for name in vars(merged) if "peft" in name]
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    merged.save_pretrained(tmp_path)
    reread = type(merged).from_pretrained(tmp_path)
    assert reread.state_dict().keys() == plain_unet.state_dict().keys()
    assert torch.equal(predict(reread), predict(merged))


@pytest.mark.parametrize("method", ["ether+", "lora", "hra"])
def test_a_broken_adapter_is_not_merged(method, unet):
    model = make(unet, method)
    next(iter(trainable_parameters(model).values())).data[:] = torch.nan
    with pytest.raises(UserError, match="cannot be merged"):
        merge_adapter(model)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("blocks_or_rank", [None, 8, 32])
def test_lora_factors_are_exact_and_of_least_rank(method, blocks_or_rank, unet, plain_unet):
    option = "blocks" if method.startswith("ether") else "rank"
    model = make(unet, method, **({option: blocks_or_rank} if blocks_or_rank else {}))
    expected = predict(unet)
    factors = lora_factors(model)
    adapted = copy.deepcopy(plain_unet)
    for name, (down, up) in factors.items():
        weight = adapted.get_submodule(name).weight
        assert down.dtype == up.dtype == torch.float32
        assert len(down) == up.shape[1] <= min(weight.shape)
        weight += up @ down
    assert len(factors) == 56
    assert relative(predict(adapted), expected) < 1e-5


@pytest.mark.parametrize(("method", "rank"), [("ether", 1), ("ether+one-sided", 2), ("ether+", 4), ("lora", 4), ("hra", 8)])
def test_the_rank_is_that_of_the_method(method, rank, saved, unet):
    assert {len(down) for down, _ in lora_factors(load_adapter(unet, saved[method][0])).values()} == {rank}


def test_factors_carry_the_scale(saved, unet, plain_unet):
    scaled = lora_factors(load_adapter(unet, saved["ether+"][0], scale=0.5))
    whole = lora_factors(load_adapter(copy.deepcopy(plain_unet), saved["ether+"][0]))
    for name, (down, up) in whole.items():
        torch.testing.assert_close(scaled[name][1] @ scaled[name][0], 0.5 * up @ down)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in EXACT])
def test_what_is_not_of_low_rank_is_refused_as_lora(method, saved, unet):
    with pytest.raises(UserError, match=r"cannot be exact as a LoRA, because .*`etherdiff merge`"):
        lora_factors(load_adapter(unet, saved[method][0]))


def test_magnitudes_save_load_merge_and_are_refused_as_lora(unet, plain_unet, tmp_path):
    unet.requires_grad_(False)
    model = randomise(get_peft_model(unet, methods.magnitude_config(methods.ATTENTION)))
    save_adapter(model, tmp_path / "a")
    fresh = copy.deepcopy(plain_unet)
    loaded = load_adapter(fresh, tmp_path / "a", scale=1.0)
    expected = predict(unet)
    assert torch.equal(predict(fresh), expected)
    with pytest.raises(UserError, match="cannot be exact"):
        lora_factors(loaded)
    assert relative(predict(merge_adapter(loaded)), expected) < 1e-5


def test_dora_is_refused_as_lora(unet):
    model = get_peft_model(unet, LoraConfig(target_modules=["to_q"], use_dora=True))
    with pytest.raises(UserError, match="use_dora"):
        lora_factors(model)


# --- What cannot be loaded --------------------------------------------------------------------------------------------


def assert_untouched(unet, plain_unet):
    assert unet.state_dict().keys() == plain_unet.state_dict().keys()
    assert torch.equal(predict(unet), predict(plain_unet))
    assert not [name for name in vars(unet) if "peft" in name]


def copy_of(folder, target):
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_folders_that_are_no_adapter(saved, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_adapter(tmp_path / "nowhere")
    (tmp_path / "photo.png").touch()
    with pytest.raises(UserError, match=r"has no adapter_config.json.*holds photo.png"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="is a file: give the folder"):
        read_adapter(saved["lora"][0] / io.WEIGHTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a JSON object"),
        ('{"peft_type": "PREFIX"}', "'PREFIX' is unknown here.* ETHER"),
        ("{}", "None is unknown"),
    ],
)
def test_configurations_that_are_wrong(content, message, saved, tmp_path):
    folder = copy_of(saved["lora"][0], tmp_path / "a")
    (folder / io.CONFIG).write_text(content)
    with pytest.raises(UserError, match=message):
        read_adapter(folder)


def test_a_configuration_with_impossible_settings(saved, unet, plain_unet, tmp_path):
    folder = copy_of(saved["ether+"][0], tmp_path / "a")
    config = json.loads((folder / io.CONFIG).read_text())
    (folder / io.CONFIG).write_text(json.dumps(config | {"blocks": 0}))
    with pytest.raises(UserError, match="blocks must be a whole number"):
        load_adapter(unet, folder)
    (folder / io.CONFIG).write_text(json.dumps(config | {"blocks": 7}))
    with pytest.raises(UserError, match=r"does not fit this UNet: .*7 blocks"):
        load_adapter(unet, folder)
    assert_untouched(unet, plain_unet)


def test_weights_that_are_missing_or_pickled(saved, tmp_path):
    folder = copy_of(saved["lora"][0], tmp_path / "a")
    (folder / io.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no adapter_model.safetensors"):
        read_adapter(folder)
    (folder / io.PICKLE).touch()
    with pytest.raises(UserError, match=r"pickle, which can run code.*weights_only=True"):
        read_adapter(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -10])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_truncated_weights(kept, method, saved, unet, plain_unet, tmp_path):
    folder = copy_of(saved[method][0], tmp_path / "a")
    (folder / io.WEIGHTS).write_bytes((folder / io.WEIGHTS).read_bytes()[:kept])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_adapter(unet, folder)
    assert_untouched(unet, plain_unet)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_for_another_base(method, unet, plain_unet, tmp_path):
    config = dict(plain_unet.config) | {"block_out_channels": (32, 128, 192)}
    other = type(plain_unet).from_config(config)
    save_adapter(make(other, method), tmp_path / "a", BASE | {"name": "wider"})
    with pytest.raises(UserError, match=r"does not fit this UNet: .* for another base \(wider\)") as error:
        load_adapter(unet, tmp_path / "a")
    assert "tensors of another shape" in str(error.value)
    assert len(str(error.value)) < 800
    assert_untouched(unet, plain_unet)


@pytest.mark.parametrize("method", ["ether+", "lora", "full"])
@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_keys_are_never_ignored(method, change, saved, unet, plain_unet, tmp_path):
    folder = copy_of(saved[method][0], tmp_path / "a")
    tensors = load_file(folder / io.WEIGHTS)
    key = sorted(tensors)[0]
    if change == "missing":
        del tensors[key]
    else:
        tensors["extra.weight"] = torch.zeros(1)
    save_file(tensors, folder / io.WEIGHTS)
    message = "1 tensors missing" if change == "missing" else r"1 tensors for which there is no place \(extra.weight\)"
    with pytest.raises(UserError, match=message):
        load_adapter(unet, folder)
    assert_untouched(unet, plain_unet)


def test_a_second_adapter_that_does_not_fit_leaves_the_first(saved, unet, tmp_path):
    folder, expected = saved["ether+"]
    model = load_adapter(unet, folder)
    broken = copy_of(folder, tmp_path / "a")
    save_file({"extra.weight": torch.zeros(1)}, broken / io.WEIGHTS)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(model, broken, "second")
    assert adapter_names(model) == ["default"]
    assert torch.equal(predict(unet), expected)
    load_adapter(model, folder, "second")
    assert adapter_names(model) == ["default", "second"]


def test_a_tuner_that_stops_half_way_is_taken_out(saved, unet, plain_unet, tmp_path):
    folder = copy_of(saved["oft"][0], tmp_path / "a")
    config = json.loads((folder / io.CONFIG).read_text())
    (folder / io.CONFIG).write_text(json.dumps(config | {"target_modules": ["to_q", "conv_norm_out"]}))
    with pytest.raises(UserError, match="does not fit this UNet"):
        load_adapter(unet, folder)
    assert_untouched(unet, plain_unet)


# --- Replacing a folder -----------------------------------------------------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_saving_again_replaces_the_whole_folder(saved, unet, tmp_path):
    folder = copy_of(saved["lora"][0], tmp_path / "a")
    (folder / "README.md").touch()
    save_adapter(load_adapter(unet, saved["ether+"][0]), folder)
    assert read_adapter(folder).method == "ether+"
    assert read_adapter(folder).base is None
    assert sorted(path.name for path in folder.iterdir()) == [io.CONFIG, io.WEIGHTS]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_crash_while_writing_leaves_the_old_adapter(saved, unet, tmp_path, monkeypatch):
    folder = copy_of(saved["lora"][0], tmp_path / "a")
    before = contents(folder)
    model = load_adapter(unet, saved["ether+"][0])

    def half_way(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half_way)
    with pytest.raises(OSError, match="no space"):
        save_adapter(model, folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_failing_exchange_puts_the_old_adapter_back(saved, unet, tmp_path, monkeypatch):
    folder = copy_of(saved["lora"][0], tmp_path / "a")
    before = contents(folder)
    model = load_adapter(unet, saved["ether+"][0])
    rename = type(folder).rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise OSError("denied")
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", failing)
    with pytest.raises(OSError, match="denied"):
        save_adapter(model, folder)
    assert contents(folder) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_with_other_files_is_not_replaced(saved, unet, tmp_path):
    (tmp_path / "thesis.tex").touch()
    model = load_adapter(unet, saved["lora"][0])
    with pytest.raises(UserError, match=r"holds thesis.tex: choose a folder of its own"):
        save_adapter(model, tmp_path)
    with pytest.raises(UserError, match="is a file"):
        save_adapter(model, tmp_path / "thesis.tex")
