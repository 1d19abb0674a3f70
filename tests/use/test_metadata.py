"""What LoRA files and single files say about themselves, read back with safetensors."""

import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from etherdiff import __version__
from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import MethodOptions, add_adapter, trainable_parameters
from etherdiff.config import DreamBoothConfig, ExportOptions, MergeOptions
from etherdiff.families import sd1
from etherdiff.families.bases import find_base, shipped_config
from etherdiff.families.single_file import write_single_file
from etherdiff.images.reading import list_images, read_photos
from etherdiff.images.writing import save_png
from etherdiff.runs.folder import RunFolder, write_manifest, write_settings
from etherdiff.runs.run import Run
from etherdiff.use import metadata
from etherdiff.use.export import export_run
from etherdiff.use.merge import merge_run


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def run(tmp_path):
    """A finished run of three photos on the tiny base."""
    base, photos, folder = find_base("tiny"), tmp_path / "my dog", RunFolder(tmp_path / "runs/rex")
    photos.mkdir()
    folder.path.mkdir(parents=True)
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 80, 3), np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.png")
    config = DreamBoothConfig(
        base="tiny",
        subject=str(photos),
        class_noun="dog",
        output=folder.path,
        steps=40,
        learning_rate=0.006,
        resolution=64,
        class_images=20,
        warmup_steps=5,
        gradient_accumulation=2,
    )
    facts = {
        "processes": 1,
        "base": {"name": base.name, "fingerprint": sd1.fingerprint(base)},
        "images": read_photos(list_images(photos)).digest,
        "subject_prompt": "a photo of sks dog",
    }
    adapted = add_adapter(sd1.load_base(base).unet, "ether+", MethodOptions())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(adapted).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapted, folder.adapter, facts["base"])
    write_manifest(folder.adapter)
    write_settings(folder, "dreambooth", config, facts)
    folder.cost.write_text('{"steps": 40}')
    return folder


MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.resolution": "64x64",
    "modelspec.prediction_type": "epsilon",
    "modelspec.trigger_phrase": "sks dog",
}
TRAINED = {
    "ss_sd_model_name": "tiny",
    "ss_steps": "40",
    "ss_max_train_steps": "40",
    "ss_learning_rate": "0.006",
    "ss_unet_lr": "0.006",
    "ss_lr_scheduler": "constant_with_warmup",
    "ss_lr_warmup_steps": "5",
    "ss_batch_size_per_device": "1",
    "ss_gradient_accumulation_steps": "2",
    "ss_total_batch_size": "2",
    "ss_gradient_checkpointing": "False",
    "ss_mixed_precision": "no",
    "ss_max_grad_norm": "1.0",
    "ss_caption_dropout_rate": "0.0",
    "ss_seed": "0",
    "ss_resolution": "(64, 64)",
    "ss_num_train_images": "3",
    "ss_num_reg_images": "20",
    "ss_prior_loss_weight": "1.0",
    "ss_tag_frequency": '{"my dog": {"a photo of sks dog": 3}}',
}


def own_facts(base):
    fingerprint = json.dumps(sd1.fingerprint(base), sort_keys=True)
    return {"format": "pt", "made_by": f"etherdiff {__version__}", "base_model": "tiny", "base_fingerprint": fingerprint}


def test_a_runs_lora_file_says_how_it_was_trained(run, tmp_path):
    path = export_run(run.path, ExportOptions(output=tmp_path / "rex v1.safetensors"))["path"]
    assert header(path) == MODELSPEC | TRAINED | own_facts(find_base("tiny")) | {
        "note": "exact only on this base",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "rex v1",
        "ss_output_name": "rex v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
    }
    again = export_run(run.path, ExportOptions(output=tmp_path / "again" / "rex v1.safetensors"))["path"]
    assert header(again) == header(path)


def test_a_runs_single_file_says_the_same(run, tmp_path):
    path = tmp_path / "rex.safetensors"
    merge_run(run.path, MergeOptions(output=tmp_path / "merged", single_file=path))
    assert header(path) == MODELSPEC | TRAINED | own_facts(find_base("tiny")) | {
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": "rex",
        "ss_output_name": "rex",
    }


def test_a_run_whose_cost_cannot_be_read_is_described_without_it(run):
    run.cost.unlink()
    found = metadata.file_metadata(find_base("tiny"), "lora", "rex", Run.open(run.path))
    assert "ss_steps" not in found
    assert found["ss_num_train_images"] == "3"


def test_photos_that_have_changed_are_not_counted(run, tmp_path):
    (tmp_path / "my dog/2.png").unlink()
    found = metadata.file_metadata(find_base("tiny"), "lora", "rex", Run.open(run.path))
    assert found["ss_max_train_steps"] == "40"
    assert not {"ss_num_train_images", "ss_tag_frequency"} & found.keys()


def test_the_thumbnail_is_a_small_picture_of_the_last_samples(run):
    for step, colour in (("step-000020", "blue"), ("step-000040", "red")):
        path = run.samples / step / "000-a-photo" / "0.png"
        path.parent.mkdir(parents=True)
        save_png(Image.new("RGB", (512, 256), colour), path, {})
    found = metadata.file_metadata(find_base("tiny"), "checkpoint", "rex", Run.open(run.path))
    kind, content = found["modelspec.thumbnail"].split(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert image.size == (256, 128)
    assert image.getpixel((100, 60))[0] > 240 > 20 > image.getpixel((100, 60))[2]


def test_a_single_files_hashes_are_those_of_sd_scripts(tmp_path):
    model, path = sd1.load_base(find_base("tiny")), tmp_path / "base.safetensors"
    write_single_file(model.unet, model.vae, model.text_encoder, path)
    base = sd1.Base(str(path), find_base("tiny").folder, path)
    found, content = metadata.file_metadata(base, "lora", "x"), path.read_bytes()
    assert found["ss_sd_model_name"] == "base.safetensors"
    assert found["ss_new_sd_model_hash"] == hashlib.sha256(content).hexdigest()
    assert found["ss_sd_model_hash"] == hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize(
    ("name", "prediction_type", "version", "v2", "architecture", "predicts", "licence"),
    [
        ("sd15", None, "sd_v1", "False", "stable-diffusion-v1", "epsilon", "CreativeML Open RAIL-M"),
        ("sd21", "epsilon", "sd_v2", "True", "stable-diffusion-v2-512", "epsilon", "CreativeML Open RAIL++-M"),
        ("sd21", "v_prediction", "sd_v2_v", "True", "stable-diffusion-v2-768-v", "v", "CreativeML Open RAIL++-M"),
    ],
)
def test_files_name_the_version_of_their_base(monkeypatch, name, prediction_type, version, v2, architecture, predicts, licence):
    monkeypatch.setattr(metadata, "fingerprint", lambda base: {})  # the weights are not shipped
    base = sd1.Base(name, shipped_config(name), prediction_type=prediction_type)
    for kind, ending in (("lora", "/lora"), ("checkpoint", "")):
        found = metadata.file_metadata(base, kind, "x")
        assert found["ss_base_model_version"] == version
        assert found["ss_v2"] == v2
        assert found["modelspec.architecture"] == architecture + ending
        assert found["modelspec.prediction_type"] == predicts
        assert found["modelspec.license"] == licence
        assert not [key for key in found if re.search("date|started|finished", key)]


@pytest.mark.parametrize("steps", [10, 25])
@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_the_webuis_schedule_is_the_one_drawn_with(name, steps):
    """Its "SGM Uniform" is linspace(999, 0, steps + 1) without the end; its first noise is multiplied as ours, by one."""
    schedule = sd1.load_noise_scheduler(sd1.Base(name, shipped_config(name)))
    scheduler = sd1.DPMSolverMultistepScheduler.from_config(schedule.config)
    scheduler.set_timesteps(steps)
    assert np.abs(scheduler.timesteps.numpy() - np.linspace(999, 0, steps + 1)[:-1]).max() <= 0.5
    assert scheduler.init_noise_sigma == 1
