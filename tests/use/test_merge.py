"""Merging bases as people have them: old class names, shards with a variant; a single file that fails."""

import json
import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import MethodOptions, add_adapter, trainable_parameters
from etherdiff.families import bases, sd1
from etherdiff.system.errors import ProofError
from etherdiff.use import merge
from etherdiff.use.merge import merge_to_folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA on the tiny base that shows."""
    base = bases.find_base("tiny")
    model = add_adapter(sd1.load_base(base).unet, "lora", MethodOptions())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    save_adapter(model, folder, {"name": base.name, "fingerprint": sd1.fingerprint(base)})
    return folder


@pytest.fixture
def tiny(tmp_path):
    """A copy of the tiny base's folder."""
    return shutil.copytree(bases.find_base("tiny").folder, tmp_path / "tiny")


def merge_it(folder, adapter, output, **options):
    return merge_to_folder(bases.find_base(str(folder)), [(adapter, 1.0)], output, **options)


@pytest.mark.parametrize(("component", "gone"), [("feature_extractor", "CLIPFeatureExtractor"), ("tokenizer", "CLIPTokenizer")])
def test_a_class_that_transformers_no_longer_has(component, gone, tiny, adapter, tmp_path):
    CLIPImageProcessor(size=32, crop_size=32).save_pretrained(tiny / "feature_extractor")
    index = json.loads((tiny / "model_index.json").read_text())
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], component: ["transformers", gone]}
    (tiny / "model_index.json").write_text(json.dumps(index))
    report = merge_it(tiny, adapter, tmp_path / "merged", single_file=tmp_path / "merged.safetensors")
    assert report["relative_difference"] < 1e-5
    assert (tmp_path / "merged.safetensors").is_file()
    StableDiffusionPipeline.from_pretrained(tmp_path / "merged")


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
@pytest.mark.parametrize("variant", ["fp16", None])
def test_shards_lose_their_variant(name, variant, tiny, adapter, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny)
    component = getattr(pipeline, name)
    [plain] = (tiny / name).glob("*.safetensors")
    plain.unlink()
    options = {"variant": variant} if variant else {}
    component.save_pretrained(tiny / name, max_shard_size="200KB", **options)
    assert len(list((tiny / name).glob("*.safetensors"))) > 1
    merge_it(tiny, adapter, tmp_path / "merged")
    merged = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    before, after = component.state_dict(), getattr(merged, name).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not list((tmp_path / "merged").rglob("*fp16*"))


def test_a_broken_autoencoder_is_no_proof(tiny, adapter, tmp_path, monkeypatch):
    read = merge._read_plainly

    def forgetful(folder):
        pipeline = read(folder)
        torch.nn.init.normal_(pipeline.vae.decoder.conv_in.weight)
        return pipeline

    monkeypatch.setattr(merge, "_read_plainly", forgetful)
    with pytest.raises(ProofError, match=r"autoencoder \(VAE\) of the merged pipeline"):
        merge_it(tiny, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_the_proved_folder_stays_where_the_single_file_fails(tiny, adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(merge, "_read_single_file", lambda *_: StableDiffusionPipeline.from_pretrained(tiny))
    with pytest.raises(ProofError, match="the single file"):
        merge_it(tiny, adapter, tmp_path / "merged", single_file=tmp_path / "merged.safetensors")
    assert "is written and proved" in " ".join(capsys.readouterr().err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "tiny"]
    assert load_file(tmp_path / "merged/unet" / merge.UNET_WEIGHTS)
