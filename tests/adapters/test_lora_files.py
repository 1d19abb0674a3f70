"""LoRA files of other programs on a UNet."""

import pytest
import torch
from safetensors.torch import save_file

from etherdiff.adapters.io import load_adapter, merge_adapter, read_adapter
from etherdiff.config import MergeOptions
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.system.errors import UserError
from etherdiff.use.merge import merge_run

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_" + LAYER.replace(".", "_")


def lora(names, features):
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(2, features, generator=generator)
    return dict(zip(names, (down, torch.randn(features, 2, generator=generator)), strict=True))


@pytest.mark.parametrize(
    ("names", "alpha"),
    [
        ((f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"), f"{KOHYA}.alpha"),
        ((f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"), None),
        ((f"unet.{LAYER}.lora.down.weight", f"unet.{LAYER}.lora.up.weight"), None),
    ],
    ids=["kohya", "diffusers", "old diffusers"],
)
def test_a_lora_file_adds_its_product_times_alpha_over_rank(names, alpha, tmp_path):
    unet = load_base(find_base("tiny")).unet
    weight = unet.get_submodule(LAYER).weight.detach().clone()
    tensors = lora(names, len(weight))
    save_file(tensors | ({alpha: torch.tensor(1.0)} if alpha else {}), tmp_path / "a.safetensors")
    merged = merge_adapter(load_adapter(unet, tmp_path / "a.safetensors", scale=0.5))
    down, up = tensors.values()
    expected = weight + 0.5 * (0.5 if alpha else 1.0) * up @ down
    assert torch.allclose(merged.get_submodule(LAYER).weight, expected, atol=1e-5)


def test_a_file_is_merged_into_a_base(tmp_path):
    features = len(load_base(find_base("tiny")).unet.get_submodule(LAYER).weight)
    save_file(lora((f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"), features), tmp_path / "a.safetensors")
    options = MergeOptions(base="tiny", adapter=(tmp_path / "a.safetensors",), output=tmp_path / "merged")
    report = merge_run(None, options)
    assert report["relative_difference"] < 1e-5
    assert (tmp_path / "merged/model_index.json").is_file()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "also changes the text encoder"),
        (f"{KOHYA}.hada_w1_a", "is no plain LoRA"),
    ],
)
def test_what_is_no_lora_of_the_unet_alone_is_refused(key, message, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "a.safetensors")
