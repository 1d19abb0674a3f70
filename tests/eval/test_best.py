"""Scores along the way and best/: what is logged and kept, exactly also where a run was stopped, and what stays away."""

import json
import shutil

import pytest
import yaml
from accelerate.state import AcceleratorState
from eval_runs import build_networks
from safetensors.torch import load_file
from small_runs import checkpoints, metrics, small_config

from etherdiff.adapters.io import read_adapter
from etherdiff.config import DreamBoothConfig, read_config
from etherdiff.eval import best as module
from etherdiff.eval.best import combined, curve_prompts, find_best, say_best
from etherdiff.eval.networks import PRESETS
from etherdiff.families.diffusion import sample
from etherdiff.images.writing import read_png_settings
from etherdiff.run import resume, train_dreambooth
from etherdiff.runs.folder import RunFolder
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.tasks.image_sets import find_trained
from etherdiff.train import recorder as recorder_module
from etherdiff.train.checkpoint import restore_best

pytestmark = pytest.mark.filterwarnings("ignore")
CURVE = {
    "lr_schedule": "constant",
    "steps": 5,
    "checkpoint_every": 2,
    "eval_every": 1,
    "eval_scores": "auto",
    "ema_decay": None,
}


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    return build_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(autouse=True)
def _another_process(monkeypatch, networks):
    """A fresh accelerator, stand-ins for the tiny networks, two denoising steps, and no report."""
    AcceleratorState._reset_state(True)
    monkeypatch.setitem(PRESETS, "tiny", networks)
    monkeypatch.setattr(module, "sample", lambda *given, **more: sample(*given, steps=2, **more))
    monkeypatch.setattr("etherdiff.run.show_report", lambda run: None)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def scripted(monkeypatch):
    """Let the course of the scores be given: DINO by step, CLIP-T always 0.25."""

    def script(course):
        def score_images(real, held_out, prompts, *_, **__):
            step = read_png_settings(prompts[0].images[0])["training_step"]
            return {"scores": {"dino": {"mean": course[step]}, "clip_t": {"mean": 0.25}}, "not_scored": {}}

        monkeypatch.setattr(module, "score_images", score_images)

    return script


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_scores_are_logged_and_the_best_adapter_is_kept(tmp_path, capsys):
    run = train_dreambooth(small_config(tmp_path / "run", **CURVE))
    rows = metrics(run)
    assert all(-1 <= row["dino"] <= 1 and -1 <= row["clip_t"] <= 1 for row in rows)
    best = json.loads((run / "best/best.json").read_text())
    scores = [round(combined(row), 6) for row in rows]
    assert best["step"] == 1 + scores.index(max(scores))
    assert best["score"] == max(scores)
    assert best["reference"] == "training images"
    assert f"step {best['step']} is the best of 5 evaluations" in best["why"]
    assert best["why"] in " ".join(capsys.readouterr().err.split())
    assert read_adapter(run / "best").method == "ether+"
    assert len(list((run / "eval/steps").glob("step-*/*/0.png"))) == 5 * 4
    assert Run.open(run).config.eval_scores == "on"
    assert find_trained(Run.open(run), "best").step == best["step"]


def test_the_best_is_of_its_step_and_a_tie_stays_with_the_earlier(tmp_path, scripted):
    scripted({1: 0.2, 2: 0.5, 3: 0.5, 4: 0.3, 5: 0.4})
    run = train_dreambooth(small_config(tmp_path / "run", **CURVE))
    best = find_best(RunFolder(run))
    assert best.step == 2
    assert best.why.endswith("the last, step 5, has 0.3162")
    trained = load_file(run / "checkpoints/step-000002/parameters.safetensors")
    kept = load_file(run / "best/adapter_model.safetensors")
    assert sorted(tensor.sum().item() for tensor in kept.values()) == sorted(tensor.sum().item() for tensor in trained.values())


def test_a_run_that_was_killed_ends_with_the_same_best(tmp_path, scripted, monkeypatch):
    course = {1: 0.2, 2: 0.5, 3: 0.6, 4: 0.1, 5: 0.1}
    scripted(course)
    whole = train_dreambooth(small_config(tmp_path / "whole", **CURVE))
    append = recorder_module.append_metrics

    def die_at_three(run, row):
        append(run, row)
        if row["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(recorder_module, "append_metrics", die_at_three)
    with pytest.raises(KeyboardInterrupt):
        train_dreambooth(small_config(tmp_path / "run", **CURVE))
    monkeypatch.setattr(recorder_module, "append_metrics", append)
    assert checkpoints(tmp_path / "run") == [2]
    assert find_best(RunFolder(tmp_path / "run")).step == 3  # of a step that has to come again
    scripted(course | {3: 0.4})
    shutil.copytree(tmp_path / "run", tmp_path / "otherwise")
    run = resume(tmp_path / "otherwise")
    assert find_best(RunFolder(run)).step == 2
    scripted(course)
    run = resume(tmp_path / "run")
    assert contents(run / "best") == contents(whole / "best")
    assert metrics(run) == metrics(whole)


def test_real_scores_are_the_same_after_a_resume(tmp_path, monkeypatch):
    """Features that one of them finds in the cache and the other computes included."""
    whole = train_dreambooth(small_config(tmp_path / "whole", **CURVE))
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "cache"))
    run = train_dreambooth(small_config(tmp_path / "run", **CURVE | {"steps": 4}))
    resume(run, steps=5)
    assert metrics(run) == metrics(whole)
    assert contents(run / "best") == contents(whole / "best")


def test_best_is_put_back_to_the_checkpoint_it_goes_on_from(tmp_path):
    run = RunFolder(tmp_path)
    kept = tmp_path / "checkpoints/step-000002"
    for folder, step in ((run.best, 3), (kept / "best", 1)):
        folder.mkdir(parents=True)
        (folder / "best.json").write_text(json.dumps({"step": step, "score": 0.5}))
    restore_best(run, kept)
    assert find_best(run).step == 1
    restore_best(run, tmp_path / "checkpoints/step-000001")
    assert not run.best.exists()


def test_with_scores_that_fail_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise UserError("nothing can be scored")

    monkeypatch.setattr(module, "score_images", fail)
    run = train_dreambooth(small_config(tmp_path / "run", **CURVE))
    assert "scores of step 5 failed (UserError: nothing can be scored)" in " ".join(capsys.readouterr().err.split())
    assert len(metrics(run)) == 5
    assert "dino" not in metrics(run)[0]
    assert not (run / "best").exists()
    say_best(RunFolder(run))


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_off_or_without_networks_it_is_as_without(tmp_path, monkeypatch, wanted):
    if wanted == "auto":
        monkeypatch.setitem(PRESETS, "tiny", dict.fromkeys(PRESETS["tiny"], "./nowhere"))
    run = train_dreambooth(small_config(tmp_path / "run", **CURVE | {"steps": 1, "eval_scores": wanted}))
    assert set(metrics(run)[0]) == {"step", "loss", "learning_rate", "validation_loss"}
    assert not (run / "best").exists()
    assert not (run / "eval").exists()
    assert yaml.safe_load((run / "run.yaml").read_text())["eval_scores"] == "off"


def test_on_without_networks_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", dict.fromkeys(PRESETS["tiny"], "./nowhere"))
    with pytest.raises(UserError, match=r"dino: \./nowhere"):
        train_dreambooth(small_config(tmp_path / "run", **CURVE | {"eval_scores": "on"}))
    assert not (tmp_path / "run").exists()


def test_nothing_is_fetched_unless_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = small_config(tmp_path / "run", **CURVE).model_copy(update={"base": "sd15"})
    assert module.find_networks(config) is None


def test_bare_on_and_off_of_yaml_are_words(tmp_path):
    for word, value in (("on", "on"), ("off", "off"), ("auto", "auto"), ("'off'", "off")):
        (tmp_path / "recipe.yaml").write_text(f"subject: photos\neval_scores: {word}\n")
        assert read_config(DreamBoothConfig, tmp_path / "recipe.yaml", [], {}).eval_scores == value
        assert read_config(DreamBoothConfig, None, [f"eval_scores={word}"], {"subject": "photos"}).eval_scores == value


def test_the_criterion_weighs_changes_by_their_share():
    assert combined({"dino": 0.64, "clip_t": 0.25}) == pytest.approx(0.4)
    assert combined({"dino": 0.64 * 1.1, "clip_t": 0.25}) == combined({"dino": 0.64, "clip_t": 0.25 * 1.1})
    assert combined({"dino": -0.1, "clip_t": 0.25}) == 0


def test_the_prompts_are_spread_over_the_25(tmp_path):
    prompts = [prompt.text for prompt in curve_prompts(small_config(tmp_path / "run"))]
    assert prompts == [
        "a sks ball on grass",
        "a sks ball on a cloudy day",
        "a sks ball floating on water in the rain",
        "a red sks ball",
    ]
