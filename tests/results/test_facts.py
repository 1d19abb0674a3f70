"""What is computed from run folders, against the models themselves."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from eval.eval_runs import build_run
from peft import get_peft_model
from synthetic_runs import write_curve, write_run

from etherdiff.adapters.io import load_adapter, merge_adapter, save_adapter
from etherdiff.adapters.methods import ATTENTION, MethodOptions, add_adapter, magnitude_config, trainable_parameters
from etherdiff.config import DreamBoothConfig, InspectOptions
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import load_base
from etherdiff.results import facts
from etherdiff.results.facts import FACTS, fact
from etherdiff.results.runs import collect
from etherdiff.runs.folder import write_manifest
from etherdiff.runs.run import Provenance, Run
from etherdiff.system.errors import UserError
from etherdiff.use.inspection import inspect_base

METHODS = ("ether", "ether+", "lora", "oft", "vera", "full")


def read(path) -> Run:
    (run,) = collect([path], scored=False).runs
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Of each method one, moved away from its start; read them only."""
    folder = tmp_path_factory.mktemp("runs")
    return {method: read(build_run(folder / method, method, 0.01 if method == "full" else 0.1)) for method in METHODS}


def attention_weights(unet):
    return {name: module.weight.detach().double().numpy().copy() for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear) and name.endswith(ATTENTION)}  # fmt: skip


def mean_move(*adapters):
    """Mean over the attention's layers of ‖W' − W‖_F when adapters are merged one after another."""
    unet = load_base(find_base("tiny")).unet
    before = attention_weights(unet)
    for adapter in adapters:
        unet = merge_adapter(load_adapter(unet, adapter))
    after = attention_weights(unet)
    return float(np.mean([np.linalg.norm(after[name] - before[name]) for name in before]))


def count(model):
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_trained_numbers_are_those_that_training_changes(runs, method):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(find_base("tiny").config("unet"))
    assert fact(runs[method], "trainable_parameters") == count(add_adapter(unet, method, MethodOptions()))


@pytest.mark.parametrize("method", ["ether+", "lora", "oft", "full"])
def test_the_weight_distance_is_that_of_the_merged_weights(runs, method):
    assert fact(runs[method], "weight_distance") == pytest.approx(mean_move(runs[method].folder.adapter), rel=1e-5)


def test_the_transformation_distance_is_the_methods_own(runs):
    assert fact(runs["ether"], "transformation_distance") == pytest.approx(2)
    assert 0 < fact(runs["ether+"], "transformation_distance") <= math.sqrt(2)
    assert fact(runs["lora"], "transformation_distance") is None
    assert fact(runs["full"], "transformation_distance") is None


def test_turning_all_neurons_alike_keeps_their_energy(runs):
    for name in ("energy_difference", "energy_difference_half_space"):
        assert fact(runs["oft"], name) < 1e-5
        assert fact(runs["ether"], name) < 1e-5
        assert fact(runs["lora"], name) > 1e-3


def test_flops_are_those_of_a_step_with_its_class_images(runs):
    config = runs["lora"].config.model_copy(update={"gradient_accumulation": 3, "resolution": 64})
    counted = inspect_base(InspectOptions(base="tiny", method=["lora"], resolution=64, batch_size=2))["methods"]["lora"]
    assert FACTS["step_flops"].of(replace(runs["lora"], config=config)) == 3 * counted["step_flops"]


def test_the_validation_loss_is_the_last_that_was_logged(tmp_path):
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="no validation loss"):
        fact(read(run), "validation_loss")
    write_curve(run, [{"step": 1, "validation_loss": 0.3}, {"step": 2, "validation_loss": 0.2}, {"step": 3, "loss": 0.1}])
    assert fact(read(run), "validation_loss") == 0.2


def test_likeness_and_agreement_with_the_prompt_make_one_number(tmp_path):
    write_run(tmp_path / "run", {"dino": 0.81, "dino_held_out": 0.64, "clip_t": 0.25})
    (run,) = collect([tmp_path / "run"]).runs
    assert fact(run, "dino_clip_t") == pytest.approx(0.45)  # 0.9 * 0.5
    assert fact(run, "dino_held_out_clip_t") == pytest.approx(0.4)  # 0.8 * 0.5
    with pytest.raises(UserError, match="no dino and no clip_t"):
        fact(read(write_run(tmp_path / "unscored")), "dino_clip_t")


def test_seconds_per_step_are_those_of_a_steps_images(tmp_path):
    run = write_run(tmp_path / "run", batch_size=2, gradient_accumulation=3)
    with pytest.raises(UserError, match=r"cost\.json cannot be read"):
        fact(read(run), "seconds_per_step")
    (run / "cost.json").write_text(json.dumps({"images_per_second": 4.0, "processes": 2}))
    assert fact(read(run), "seconds_per_step") == 2 * 3 * 2 / 4


def test_re_fitted_magnitudes_are_on_top_of_what_they_re_fit(tmp_path, runs, monkeypatch):
    run = tmp_path / "run"
    write_run(run, method="oft", blocks=4)
    oft, refitted = runs["oft"].folder.adapter, run / "refitted_adapter"
    save_adapter(load_adapter(load_base(find_base("tiny")).unet, oft), refitted)
    unet = merge_adapter(load_adapter(load_base(find_base("tiny")).unet, oft))
    magnitudes = get_peft_model(unet, magnitude_config(ATTENTION))
    with torch.no_grad():
        for parameter in magnitudes.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.3)
    save_adapter(magnitudes, run / "adapter")
    read_run = read(run)
    read_run = replace(read_run, provenance=Provenance(task="dreambooth"))
    assert fact(read_run, "weight_distance") == pytest.approx(mean_move(refitted, run / "adapter"), rel=1e-5)
    assert fact(read_run, "transformation_distance") is None
    assert fact(read_run, "trainable_parameters") == fact(runs["oft"], "trainable_parameters") + count(magnitudes)
    monkeypatch.setattr(facts, "_pass_flops", lambda base, prediction, method, *_: {"magnitude": 7}[method])
    assert fact(read_run, "step_flops") == 7


# --- Kept beside the run ---------------------------------------------------------------------------------------------


@pytest.fixture
def counting(tmp_path, monkeypatch):
    """A run, and the number of times that its fact was computed."""
    run = build_run(tmp_path / "run", "lora")
    calls = []
    counted = replace(FACTS["weight_distance"], of=lambda run: calls.append(run) or float(len(calls)))
    monkeypatch.setitem(facts.FACTS, "weight_distance", counted)
    return run, calls


def test_what_took_long_is_computed_once(counting):
    run, calls = counting
    assert [fact(read(run), "weight_distance") for _ in range(3)] == [1, 1, 1]
    assert len(calls) == 1


@pytest.mark.parametrize("change", ["weights", "settings", "version", "kept"])
def test_and_again_when_anything_changes(counting, monkeypatch, change):
    run, _ = counting
    assert fact(read(run), "weight_distance") == 1
    if change == "weights":
        (run / "adapter/adapter_model.safetensors").write_bytes(b"other")
        write_manifest(run / "adapter")
    elif change == "settings":
        (run / "run.yaml").write_text((run / "run.yaml").read_text().partition("\n")[2])
    elif change == "version":
        monkeypatch.setattr(facts, "__version__", "next")
    else:
        (run / "facts.json").write_text("{")
    assert fact(read(run), "weight_distance") == 2


def test_a_folder_that_cannot_be_written_is_read_all_the_same(counting, monkeypatch):
    run, _ = counting

    def refuse(path, text):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(facts, "write_json", refuse)
    assert [fact(read(run), "weight_distance") for _ in range(2)] == [1, 2]


def test_why_a_number_is_not_known(tmp_path, runs):
    unfinished = read(write_run(tmp_path / "unfinished", steps=3))
    for name in ("trainable_parameters", "weight_distance", "energy_difference"):
        with pytest.raises(UserError, match="it has no adapter"):
            fact(unfinished, name)
    moved = replace(runs["lora"], config=DreamBoothConfig(base=str(tmp_path / "gone"), subject="ball", method="lora"))
    with pytest.raises(UserError, match="its base is no longer where the run found it"):
        FACTS["weight_distance"].of(moved)
    other = replace(runs["lora"], provenance=Provenance(task="dreambooth", base={"fingerprint": {"unet": "another"}}))
    with pytest.raises(UserError, match="its base holds other weights now"):
        FACTS["weight_distance"].of(other)
