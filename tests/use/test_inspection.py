import gc
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import METHODS, TARGETS, MethodOptions, add_adapter, magnitude_config
from etherdiff.config import InspectOptions, read_config
from etherdiff.families.bases import find_base
from etherdiff.system.errors import UserError
from etherdiff.use import flops as flops_module
from etherdiff.use import inspection
from etherdiff.use.flops import MATRIX_WORK, measure_throughput
from etherdiff.use.inspection import inspect_base, render_inspection, training_estimate

NAMES = [*METHODS, "magnitude"]
BOFT_WARNING = "ignore:(Failed to load the CUDA|Setting boft_n):UserWarning"


def count(base: str = "tiny", **options):
    return inspect_base(InspectOptions(base=base, **options))


@pytest.fixture(scope="module")
def tiny():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing noisy reaches the user
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        return count("tiny")


@pytest.fixture
def without_steps(monkeypatch):
    """Parameters and sizes only: they take a fraction of the time."""
    monkeypatch.setattr(inspection, "_step_cost", lambda *args, **kwargs: None)


def real_model(name):
    """The method in a tiny UNet with storage: the UNet, and what saves the adapter."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(find_base("tiny").config("unet")).train()
    if name == "magnitude":
        return unet, get_peft_model(unet.requires_grad_(False), magnitude_config(TARGETS["attention"]))
    return unet, add_adapter(unet, name, MethodOptions())


def real_loss(unet):
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.randn(1, 77, unet.config.cross_attention_dim)
    return unet(*inputs, return_dict=False)[0].square().mean()


def saved_by_autograd(unet):
    """Bytes of the distinct allocations that autograd holds after a forward pass, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    held = {}

    def pack(tensor):
        held.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = real_loss(unet)
    del loss
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in held.items() if pointer not in own)


# --- Parameters ------------------------------------------------------------------------------------------------------

COLUMNS = ("ether", "ether+", "ether+one-sided", "lora", "oft", "naive", "magnitude")
PAPER = {
    "attention": (128, (99_456, 398_592, 198_912, 797_184, 11_602_368, 23_304_192, 99_840)),
    "attention+geglu": (144, (111_936, 623_232, 223_872, 1_246_464, 13_144_928, 26_401_792, 199_680)),
    "attention+feedforward": (160, (161_856, 748_032, 323_712, 1_496_064, 37_900_768, 75_963_392, 212_160)),
}


@pytest.mark.parametrize("targets", PAPER)
def test_parameters_on_stable_diffusion_15(targets, without_steps):
    result = count("sd15", targets=targets, method=list(COLUMNS))
    layers, counts = PAPER[targets]
    assert (result["targets"], result["layers"], result["unet_parameters"]) == (targets, layers, 859_520_964)
    assert {name: row["trainable_parameters"] for name, row in result["methods"].items()} == dict(
        zip(COLUMNS, counts, strict=True)
    )


@pytest.mark.parametrize(("task", "targets"), [("dreambooth", "attention"), ("s2i", "attention+geglu")])
def test_task_chooses_targets_and_base_the_resolution(task, targets, without_steps):
    result = count("sd21", task=task, method=["ether"])
    assert (result["targets"], result["resolution"], result["unet_parameters"]) == (targets, 768, 865_910_724)


def test_options_go_to_the_methods_that_have_them(without_steps):
    plain, changed = (count("tiny", **options)["methods"] for options in ({}, {"rank": 2, "blocks": 2}))
    assert 2 * changed["lora"]["trainable_parameters"] == plain["lora"]["trainable_parameters"]
    assert changed["naive"]["trainable_parameters"] == 2 * plain["naive"]["trainable_parameters"]
    assert changed["ether"]["trainable_parameters"] == plain["ether"]["trainable_parameters"]


# --- Size on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(BOFT_WARNING)
@pytest.mark.parametrize("name", NAMES)
def test_adapter_bytes_are_those_of_the_file(tiny, name, tmp_path):
    _, model = real_model(name)
    save_adapter(model, tmp_path / "ours")
    expected = tiny["methods"][name]["adapter_bytes"]
    assert (tmp_path / "ours/adapter_model.safetensors").stat().st_size == expected
    if isinstance(model, PeftModel):
        model.save_pretrained(tmp_path / "peft")
        assert (tmp_path / "peft/adapter_model.safetensors").stat().st_size == expected


# --- A step ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(BOFT_WARNING)
@pytest.mark.parametrize("name", NAMES)
def test_step_is_that_of_real_tensors(tiny, name):
    unet, _ = real_model(name)
    row = tiny["methods"][name]
    with FlopCounterMode(display=False, custom_mapping=flops_module.OWN_FORMULAS) as counter:
        real_loss(unet).backward()
    assert row["step_flops"] == counter.get_total_flops()
    gc.collect()
    assert row["saved_bytes"] == saved_by_autograd(unet)


def test_flops_of_a_frozen_linear_layer_with_lora():
    tokens, features, out, rank = 10, 6, 4, 2
    base, down, up = nn.Linear(features, out), nn.Linear(features, rank, bias=False), nn.Linear(rank, out, bias=False)
    base.requires_grad_(False)
    x = torch.randn(tokens, features, requires_grad=True)
    with flops_module._Flops() as flops:
        y = base(x) + up(down(x))
        assert flops.total == 2 * tokens * (features * out + features * rank + rank * out)
        forward = flops.total
        y.sum().backward()
    # the frozen weight gets no gradient, its input does; both of the others' do
    assert flops.total - forward == 2 * tokens * (features * out + 2 * (features * rank + rank * out))


def test_flops_of_fused_attention():
    heads, queries, keys, width = 2, 16, 8, 8
    q, k, v = (torch.randn(1, heads, n, width, requires_grad=True) for n in (queries, keys, keys))
    product = 2 * heads * queries * keys * width
    with flops_module._Flops() as flops:
        y = F.scaled_dot_product_attention(q, k, v)
        assert flops.total == 2 * product  # scores, and their mean of the values
        y.sum().backward()
    assert flops.total == 2 * product + 5 * product  # the scores once more, and four gradients


ATTENTIONS = [
    name.removeprefix("aten::")
    for name in torch._C._dispatch_get_all_op_names()
    # not: overloads, and the one that falls apart into products
    if re.fullmatch(r"aten::_scaled_dot_product_\w+", name) and name != "aten::_scaled_dot_product_attention_math"
]


@pytest.mark.parametrize("name", ATTENTIONS)
def test_flops_of_every_fused_attention_of_torch(name):
    batch, heads, queries, keys, width, value_width = 2, 3, 5, 7, 11, 13
    q, k, v, y = (
        torch.empty(batch, heads, tokens, size, device="meta")
        for tokens, size in ((queries, width), (keys, width), (keys, value_width), (queries, value_width))
    )
    formula = flops_module.FLOP_FORMULAS[getattr(torch.ops.aten, name)]
    of_keys, of_values = (2 * batch * heads * queries * keys * size for size in (width, value_width))
    if name.endswith("_backward"):
        # the scores again and the gradients of queries and keys; those of the scores and of the values
        assert formula(y, q, k, v, out_val=None) == 3 * of_keys + 2 * of_values
    else:
        assert formula(q, k, v, out_val=None) == of_keys + of_values


def test_all_of_torchs_own_formulas_are_used():
    assert {op: flops_module.FLOP_FORMULAS[op] for op in flop_registry} == flop_registry


def test_matrix_work_without_a_formula_is_named(monkeypatch, capsys):
    flops_module._warn_of_uncounted.cache_clear()
    monkeypatch.delitem(flops_module.FLOP_FORMULAS, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
    whole = count("tiny", method=["lora", "ether"])["methods"]["lora"]["step_flops"]
    said = capsys.readouterr().err
    assert said.count("step_flops leaves aten._scaled_dot_product_flash_attention_for_cpu out") == 1  # not once per method
    assert "attention_for_cpu_backward" not in said
    monkeypatch.undo()
    assert count("tiny", method=["lora"])["methods"]["lora"]["step_flops"] > whole
    assert capsys.readouterr().err == ""


def test_words_of_matrix_work():
    work = "mm addmm _scaled_mm _weight_int8pack_mm linalg_qr _trilinear mkldnn_convolution linalg_inv_ex"
    assert all(MATRIX_WORK.search(name) for name in work.split())
    others = "upsample_bilinear2d linalg_vector_norm _fused_sdp_choice convert_element_type mul _softmax view"
    assert not any(MATRIX_WORK.search(name) for name in others.split())


def test_flops_of_a_solve():
    n, columns = 6, 3
    a, b = torch.eye(n).requires_grad_(), torch.randn(n, columns, requires_grad=True)
    with flops_module._Flops() as flops:
        y = torch.linalg.solve(a, b)
        solves = 2 * n**2 * columns
        assert flops.total == 2 * n**3 // 3 + solves
        y.sum().backward()
    assert flops.total == 2 * n**3 // 3 + 2 * solves + 2 * n * n * columns  # the last: a's gradient, an outer product


def test_frozen_weights_cost_no_gradient_and_ether_saves_least(tiny):
    rows = tiny["methods"]
    saved = {name: row["saved_bytes"] for name, row in rows.items()}
    assert saved["ether"] <= saved["ether+"] <= saved["lora"] < saved["full"] < saved["hra"]
    flops = {name: row["step_flops"] for name, row in rows.items()}
    assert flops["ether"] < flops["ether+one-sided"] < flops["ether+"] < flops["oft"] < flops["full"]


def test_step_grows_with_batch_and_resolution(tiny):
    once = tiny["methods"]["full"]["step_flops"]
    larger = count("tiny", method=["full"], batch_size=2)["methods"]["full"]["step_flops"]
    wider = count("tiny", method=["full"], resolution=128)["methods"]["full"]["step_flops"]
    assert larger == 2 * once
    assert wider > 4 * once  # attention grows with the fourth power


def test_boft_with_a_compiled_extension_is_not_counted(monkeypatch):
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", object)
    row = count("tiny", method=["boft"])["methods"]["boft"]
    assert (row["step_flops"], row["saved_bytes"]) == (None, None)
    assert "cannot be counted" in row["note"]
    estimate = training_estimate(find_base("tiny"), "boft", MethodOptions(), resolution=64, batch_size=1)
    assert (estimate["total"], estimate["step_flops"]) == (None, None)


# --- A training run --------------------------------------------------------------------------------------------------


def estimate(method="lora", **options):
    settings = {"resolution": 64, "batch_size": 1, **options}
    return training_estimate(find_base("tiny"), method, MethodOptions(), **settings)


@pytest.fixture(scope="module")
def plain():
    return estimate()


def test_estimate_adds_up(tiny, plain):
    result, row = plain, tiny["methods"]["lora"]
    assert result["trainable_parameters"] == row["trainable_parameters"]
    assert result["step_flops"] == row["step_flops"]
    assert result["activations"] == row["saved_bytes"]
    assert result["weights"] == 4 * tiny["unet_parameters"]
    assert result["trainable_and_optimizer"] == (4 + 4 + 8) * row["trainable_parameters"]
    assert result["total"] == sum(result[part] for part in ("weights", "trainable_and_optimizer", "activations"))


def test_estimate_of_full_fine_tuning_has_no_frozen_weights(tiny):
    result = estimate("full", weight_bytes=2, optimizer_bytes=2)
    assert result["weights"] == 0
    assert result["trainable_and_optimizer"] == (4 + 4 + 2) * tiny["unet_parameters"]


def test_half_precision_halves_weights_and_shrinks_activations(tiny, plain):
    result = estimate(weight_bytes=2)
    assert result["weights"] == 2 * tiny["unet_parameters"]
    assert plain["activations"] / 2 < result["activations"] < plain["activations"]  # norms stay in float32
    assert result["step_flops"] == plain["step_flops"]


def test_checkpointing_trades_activations_for_recomputation(plain):
    checkpointed = estimate(gradient_checkpointing=True)
    unet, _ = real_model("lora")
    unet.enable_gradient_checkpointing()
    inputs_of_blocks = saved_by_autograd(unet)
    assert inputs_of_blocks < checkpointed["activations"] < plain["activations"]
    with FlopCounterMode(display=False, custom_mapping=flops_module.OWN_FORMULAS) as counter:
        real_loss(unet).backward()
    assert plain["step_flops"] < counter.get_total_flops() <= checkpointed["step_flops"]  # torch stops early in a block
    assert checkpointed["step_flops"] == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_throughput():
    assert 1e6 < measure_throughput("cpu", torch.float32) < 1e15


# --- What is said ----------------------------------------------------------------------------------------------------


def test_result_is_json_with_every_method(tiny):
    assert json.loads(json.dumps(tiny)) == tiny
    assert list(tiny["methods"]) == NAMES
    assert {name for name, row in tiny["methods"].items() if row["lora_exact"]} == {
        "ether", "ether+", "ether+one-sided", "lora", "hra", "vera"
    }  # fmt: skip
    assert tiny["methods"]["ether"]["default_learning_rate"] == 6e-3
    assert tiny["methods"]["magnitude"]["default_learning_rate"] is None


def test_path_is_where_the_base_is_if_it_is_local(tiny, tmp_path, without_steps):
    folder = find_base("tiny").folder
    assert tiny["path"] == str(folder)
    assert count(str(folder), method=["ether"])["path"] == str(folder)
    assert count("sd15", method=["ether"])["path"] is None
    file = tmp_path / "model.safetensors"
    keys = {
        "model.diffusion_model.input_blocks.0.0.weight": (1, 4),
        "first_stage_model.encoder.conv_in.weight": (1,),
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (1,),
    }
    save_file({key: torch.zeros(shape) for key, shape in keys.items()}, file)
    result = count(str(file), method=["ether"])
    assert (result["path"], result["layers"]) == (str(file), 128)


def test_table(tiny):
    console = Console(width=140, record=True)
    console.print(render_inspection(tiny))
    text = console.export_text()
    assert all(name in text for name in NAMES)
    assert "64 px" in text
    assert f"{tiny['methods']['lora']['trainable_parameters']:,}" in text


def test_every_mistake_is_said_at_once():
    wrong = {"base": "tiny", "task": "paint", "method": ["ether", "dorra"], "targets": "everything", "batch_size": 0}
    with pytest.raises(UserError) as caught:
        read_config(InspectOptions, None, [], wrong)
    named = [problem.split(":")[0].split(".")[0] for problem in caught.value.problems]
    assert list(dict.fromkeys(named)) == ["task", "method", "targets", "batch_size"]
    with pytest.raises(UserError) as caught:
        inspect_base(InspectOptions(base="tiny", method=["ether", "lora"], blocks=2, rank=4, resolution=65))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base": str(Path("no") / "such" / "base!")}, "neither a folder"),
        ({"resolution": 65}, "multiple of 16"),
        ({"method": ["ether"], "rank": 4}, "does not have rank"),
        ({"method": ["magnitude"], "blocks": 4}, "neither blocks nor rank"),
        ({"method": ["ether+"], "blocks": 5}, "do not divide into 5 blocks"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        count(**arguments)
