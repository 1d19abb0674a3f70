"""Merged pipelines, single files and LoRA files, opened with plain diffusers and held against the adapter's images."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPImageProcessor

from etherdiff import __version__
from etherdiff.adapters import io
from etherdiff.adapters.io import load_adapter, read_adapter, save_adapter
from etherdiff.adapters.methods import METHODS, MethodOptions, add_adapter, trainable_parameters
from etherdiff.config import ExportOptions
from etherdiff.families import bases, sd1
from etherdiff.system.errors import ProofError, UserError
from etherdiff.use import export, merge
from etherdiff.use.export import export_adapter
from etherdiff.use.merge import merge_to_folder

EXACT = [name for name, method in METHODS.items() if method.lora_exact]
MIXED_RANKS = "ether+ of 32 blocks"  # 4 n = 128 exceeds the smaller layers' features
OUTPUTS = [(method, "merged") for method in METHODS]
OUTPUTS += [(method, kind) for method in [*EXACT, MIXED_RANKS] for kind in ("lora", "kohya")]

PLAIN_DIFFUSERS = """
import json, sys
import numpy as np, torch
from diffusers import StableDiffusionPipeline

def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    made = pipeline("a photo of a dog", num_inference_steps=4, generator=generator, output_type="np")
    return np.round(made.images[0] * 255)

jobs, results = json.loads(sys.argv[1]), {}
for name, (folder, lora) in jobs.items():
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    if lora:
        pipeline.load_lora_weights(lora)
    else:
        assert not any(type(module).__module__.startswith("peft") for module in pipeline.unet.modules())
    results[name] = draw(pipeline)
assert not any(name.split(".")[0] == "etherdiff" for name in sys.modules)
np.savez(sys.argv[2], **results)
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The tiny models are too small to share among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base():
    return bases.find_base("tiny")


def make_adapter(base, folder, method, seed=0, **options):
    """A saved adapter, every parameter moved well away from where it starts."""
    model = add_adapter(sd1.load_base(base).unet, method, MethodOptions(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            spread = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 1.0
            parameter += 0.3 * spread * torch.randn(parameter.shape, generator=generator)
    save_adapter(model, folder, {"name": base.name, "fingerprint": sd1.fingerprint(base)})
    return folder


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    made = {method: make_adapter(base, root / method, method) for method in METHODS}
    return made | {MIXED_RANKS: make_adapter(base, root / "mixed", "ether+", blocks=32)}


def draw(pipeline):
    """As in PLAIN_DIFFUSERS; grey levels (64, 64, 3)."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    made = pipeline("a photo of a dog", num_inference_steps=4, generator=generator, output_type="np")
    return np.round(made.images[0] * 255)


@pytest.fixture(scope="module")
def adapted_images(base, adapters):
    """Method -> the adapter's own images."""

    def adapted(folder):
        pipeline = StableDiffusionPipeline.from_pretrained(base.folder)
        load_adapter(pipeline.unet, folder)
        return draw(pipeline)

    return {method: adapted(folder) for method, folder in adapters.items()}


@pytest.fixture(scope="module")
def base_images(base):
    return draw(StableDiffusionPipeline.from_pretrained(base.folder))


@pytest.fixture(scope="module")
def outputs(base, adapters, tmp_path_factory):
    """(method, kind) -> what was written and what was reported."""
    root = tmp_path_factory.mktemp("outputs")
    made = {}
    for method, kind in OUTPUTS:
        output = root / method / kind
        if kind == "merged":
            made[method, kind] = output, merge_to_folder(base, [(adapters[method], 1.0)], output)
        else:
            report = export_adapter(base, adapters[method], output, kind)
            made[method, kind] = report["path"], report
    return made


@pytest.fixture(scope="module")
def plain_images(base, outputs, tmp_path_factory):
    """(method, kind) -> images of a process that knows nothing of etherdiff."""
    jobs = {
        f"{method}/{kind}": (str(path), None) if kind == "merged" else (str(base.folder), str(path))
        for (method, kind), (path, _) in outputs.items()
    }
    target = tmp_path_factory.mktemp("plain") / "images.npz"
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_DIFFUSERS, json.dumps(jobs), str(target)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=target.parent, env=environment)
    assert done.returncode == 0, done.stderr
    with np.load(target) as results:
        return {tuple(name.split("/")): results[name] for name in results.files}


# --- Exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "kind"), OUTPUTS)
def test_images_are_the_adapters_own(method, kind, base_images, adapted_images, plain_images):
    own = adapted_images[method]
    assert np.abs(own - base_images).max() > 3  # the adapter shows
    assert np.abs(own - plain_images[method, kind]).max() <= 1


def test_reports(outputs, adapters):
    for (_, kind), (path, report) in outputs.items():
        assert report["same_base"] is True
        assert report["relative_difference"] < 1e-5
        assert report["max_abs_difference"] < 1e-4
        if kind == "merged":
            assert report["files"] == sum(file.is_file() for file in path.rglob("*"))
            assert report["left_out"] == []
        else:
            assert report["layers"] == 56
    ranks = {method: outputs[method, "lora"][1]["rank"] for method in EXACT}
    assert ranks == {"ether": 1, "ether+": 4, "ether+one-sided": 2, "lora": 4, "hra": 8, "vera": 192}


@pytest.mark.parametrize("method", ["lora", MIXED_RANKS])
@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_plain_diffusers_scales_every_layer_by_one(method, kind, base, outputs):
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder)
    pipeline.load_lora_weights(str(outputs[method, kind][0]))
    layers = [module for module in pipeline.unet.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 56
    assert {scale for layer in layers for scale in layer.scaling.values()} == {1.0}
    ranks = {rank for layer in layers for rank in layer.r.values()}
    assert ranks == ({4} if method == "lora" else {64, 128} if kind == "lora" else {128})


def test_scales_and_several_adapters_are_merged(base, adapters, tmp_path):
    pair = [(adapters["ether+"], 0.5), (make_adapter(base, tmp_path / "second", "ether+", seed=1), 0.7)]
    merge_to_folder(base, pair, tmp_path / "merged")
    pipeline = StableDiffusionPipeline.from_pretrained(base.folder)
    model = load_adapter(pipeline.unet, pair[0][0], scale=0.5)
    load_adapter(model, pair[1][0], "second", scale=0.7)
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert np.abs(draw(pipeline) - draw(merged)).max() <= 1


def test_the_scale_is_inside_the_lora(base, adapters, tmp_path):
    path = export_adapter(base, adapters["ether"], tmp_path / "half.safetensors", "lora", scale=0.5)["path"]
    assert path == tmp_path / "half.safetensors"
    pipeline, plain = (StableDiffusionPipeline.from_pretrained(base.folder) for _ in range(2))
    load_adapter(pipeline.unet, adapters["ether"], scale=0.5)
    plain.load_lora_weights(str(path))
    assert np.abs(draw(pipeline) - draw(plain)).max() <= 1


# --- What is written --------------------------------------------------------------------------------------------------


def files(folder):
    """By name; but for the model card, which is not true of what its model is merged into."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if name != "README.md"}


@pytest.mark.parametrize("method", METHODS)
def test_untouched_components_are_byte_identical(method, base, outputs):
    original, merged = files(base.folder), files(outputs[method, "merged"][0])
    assert original.keys() == merged.keys()
    assert [name for name in original if original[name] != merged[name]] == [f"unet/{merge.UNET_WEIGHTS}"]
    before, after = (load_file(folder / "unet" / merge.UNET_WEIGHTS) for folder in (base.folder, outputs[method, "merged"][0]))
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision(dtype, bound, base, adapters, tmp_path):
    report = merge_to_folder(base, [(adapters["ether+"], 1.0)], tmp_path / "merged", dtype, tmp_path / "m.safetensors")
    assert 0 < report["relative_difference"] < bound < merge.TOLERANCE[dtype]
    unet = load_file(tmp_path / "merged/unet" / merge.UNET_WEIGHTS)
    assert {value.dtype for value in unet.values()} == {dtype}
    assert {value.dtype for value in load_file(tmp_path / "m.safetensors").values()} == {dtype, torch.int64}
    assert files(tmp_path / "merged/vae") == files(base.folder / "vae")


def test_a_single_file_gives_the_same_images(base, adapters, adapted_images, tmp_path):
    path = tmp_path / "checkpoints/dog.safetensors"
    report = merge_to_folder(base, [(adapters["ether+"], 1.0)], tmp_path / "merged", single_file=path)
    pipeline = StableDiffusionPipeline.from_single_file(str(path), config=str(base.folder), local_files_only=True)
    assert np.abs(draw(pipeline) - adapted_images["ether+"]).max() <= 1
    assert report["files"] == 13


def test_a_single_file_base_becomes_a_folder(base, adapters, adapted_images, tmp_path):
    config = tmp_path / "config"
    shutil.copytree(base.folder, config, ignore=shutil.ignore_patterns("*.safetensors"))
    models_ = sd1.load_base(base)
    merge.write_single_file(models_.unet, models_.vae, models_.text_encoder, tmp_path / "base.safetensors")
    single = sd1.Base("base.safetensors", config, tmp_path / "base.safetensors")

    report = merge_to_folder(single, [(adapters["ether+"], 1.0)], tmp_path / "merged")

    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert np.abs(draw(merged) - adapted_images["ether+"]).max() <= 1
    assert report["same_base"] is None
    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "merged/text_encoder/model.safetensors"))
    assert (tmp_path / "merged/vae/config.json").read_bytes() == (config / "vae/config.json").read_bytes()
    lora = export_adapter(single, adapters["ether+"], tmp_path / "lora", "lora")
    assert lora["same_base"] is None


def test_an_overridden_prediction_type_is_written(base, adapters, tmp_path):
    merge_to_folder(replace(base, prediction_type="v_prediction"), [(adapters["lora"], 1.0)], tmp_path / "merged")
    written = json.loads((tmp_path / "merged/scheduler/scheduler_config.json").read_text())
    assert written == base.config("scheduler") | {"prediction_type": "v_prediction"}
    merge_to_folder(replace(base, prediction_type="epsilon"), [(adapters["lora"], 1.0)], tmp_path / "same")
    assert files(tmp_path / "same/scheduler") == files(base.folder / "scheduler")


@pytest.fixture
def cluttered(base, tmp_path):
    """A base as a hub cache holds it: links, a safety checker, other precisions and formats, a root checkpoint."""
    folder, blobs = tmp_path / "cluttered", tmp_path / "blobs"
    shutil.copytree(base.folder, blobs)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = size | {"image_size": 32, "patch_size": 16}
    checker = CLIPConfig(vision_config=vision, text_config=size, projection_dim=8)
    StableDiffusionSafetyChecker(checker).save_pretrained(blobs / "safety_checker")
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(blobs / "feature_extractor")
    index = json.loads((blobs / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
    }
    (blobs / "model_index.json").write_text(json.dumps(index))
    shutil.copytree(blobs, folder, copy_function=lambda source, target: Path(target).symlink_to(source))
    for clutter in (
        "v1-5-pruned.safetensors",
        "README.md",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "text_encoder/flax_model.msgpack",
        "safety_checker/pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    ):
        (folder / clutter).touch()
    (folder / "onnx").mkdir()
    return bases.find_base(str(folder))


def test_a_hub_folder_is_copied_without_its_clutter(cluttered, base, adapters, tmp_path):
    report = merge_to_folder(cluttered, [(adapters["ether+"], 1.0)], tmp_path / "merged")
    written, original = files(tmp_path / "merged"), files(tmp_path / "blobs")
    assert written.keys() == original.keys()
    assert [name for name in written if written[name] != original[name]] == [f"unet/{merge.UNET_WEIGHTS}"]
    assert not any(path.is_symlink() for path in (tmp_path / "merged").rglob("*"))
    assert report["left_out"] == []
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "merged").safety_checker is not None


@pytest.mark.parametrize("damage", ["absent", "pickled"])
def test_a_safety_checker_that_cannot_be_copied_is_left_out_and_reported(damage, cluttered, adapters, tmp_path):
    checker = cluttered.folder / "safety_checker"
    (checker / "model.safetensors").unlink()
    if damage == "absent":
        shutil.rmtree(checker)
    report = merge_to_folder(cluttered, [(adapters["ether+"], 1.0)], tmp_path / "merged")
    assert report["left_out"] == ["safety_checker"]
    assert not (tmp_path / "merged/safety_checker").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is not None


def test_weights_that_exist_only_as_a_variant_get_the_plain_name(base, adapters, tmp_path):
    folder = tmp_path / "half"
    shutil.copytree(base.folder, folder)
    StableDiffusionPipeline.from_pretrained(base.folder).to(torch.float16).vae.save_pretrained(folder / "vae", variant="fp16")
    (folder / "vae" / merge.VAE_WEIGHTS).unlink()
    text_weights = folder / "text_encoder/model.safetensors"
    text_weights.rename(text_weights.with_name("model.fp16.safetensors"))
    merge_to_folder(bases.find_base(str(folder)), [(adapters["lora"], 1.0)], tmp_path / "merged")
    variant = (folder / "vae/diffusion_pytorch_model.fp16.safetensors").read_bytes()
    assert (tmp_path / "merged/vae" / merge.VAE_WEIGHTS).read_bytes() == variant
    assert files(tmp_path / "merged/text_encoder") == files(base.folder / "text_encoder")


def test_lora_files_say_what_they_are(outputs, base):
    path, _ = outputs["ether+", "lora"]
    assert path.name == "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        metadata, keys = file.metadata(), list(file.keys())
        assert all(file.get_tensor(key).dtype == torch.float32 for key in keys)
    assert metadata["made_by"] == f"etherdiff {__version__}"
    assert metadata["base_model"] == "tiny"
    assert json.loads(metadata["base_fingerprint"]) == sd1.fingerprint(base)
    assert metadata["note"] == "exact only on this base"
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)


def test_kohya_files_have_sd_scripts_names_and_metadata(outputs):
    path, _ = outputs["ether+", "kohya"]
    assert path.name == "kohya.safetensors"
    tensors = load_file(path)
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert tensors[f"{layer}.alpha"] == 4
    assert tensors[f"{layer}.lora_down.weight"].shape == (4, 64)
    assert tensors[f"{layer}.lora_up.weight"].shape == (64, 4)
    assert all(key.rsplit(".", 2)[-2:][0] in ("lora_down", "lora_up") or key.endswith(".alpha") for key in tensors)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert {key: value for key, value in metadata.items() if key.startswith("ss_")} == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "ss_output_name": "kohya",
        "ss_sd_model_name": "tiny",
    }


@pytest.mark.parametrize("method", ["ether", "ether+one-sided", "ether+"])
def test_a_kohya_file_has_no_matrix_whose_rank_is_lost_with_trailing_ones(method, outputs):
    path, report = outputs[method, "kohya"]
    tensors, own = load_file(path), load_file(outputs[method, "lora"][0])
    rank = max(report["rank"], 2)
    for name in [key.removesuffix(".lora_A.weight") for key in own if key.endswith(".lora_A.weight")]:
        key = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
        assert len(down) == up.shape[1] == tensors[f"{key}.alpha"] == rank
        assert torch.allclose(up @ down, own[f"{name}.lora_B.weight"] @ own[f"{name}.lora_A.weight"], atol=1e-6)
    with safe_open(path, "pt") as file:
        assert file.metadata()["ss_network_dim"] == file.metadata()["ss_network_alpha"] == str(rank)


def test_the_file_that_opens_everywhere_is_the_default(tmp_path):
    assert ExportOptions(output=tmp_path).format == "kohya"


def test_a_local_bases_path_is_not_published(base, adapters, tmp_path):
    folder = tmp_path / "secret place" / "my base"
    shutil.copytree(base.folder, folder)
    path = export_adapter(bases.find_base(str(folder)), adapters["ether"], tmp_path / "out", "kohya")["path"]
    assert b"secret place" not in path.read_bytes()
    assert b"my base" in path.read_bytes()


def test_a_peft_export_is_the_adapter(base, adapters, tmp_path):
    report = export_adapter(base, adapters["oft"], tmp_path / "out", "peft")
    assert files(tmp_path / "out") == files(adapters["oft"])
    assert report == {"path": tmp_path / "out", "files": 3, "same_base": True}


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "kohya"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in EXACT])
def test_what_is_not_of_low_rank_is_refused(method, kind, base, adapters, tmp_path):
    with pytest.raises(UserError, match=r"cannot be exact as a LoRA, because .*`etherdiff merge`.*--format peft"):
        export_adapter(base, adapters[method], tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_outputs_that_exist_are_refused(base, adapters, tmp_path):
    adapter, folder, file = adapters["lora"], tmp_path / "full", tmp_path / "file.safetensors"
    folder.mkdir()
    (folder / "holiday.jpg").touch()
    file.touch()
    before = files(tmp_path)
    for attempt, message in (
        (lambda: merge_to_folder(base, [(adapter, 1.0)], folder), "is not empty"),
        (lambda: merge_to_folder(base, [(adapter, 1.0)], file), "is a file"),
        (lambda: merge_to_folder(base, [(adapter, 1.0)], base.folder), "is not empty"),
        (lambda: merge_to_folder(base, [(adapter, 1.0)], tmp_path / "m", single_file=file), "exists"),
        (
            lambda: merge_to_folder(base, [(adapter, 1.0)], tmp_path / "m", single_file=tmp_path / "a.ckpt"),
            "safetensors",
        ),
        (lambda: export_adapter(base, adapter, file, "lora"), "exists"),
        (lambda: export_adapter(base, adapter, folder, "peft"), "is not empty"),
        (lambda: export_adapter(base, adapter, tmp_path / "a.safetensors", "peft"), "is a folder, not a file"),
        (lambda: export_adapter(base, adapter, tmp_path / "a", "peft", scale=2.0), "does not hold a scale"),
        (lambda: merge_to_folder(base, [], tmp_path / "m"), "at least one adapter"),
        (
            lambda: merge_to_folder(base, [(adapter, 1.0), (adapters["ether"], 1.0)], tmp_path / "m"),
            "merge one of them",
        ),
        (lambda: merge_to_folder(base, [(adapters["vera"], 2.0)], tmp_path / "m"), "vera has no scale"),
        (lambda: merge_to_folder(base, [(tmp_path / "none", 1.0)], tmp_path / "m"), "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
    assert files(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.safetensors", "full"]


def test_an_empty_output_folder_is_used(base, adapters, tmp_path):
    (tmp_path / "out").mkdir()
    merge_to_folder(base, [(adapters["lora"], 1.0)], tmp_path / "out")
    assert (tmp_path / "out/model_index.json").is_file()


def test_an_adapter_of_another_base_is_not_exported(base, adapters, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base.folder, other)
    unet = sd1.load_base(base).unet
    torch.nn.init.zeros_(unet.conv_in.weight)
    unet.save_pretrained(other / "unet")
    with pytest.raises(UserError, match="was trained on tiny, whose UNet is not that of"):
        export_adapter(bases.find_base(str(other)), adapters["ether"], tmp_path / "out", "lora")
    assert not (tmp_path / "out").exists()
    merged = merge_to_folder(bases.find_base(str(other)), [(adapters["ether"], 1.0)], tmp_path / "merged")
    assert merged["same_base"] is False  # allowed, and said


def test_an_adapter_without_a_recorded_base_is_exported(base, adapters, tmp_path):
    shutil.copytree(adapters["ether"], tmp_path / "bare")
    (tmp_path / "bare" / io.BASE).unlink()
    assert export_adapter(base, tmp_path / "bare", tmp_path / "out", "lora")["same_base"] is None


# --- Nothing half done ------------------------------------------------------------------------------------------------


def test_a_result_that_is_not_proved_is_removed(base, adapters, tmp_path, monkeypatch):
    read = merge._read_plainly

    def forgetful(folder):
        pipeline = read(folder)
        torch.nn.init.zeros_(pipeline.unet.conv_in.bias)
        pipeline.unet.conv_in.weight.data *= 1.01
        return pipeline

    monkeypatch.setattr(merge, "_read_plainly", forgetful)
    with pytest.raises(ProofError, match="differs from the adapted model"):
        merge_to_folder(base, [(adapters["ether+"], 1.0)], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["lora", "kohya"])
def test_a_lora_that_is_not_proved_is_removed(kind, base, adapters, tmp_path, monkeypatch):
    factors = export.lora_factors
    monkeypatch.setattr(export, "lora_factors", lambda *a: {name: (down, 1.1 * up) for name, (down, up) in factors(*a).items()})
    with pytest.raises(ProofError, match="the LoRA file"):
        export_adapter(base, adapters["ether+"], tmp_path / "new" / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_never_a_proof(base, adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("etherdiff.use.proof.predict", lambda *_: torch.full((1,), torch.nan))
    with pytest.raises(ProofError, match="nan"):
        merge_to_folder(base, [(adapters["ether+"], 1.0)], tmp_path / "out")


@pytest.mark.parametrize("attempt", ["merge", "lora"])
def test_a_full_disk_leaves_nothing(attempt, base, adapters, tmp_path, monkeypatch):
    def half_way(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", half_way)
    write = {
        "merge": lambda: merge_to_folder(base, [(adapters["ether+"], 1.0)], tmp_path / "out"),
        "lora": lambda: export_adapter(base, adapters["ether+"], tmp_path / "out", "lora"),
    }
    with pytest.raises(OSError, match="no space"):
        write[attempt]()
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_itself_is_never_changed(adapters, outputs):
    assert all(read_adapter(folder).tensors() for folder in adapters.values())
    assert all(sorted(p.name for p in folder.iterdir()) == [io.CONFIG, io.WEIGHTS, io.BASE] for folder in adapters.values())
