import filecmp
import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from etherdiff.families.bases import ASSETS, find_base, identify_single_file, shipped_config
from etherdiff.families.sd1 import Base, load_base
from etherdiff.families.single_file import original_state_dict
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import console

PROMPTS = [
    "a photo of sks dog",
    "",
    "A Teddy-Bear, wearing   sunglasses!",
    "it's 1,234 dogs & they'll run... (in Zürich) 東京 🐶",
    "qwe sks xyz123 photorealistic, 8k",
    "word " * 100,
]


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "unet_parameters", "text_parameters"),
    [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840)],
)
def test_parameter_counts(name, unet_parameters, text_parameters):
    folder = shipped_config(name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    assert count_parameters(unet) == unet_parameters
    assert count_parameters(vae) == 83_653_863
    assert count_parameters(text_encoder) == text_parameters
    assert unet.config.cross_attention_dim == text_encoder.config.hidden_size
    assert 8 * unet.config.sample_size == vae.config.sample_size
    assert vae.config.scaling_factor == 0.18215


def test_sd15_is_epsilon_with_pndm():
    folder = shipped_config("sd15")
    scheduler = PNDMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.skip_prk_steps
    assert scheduler.config.steps_offset == 1
    # DDIM clips its samples unless told not to, which would spoil latents after a change of scheduler.
    assert DDIMScheduler.from_config(scheduler.config).config.clip_sample is False


def test_sd21_is_v_prediction_with_ddim():
    folder = shipped_config("sd21")
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert CLIPTextConfig.from_pretrained(folder / "text_encoder").hidden_act == "gelu"
    assert UNet2DConditionModel.load_config(folder / "unet")["upcast_attention"] is True


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_every_listed_component_has_its_configuration(name):
    folder = shipped_config(name)
    index = StableDiffusionPipeline.load_config(folder)
    listed = {key for key, value in index.items() if isinstance(value, list) and value[0]}
    assert listed == {path.name for path in folder.iterdir() if path.is_dir()}
    assert CLIPImageProcessor.from_pretrained(folder / "feature_extractor").size == {"shortest_edge": 224}


@pytest.mark.parametrize(("name", "pad"), [("sd15", 49407), ("sd21", 0)])
def test_tokenizer(name, pad):
    tokenizer = CLIPTokenizer.from_pretrained(shipped_config(name) / "tokenizer")
    assert len(tokenizer) == 49_408
    assert tokenizer.model_max_length == 77
    assert tokenizer("a photo of sks dog").input_ids == [49406, 320, 1125, 539, 48136, 1929, 49407]
    assert len(tokenizer("sks", add_special_tokens=False).input_ids) == 1
    assert len(tokenizer("qwe", add_special_tokens=False).input_ids) == 2
    padded = tokenizer("dog", padding="max_length").input_ids
    assert padded == [49406, 1929, 49407] + 74 * [pad]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokenizer_equals_open_clip(prompt):
    import open_clip

    tokenizer = CLIPTokenizer.from_pretrained(shipped_config("sd15") / "tokenizer")
    ours = tokenizer(prompt, truncation=True).input_ids
    assert ours + [0] * (77 - len(ours)) == open_clip.tokenize([prompt])[0].tolist()


def test_sd21_reads_an_exclamation_mark_as_padding_like_the_original():
    tokenizer = CLIPTokenizer.from_pretrained(shipped_config("sd21") / "tokenizer")
    assert tokenizer("a dog!").input_ids == [49406, 320, 1929, 0, 49407]


def test_second_call_writes_nothing_and_damage_is_repaired(tmp_path, monkeypatch):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path))
    folder = shipped_config("sd15")
    merges, vocabulary = folder / "tokenizer" / "merges.txt", folder / "tokenizer" / "vocab.json"
    written = merges.stat().st_mtime_ns
    vocabulary.write_text("{")
    assert shipped_config("sd15") == folder
    assert merges.stat().st_mtime_ns == written
    assert filecmp.cmp(vocabulary, ASSETS / "clip_tokenizer" / "vocab.json", shallow=False)
    assert not list(folder.rglob(".*"))
    json.loads((folder / "model_index.json").read_text())


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="ETHERDIFF_CACHE"):
        shipped_config("sd15")


@pytest.mark.parametrize(("resolution", "fits"), [(64, True), (16, True), (72, False), (0, False), (-16, False)])
def test_a_resolution_fits_the_base_or_the_reason_is_given(resolution, fits):
    problems = find_base("tiny").resolution_problems(resolution)
    assert problems == ([] if fits else [f"resolution: must be a multiple of 16 for this base, not {resolution}"])


def test_how_a_2x_single_file_is_read_is_said_with_what_2x_base_needs(tmp_path):
    shapes = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3),
        "cond_stage_model.model.token_embedding.weight": (10, 1024),
    }
    file = tmp_path / "v2-base-512-ema.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, file)
    with console.capture() as captured:
        assert find_base(str(file)).prediction_type == "v_prediction"
        find_base(str(file))
    told = " ".join(captured.get().split())
    assert told.count("predicts velocity at 768 px") == 1
    assert "--prediction-type epsilon --resolution 512" in told
    with console.capture() as captured:
        assert find_base(str(file), "epsilon").prediction_type == "epsilon"
    assert captured.get() == ""


@pytest.mark.parametrize("parts", ["configs", "weights"])
def test_a_base_that_training_cannot_read_is_refused_before(parts, tmp_path):
    folder = shutil.copytree(find_base("tiny").folder, tmp_path / "base")
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="vae/ holds only pickled weights"):
        find_base(str(folder), parts=parts)


def test_a_controllable_pipeline_is_no_base(tmp_path):
    folder = shutil.copytree(find_base("tiny").folder, tmp_path / "merged")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "StableDiffusionS2IPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"StableDiffusionS2IPipeline.*Give the run's own base"):
        find_base(str(folder))


def test_text_keys_without_text_model_are_read(tmp_path):
    model = load_base(find_base("tiny"))
    state = original_state_dict(model.unet, model.vae, model.text_encoder)
    file, old = tmp_path / "bare.safetensors", "cond_stage_model.transformer.text_model."
    save_file({key.replace(old, old.removesuffix("text_model.")): value.contiguous() for key, value in state.items()}, file)
    assert identify_single_file(file) == "sd1"
    read = load_base(Base("bare", find_base("tiny").folder, file))
    for name in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(model, name).state_dict(), getattr(read, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
