"""Runs without training, and small networks to score them by, for the tests of `etherdiff eval` and `compare`."""

import json
from pathlib import Path

import torch
from eval.eval_toys import CLIP_PREPROCESSOR, SIZE, VIT_PREPROCESSOR, clip_model, save
from safetensors.torch import save_file
from subject_photos import draw_subject
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTModel

from etherdiff.adapters.io import save_adapter
from etherdiff.adapters.methods import add_adapter
from etherdiff.config import DreamBoothConfig
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import fingerprint, load_base
from etherdiff.runs.folder import RunFolder, write_manifest, write_settings
from etherdiff.system.files import file_hash
from etherdiff.tasks.planning import method_options


def build_networks(root: Path) -> dict[str, str]:
    """Random-weight networks of the classes of the tiny preset: role -> folder."""
    torch.manual_seed(0)
    save(clip_model(), root / "clip", CLIP_PREPROCESSOR)
    vit = ViTConfig(
        image_size=SIZE, patch_size=8, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    save(ViTModel(vit, add_pooling_layer=False), root / "dino", VIT_PREPROCESSOR)
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    save(ResNetForImageClassification(resnet), root / "features", VIT_PREPROCESSOR)
    parts = {"dino": "dino", "clip": "clip", "lpips": "features", "fid": "features"}
    return {role: str(root / part) for role, part in parts.items()}


def build_run(path: Path, method: str = "ether+", strength: float = 0.1, **settings) -> Path:
    """A run folder as training leaves it, its adapter moved from its start by `strength`; checkpoint step-1 holds the same."""
    subject = path.parent / "ball"
    if not subject.exists():
        draw_subject(subject)
    config = DreamBoothConfig(
        base="tiny",
        method=method,
        subject=str(subject),
        class_noun="ball",
        output=path,
        steps=1,
        **settings,
    )
    run, base = RunFolder(path), find_base("tiny")
    path.mkdir()
    write_settings(run, "dreambooth", config, {"base": {"name": "tiny", "fingerprint": fingerprint(base)}})
    unet = load_base(base).unet
    adapted = add_adapter(unet, method, method_options(config), config.seed)
    parameters = {f"unet.{name}": p for name, p in unet.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += strength * torch.randn(parameter.shape, generator=generator)
    save_adapter(adapted, run.adapter, {"name": "tiny", "fingerprint": {}})
    write_manifest(run.adapter)
    checkpoint = run.checkpoints / "step-000001"
    checkpoint.mkdir(parents=True)
    save_file({name: p.detach().clone() for name, p in parameters.items()}, checkpoint / "parameters.safetensors")
    hashes = {"parameters.safetensors": file_hash(checkpoint / "parameters.safetensors")}
    (checkpoint / "manifest.json").write_text(json.dumps(hashes))
    return path
