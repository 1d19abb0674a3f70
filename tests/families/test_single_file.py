import json
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from etherdiff.families.bases import identify_single_file, shipped_config
from etherdiff.families.sd1 import text_encoder_state_dict
from etherdiff.families.single_file import original_state_dict, write_single_file
from etherdiff.system.errors import UserError

COMPONENTS = ("unet", "vae", "text_encoder")
FIRST_CONV = "model.diffusion_model.input_blocks.0.0.weight"


def tiny_unet(layers=1, width=32, linear=False, channels=4, **options):
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": channels,
            "block_out_channels": (32, 64, 64),
            "layers_per_block": layers,
            "cross_attention_dim": width,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
            "use_linear_projection": linear,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            **options,
        }
    )


def tiny_vae(layers=1):
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        layers_per_block=layers,
        norm_num_groups=8,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def tiny_text_encoder(width=32, layers=2):
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=100,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            hidden_act="gelu" if width == 1024 else "quick_gelu",
            bos_token_id=0,
            eos_token_id=2,
        )
    )


def tiny_models(layers=1, width=32, **options):
    """The three models with weights that all differ, biases and norms too."""
    torch.manual_seed(0)
    models = SimpleNamespace(
        unet=tiny_unet(layers, width, **options), vae=tiny_vae(layers), text_encoder=tiny_text_encoder(width)
    )
    for name in COMPONENTS:
        for parameter in getattr(models, name).eval().parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return models


def config_folder(models, folder):
    """A diffusers folder of these models without their weights, so that these can only come from the file."""
    shipped = shipped_config("sd15")
    StableDiffusionPipeline(
        **vars(models),
        tokenizer=CLIPTokenizer.from_pretrained(shipped / "tokenizer"),
        scheduler=PNDMScheduler.from_pretrained(shipped / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    return folder


def outputs(models, width):
    """One pass of each model."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    text = torch.randn(1, 7, width, generator=generator)
    with torch.no_grad():
        noise = models.unet(latents, torch.tensor([500]), text).sample
        image = models.vae.decode(latents).sample
        moments = models.vae.encode(image).latent_dist.parameters
        embedding = models.text_encoder(torch.arange(7)[None]).last_hidden_state
    return noise, image, moments, embedding


@pytest.mark.parametrize(
    ("layers", "width", "linear"), [(1, 32, False), (2, 32, True), (1, 1024, True)], ids=["sd1", "sd1-deep", "sd2"]
)
def test_diffusers_reads_back_the_same_weights_and_outputs(tmp_path, layers, width, linear):
    models = tiny_models(layers, width, linear=linear)
    folder = config_folder(models, tmp_path / "config")
    file = tmp_path / "new" / "model.safetensors"
    write_single_file(models.unet, models.vae, models.text_encoder, file)

    assert identify_single_file(file) == ("sd2" if width == 1024 else "sd1")
    assert [path.name for path in file.parent.iterdir()] == ["model.safetensors"]
    pipeline = StableDiffusionPipeline.from_single_file(str(file), config=str(folder), local_files_only=True)
    for name in COMPONENTS:
        ours, theirs = getattr(models, name).state_dict(), getattr(pipeline, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
        for parameter in getattr(pipeline, name).parameters():  # mapped from the file unaligned, which may change the last bits
            parameter.data = parameter.data.clone()
    for ours, theirs in zip(outputs(models, width), outputs(pipeline, width), strict=True):
        assert torch.equal(ours, theirs)


def test_dtype_casts_weights_but_not_position_ids(tmp_path):
    models = tiny_models()
    file = tmp_path / "half.safetensors"
    write_single_file(**vars(models), path=file, dtype=torch.float16)
    written = load_file(file)
    ids = written.pop("cond_stage_model.transformer.text_model.embeddings.position_ids")
    assert torch.equal(ids, torch.arange(77)[None])
    assert {value.dtype for value in written.values()} == {torch.float16}
    assert torch.equal(written[FIRST_CONV], models.unet.conv_in.weight.half())


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_text("old")

    def fail(state, path, metadata):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        write_single_file(**vars(tiny_models()), path=file)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert file.read_text() == "old"


def test_only_safetensors_is_written(tmp_path):
    with pytest.raises(UserError, match=r"\*\.safetensors, not model\.ckpt"):
        write_single_file(**vars(tiny_models()), path=tmp_path / "model.ckpt")


# Names and shapes of the published files, written by hand: an independent check of the layout.
PUBLISHED = {
    "model.diffusion_model.time_embed.2.weight": (1280, 1280),
    "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
    "model.diffusion_model.input_blocks.3.0.op.weight": (320, 320, 3, 3),
    "model.diffusion_model.input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
    "model.diffusion_model.input_blocks.11.0.in_layers.2.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.0.proj.weight": (10240, 1280),
    "model.diffusion_model.output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
    "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
    "model.diffusion_model.out.2.bias": (4,),
    "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
    "first_stage_model.encoder.conv_out.weight": (8, 512, 3, 3),
    "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
    "first_stage_model.decoder.mid.attn_1.norm.weight": (512,),
    "first_stage_model.post_quant_conv.weight": (4, 4, 1, 1),
}
PUBLISHED_SD15 = {
    "model.diffusion_model.input_blocks.2.1.proj_in.weight": (320, 320, 1, 1),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
    "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
}
PUBLISHED_SD21 = {
    "model.diffusion_model.input_blocks.2.1.proj_in.weight": (320, 320),
    "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
    "cond_stage_model.model.positional_embedding": (77, 1024),
    "cond_stage_model.model.token_embedding.weight": (49408, 1024),
    "cond_stage_model.model.ln_final.weight": (1024,),
    "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": (3072,),
    "cond_stage_model.model.transformer.resblocks.0.attn.out_proj.weight": (1024, 1024),
    "cond_stage_model.model.transformer.resblocks.0.ln_2.weight": (1024,),
    "cond_stage_model.model.transformer.resblocks.0.mlp.c_proj.weight": (1024, 4096),
}


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize(("name", "published", "text_tensors"), [("sd15", PUBLISHED_SD15, 197), ("sd21", PUBLISHED_SD21, 294)])
def test_full_size_layout(name, published, text_tensors):
    folder = shipped_config(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    state = original_state_dict(unet, vae, text_encoder)

    assert (PUBLISHED | published).items() <= shapes(state).items()
    assert len(state) == 686 + 248 + text_tensors
    assert shapes(convert_ldm_unet_checkpoint(dict(state), unet.config)) == shapes(unet.state_dict())
    first_stage = {key: value for key, value in state.items() if key.startswith("first_stage_model.")}
    assert shapes(convert_ldm_vae_checkpoint(first_stage, vae.config)) == shapes(vae.state_dict())
    if name == "sd15":
        text = convert_ldm_clip_checkpoint(state)
        text.pop("text_model.embeddings.position_ids")
    else:
        text = convert_open_clip_checkpoint(text_encoder, state)
    assert shapes(text) == shapes(text_encoder_state_dict(text_encoder))


def test_blocks_that_the_layout_lacks_are_refused():
    kinds = {"down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    with pytest.raises(UserError, match="AttnDownBlock2D"):
        original_state_dict(tiny_unet(**kinds), tiny_vae(), tiny_text_encoder())
    with pytest.raises(UserError, match=r"cannot hold this UNet \(\[1, 2, 1\]\)"):
        original_state_dict(tiny_unet(layers=[1, 2, 1]), tiny_vae(), tiny_text_encoder())
    with pytest.raises(UserError, match="no place for class_embedding"):
        original_state_dict(tiny_unet(num_class_embeds=3), tiny_vae(), tiny_text_encoder())


def test_an_unmerged_adapter_is_refused():
    from peft import LoraConfig

    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=1, target_modules=["to_q"]))
    with pytest.raises(UserError, match="merge it"):
        original_state_dict(unet, tiny_vae(), tiny_text_encoder())


def test_the_last_open_clip_layer_is_refused():
    with torch.device("meta"):
        text_encoder = tiny_text_encoder(1024, layers=24)
    with pytest.raises(UserError, match=r"no place for text_model\.encoder\.layers\.23"):
        original_state_dict(tiny_unet(), tiny_vae(), text_encoder)


def write_named(path, names):
    """A safetensors file of zeros: name -> shape, or names alone."""
    names = names if isinstance(names, dict) else dict.fromkeys(names, (2,))
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, path)
    return path


TEXT_1 = "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight"
TEXT_2 = "cond_stage_model.model.token_embedding.weight"
VAE_CONV = "first_stage_model.encoder.conv_in.weight"


def complete(channels=4, text=TEXT_1):
    return {FIRST_CONV: (8, channels, 3, 3), VAE_CONV: (8, 3, 3, 3), text: (7, 8)}


@pytest.mark.parametrize(("text", "expected"), [(TEXT_1, "sd1"), (TEXT_2, "sd2")])
def test_identify(tmp_path, text, expected):
    assert identify_single_file(write_named(tmp_path / "a.safetensors", complete(text=text))) == expected


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (
            [FIRST_CONV, "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"],
            "is Stable Diffusion XL",
        ),
        (["model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight"], "is Stable Diffusion 3"),
        (["joint_blocks.0.x_block.mlp.fc1.weight"], "is Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "is Flux"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "is Flux"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "an adapter"),
        (["unet.mid_block.attentions.0.proj_in.lora.down.weight"], "an adapter"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "an adapter"),
        (["lycoris_mid_block.hada_w1_a"], "an adapter"),
        (["base_model.model.mid_block.attentions.0.to_q.ether_u"], "an adapter"),
        (["unet.mid_block.attentions.0.to_q.oft_R.weight"], "an adapter"),
        (["emb_params"], "textual inversion"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        ([FIRST_CONV], "it has UNet alone, no autoencoder and no text encoder"),
        (["input_blocks.0.0.weight"], "a UNet alone"),
        (["conv_in.weight", "time_embedding.linear_1.weight"], "a UNet alone"),
        ([VAE_CONV], "it has autoencoder alone"),
        (["encoder.conv_in.weight", "quant_conv.bias"], "an autoencoder .VAE. alone"),
        (["text_model.embeddings.token_embedding.weight"], "a text encoder alone"),
        ([FIRST_CONV, VAE_CONV], "UNet and autoencoder alone, no text encoder"),
        ({**complete(), "model.diffusion_model.label_emb.0.0.weight": (2,)}, "unCLIP"),
        (complete(9), "an inpainting model: its UNet takes 9 input channels"),
        (complete(8, TEXT_2), "an instruct-pix2pix model"),
        (complete(5), "a depth-to-image model"),
        (complete(6), "a modified model"),
        (
            ["model.layers.0.self_attn.q_proj.weight"],
            "not a Stable Diffusion checkpoint: it has tensors such as model.l",
        ),
        ([], "it has no tensors"),
    ],
)
def test_identify_refuses_by_name(tmp_path, names, what):
    with pytest.raises(UserError, match=what) as caught:
        identify_single_file(write_named(tmp_path / "a.safetensors", names))
    assert "fine-tunes Stable Diffusion 1.x and 2.x" in str(caught.value)


def test_identify_refuses_pickles_unopened(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    shutil.copy(tmp_path / "model.ckpt", tmp_path / "renamed.safetensors")
    for name in ("model.ckpt", "renamed.safetensors"):
        with pytest.raises(UserError, match=r"pickle.*sandbox.*\.safetensors"):
            identify_single_file(tmp_path / name)


@pytest.mark.parametrize("kept", [0.5, 0.99])
def test_identify_refuses_truncated_files(tmp_path, kept):
    whole = write_named(tmp_path / "whole.safetensors", complete()).read_bytes()
    part = tmp_path / "part.safetensors"
    part.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(UserError, match="truncated"):
        identify_single_file(part)
    part.write_bytes(whole[:100])
    with pytest.raises(UserError, match="truncated"):
        identify_single_file(part)


@pytest.mark.parametrize("content", [b"", b"GGUF0000and so on", b"version https://git-lfs.github.com/spec/v1\n"])
def test_identify_refuses_other_files(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a safetensors file"):
        identify_single_file(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", [b"{nonsense", b'{"a": 3}', json.dumps({"a": {"shape": [1]}}).encode()])
def test_identify_refuses_damaged_headers(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="damaged"):
        identify_single_file(tmp_path / "a.safetensors")


def test_identify_refuses_what_is_no_file(tmp_path):
    with pytest.raises(UserError, match="is not a file"):
        identify_single_file(tmp_path)
    with pytest.raises(UserError, match="is not a file"):
        identify_single_file(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_shipped_folder_serves_from_single_file(tmp_path, name):
    """The shipped folder with tiny models' configurations in place of the full-size ones."""
    models = tiny_models(width=32 if name == "sd15" else 1024)
    folder = shutil.copytree(shipped_config(name), tmp_path / "config")
    models.unet.save_config(folder / "unet")
    models.vae.save_config(folder / "vae")
    models.text_encoder.config.save_pretrained(folder / "text_encoder")
    write_single_file(**vars(models), path=tmp_path / "a.safetensors")
    pipeline = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "a.safetensors"), config=str(folder), local_files_only=True
    )
    assert isinstance(pipeline.scheduler, PNDMScheduler if name == "sd15" else DDIMScheduler)
    assert pipeline.safety_checker is None
    assert len(pipeline.tokenizer) == 49_408


def test_stable_diffusion_2_has_what_readers_look_for():
    """As sd-scripts writes it; diffusers 0.28 to 0.32 do not open a file without the projection."""
    models = tiny_models(width=1024, linear=True)
    models.text_encoder = tiny_text_encoder(1024, layers=23)
    state = original_state_dict(**vars(models))
    prefix = "cond_stage_model.model."
    assert torch.equal(state[prefix + "text_projection"], torch.ones(1024, 1024))
    assert state[prefix + "logit_scale"] == 1
    layers = [{key for key in state if f".resblocks.{i}." in key} for i in (22, 23)]
    assert layers[1] == {key.replace(".22.", ".23.") for key in layers[0]} != set()
    assert all(torch.equal(state[key], state[key.replace(".22.", ".23.")]) for key in layers[0])
