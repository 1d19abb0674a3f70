"""Whole runs on the tiny base: what they leave behind, that they repeat and resume bit for bit, and that processes agree."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from math import cos, pi
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from subject_photos import draw_subject

from etherdiff import run as run_module
from etherdiff.adapters.methods import METHODS
from etherdiff.config import DreamBoothConfig, GenerateOptions, InspectOptions
from etherdiff.families.bases import find_base
from etherdiff.families.sd1 import fingerprint, load_base
from etherdiff.images.writing import read_png_settings
from etherdiff.run import resume, train_dreambooth
from etherdiff.system.errors import UserError
from etherdiff.tiny import tiny_folder
from etherdiff.train.checkpoint import newest_checkpoint
from etherdiff.use.generate import generate, run_source

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("another_process")]

# everything that draws random numbers or keeps state between steps
EVERYTHING = {
    "method": "ether+",
    "steps": 8,
    "checkpoint_every": 2,
    "eval_every": 3,
    "batch_size": 1,
    "gradient_accumulation": 2,
    "ema_decay": 0.9,
    "lr_schedule": "cosine",
    "warmup_steps": 3,
    "caption_dropout": 0.3,
    "crop": "random",
    "cached_crops": 3,
    "flip": True,
    "min_snr_gamma": 5.0,
    "seed": 7,
}


@pytest.fixture(scope="session")
def subject(tmp_path_factory) -> Path:
    """Five pictures, one of them not square."""
    folder = tmp_path_factory.mktemp("ball")
    draw_subject(folder)
    with Image.open(folder / "00.png") as image:
        image.crop((0, 0, 200, 256)).save(folder / "00.png")
    return folder


@pytest.fixture(scope="session")
def make_config(subject):
    def make(output: Path, **options) -> DreamBoothConfig:
        small = {
            "class_images": 3,
            "class_sampling_steps": 2,
            "tracker": "none",
            "device": "cpu",
            "steps": 2,
            "eval_scores": "off",
        }
        settings = {"base": "tiny", "subject": str(subject), "class_noun": "ball", "output": output} | small | options
        return DreamBoothConfig(**settings)

    return make


@pytest.fixture(scope="session")
def whole(tmp_path_factory, make_config) -> Path:
    """A run with everything, never interrupted; read it only. What it reads of the cache is there already."""
    for name, options in {"first": EVERYTHING | {"steps": 1}, "run": EVERYTHING}.items():
        AcceleratorState._reset_state(True)
        run = train_dreambooth(make_config(tmp_path_factory.mktemp("whole") / name, **options))
    return run


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def results(run: Path) -> dict[str, bytes]:
    """What a run learned and how it went, byte by byte."""
    files = [run / "metrics.jsonl", *sorted((run / "adapter").iterdir())]
    return {path.name: path.read_bytes() for path in files}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def as_recipe(config: DreamBoothConfig, path: Path) -> Path:
    content = config.model_dump(mode="json", exclude={"overwrite", "dry_run"})
    path.write_text(yaml.safe_dump(content))
    return path


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


# --- What a run leaves behind ------------------------------------------------------------------------------------------


def test_a_run_folder_holds_what_the_contract_says(whole):
    assert {path.name for path in whole.iterdir()} >= {"run.yaml", "adapter", "checkpoints", "metrics.jsonl", "cost.json"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (whole / "adapter").iterdir()}
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == [f"step-{n:06d}" for n in (2, 4, 6, 8)]
    assert all(tensor.dtype == torch.float32 for tensor in weights(whole).values())
    assert not [path for path in whole.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pth", ".partial", ".old")]


def test_run_yaml_records_what_determined_the_result(whole, make_config):
    recorded = yaml.safe_load((whole / "run.yaml").read_text())
    provenance = recorded.pop("provenance")
    assert {key: recorded[key] for key in EVERYTHING} == EVERYTHING
    for key in ("steps", "seed", "checkpoint_every", "eval_every", "learning_rate", "batch_size", "method", "blocks"):
        assert recorded[key] is not None, key  # other tools rely on these
    assert (recorded["learning_rate"], recorded["blocks"], recorded["resolution"]) == (6e-3, 1, 64)
    assert provenance["task"] == "dreambooth"
    assert provenance["base"]["name"] == "tiny"
    assert provenance["base"]["fingerprint"] == fingerprint(find_base("tiny"))
    assert provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert DreamBoothConfig(**recorded)


def test_metrics_have_a_line_per_step_and_no_clock(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        expected = {"step", "loss", "learning_rate"} | ({"validation_loss"} if row["step"] in (3, 6, 8) else set())
        assert set(row) == expected
        assert all(np.isfinite(value) for value in row.values())


def test_cost_is_told_apart(whole):
    cost = json.loads((whole / "cost.json").read_text())
    assert (cost["steps"], cost["processes"]) == (8, 1)
    assert cost["seconds"]["train"] > 0
    assert cost["images_per_second"] == pytest.approx(8 * 2 / cost["seconds"]["train"], rel=0.01)
    assert cost["peak_memory_bytes"] > 10**7


def test_the_learning_rate_warms_up_and_follows_the_cosine(whole):
    """The rate of each step, by the schedule's formula: steps are optimizer steps, whatever is accumulated."""
    for row in metrics(whole):
        step = row["step"] - 1  # the rate is that of the step that was made
        factor = step / 3 if step < 3 else 0.5 * (1 + cos(pi * (step - 3) / (8 - 3)))
        assert row["learning_rate"] == pytest.approx(6e-3 * factor, abs=1e-9)


def test_the_average_is_what_is_saved(whole):
    """The last checkpoint's average, which follows from the parameters by EMA's formula."""
    checkpoint = whole / "checkpoints" / "step-000008"
    average = load_file(checkpoint / "ema.safetensors")
    saved = weights(whole)
    assert len(saved) == len(average)
    renamed = {name.replace("base_model.model.", ""): tensor for name, tensor in saved.items()}
    for name, tensor in average.items():
        plain = name.removeprefix("unet.").removesuffix(".default")
        assert torch.equal(renamed[plain], tensor), name
    parameters = load_file(checkpoint / "parameters.safetensors")
    assert any(not torch.equal(parameters[name], tensor) for name, tensor in average.items())


def test_ema_by_hand(tmp_path, make_config):
    run = train_dreambooth(make_config(tmp_path / "run", steps=4, checkpoint_every=1, ema_decay=0.15))
    shadow = None
    for step in range(1, 5):
        checkpoint = run / "checkpoints" / f"step-{step:06d}"
        parameters, average = (load_file(checkpoint / f"{name}.safetensors") for name in ("parameters", "ema"))
        if shadow is not None:
            decay = min(0.15, step / (9 + step))  # diffusers warms the decay up: (1 + n) / (10 + n) at its n-th update
            for name, before in shadow.items():
                torch.testing.assert_close(average[name], decay * before + (1 - decay) * parameters[name])
        shadow = average


def test_it_learns(tmp_path, make_config):
    """Against the untouched base on the validation batches, which a single step at a vanishing rate measures."""
    untouched = make_config(tmp_path / "base", steps=1, method="lora", learning_rate=1e-12, prior_preservation=False)
    run = train_dreambooth(make_config(tmp_path / "run", steps=20, method="lora", learning_rate=3e-3, prior_preservation=False))
    before, after = (metrics(path)[-1]["validation_loss"] for path in (train_dreambooth(untouched), run))
    assert after < 0.98 * before


# --- Again, and after a stop -------------------------------------------------------------------------------------------


def test_the_same_run_gives_the_same_bytes(whole, tmp_path, make_config):
    torch.manual_seed(12345)
    np.random.seed(12345)
    again = train_dreambooth(make_config(tmp_path / "elsewhere", **EVERYTHING))
    assert results(again) == results(whole)


def test_another_seed_gives_another_run(tmp_path, make_config):
    runs = [train_dreambooth(make_config(tmp_path / str(seed), seed=seed, prior_preservation=False)) for seed in (1, 2)]
    assert metrics(runs[0])[0]["loss"] != metrics(runs[1])[0]["loss"]


def test_it_does_not_matter_what_is_measured_along_the_way(tmp_path, make_config):
    plain = train_dreambooth(make_config(tmp_path / "plain", steps=2, ema_decay=0.9))
    busy = make_config(
        tmp_path / "busy", steps=2, ema_decay=0.9, eval_every=1, checkpoint_every=1, sample_every=1, sample_count=1
    )
    assert (train_dreambooth(busy) / "adapter" / "adapter_model.safetensors").read_bytes() == (
        plain / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.01)


def test_a_killed_run_resumes_to_the_same_bytes(whole, tmp_path, make_config):
    output = tmp_path / "killed"
    recipe = as_recipe(make_config(output, **EVERYTHING), tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "etherdiff"]
    train = [*command, "train-dreambooth", "--config", str(recipe)]
    process = subprocess.Popen(train, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    wait_for(output / "checkpoints" / "step-000004", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    assert not (output / "adapter").exists()
    with pytest.raises(UserError, match="has not finished"):
        run_source(output)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a kill in the middle of a line
    resumed = subprocess.run([*command, "resume", str(output)], env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    assert results(output) == results(whole)


@pytest.fixture
def stopped(whole, tmp_path):
    """The run as it was when it had just written step 6."""
    run = tmp_path / "stopped"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    return run


def test_a_damaged_checkpoint_is_passed_over_and_the_result_is_the_same(whole, stopped):
    damaged = stopped / "checkpoints" / "step-000006" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-50])
    resume(stopped)
    assert results(stopped) == results(whole)
    assert newest_checkpoint(stopped / "checkpoints") == (stopped / "checkpoints" / "step-000008", [])


def test_without_a_checkpoint_it_starts_again(whole, stopped):
    shutil.rmtree(stopped / "checkpoints")
    resume(stopped)
    assert results(stopped) == results(whole)


def test_resuming_what_is_finished_changes_nothing(whole, tmp_path):
    run = tmp_path / "finished"
    shutil.copytree(whole, run)
    cost = (run / "cost.json").read_text()
    resume(run)
    assert results(run) == results(whole)
    assert json.loads(cost)["steps"] == 8


def test_the_cost_of_a_resumed_run_is_that_of_the_whole(stopped):
    resume(stopped)
    assert json.loads((stopped / "cost.json").read_text())["steps"] == 8


def test_more_steps_extend_a_run(tmp_path, make_config):
    options = {"eval_every": 2, "checkpoint_every": 2, "prior_preservation": False}
    run = train_dreambooth(make_config(tmp_path / "extended", steps=2, **options))
    resume(run, steps=4)
    assert yaml.safe_load((run / "run.yaml").read_text())["steps"] == 4
    straight = train_dreambooth(make_config(tmp_path / "straight", steps=4, **options))
    assert results(run) == results(straight)


def test_fewer_steps_than_there_are_are_refused(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    with pytest.raises(UserError, match="8"):
        resume(run, steps=6)


def test_dropout_has_no_hidden_state(tmp_path, make_config):
    options = {"dropout": 0.3, "steps": 3, "prior_preservation": False}
    torch.manual_seed(1)
    first = train_dreambooth(make_config(tmp_path / "first", **options))
    torch.manual_seed(2)
    assert results(train_dreambooth(make_config(tmp_path / "second", **options))) == results(first)


def test_resuming_on_another_base_is_refused(tmp_path, make_config):
    base = Path(shutil.copytree(tiny_folder(), tmp_path / "base"))
    run = train_dreambooth(make_config(tmp_path / "run", base=str(base), steps=1, prior_preservation=False))
    path = base / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"other weights.*unet"):
        resume(run, steps=2)


def test_resuming_from_another_directory_works(tmp_path, make_config, subject, monkeypatch):
    shutil.copytree(subject, tmp_path / "here" / "photos")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = {"subject": "photos", "prior_preservation": False}
    train_dreambooth(make_config(Path("run"), **options))
    monkeypatch.chdir(tmp_path / "there")
    resume(tmp_path / "here" / "run", steps=3)


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(UserError, match=r"no run\.yaml"):
        resume(tmp_path)
    for text in ("", "- x", "steps: 3", "provenance: {task: unknown}", "{", "provenance: 3"):
        (tmp_path / "run.yaml").write_text(text)
        with pytest.raises(UserError):
            resume(tmp_path)


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path, make_config):
    options = {"prior_preservation": False, "steps": 1}
    run = train_dreambooth(make_config(tmp_path / "run", checkpoint_every=1, **options))
    (run / "samples").mkdir()
    with pytest.raises(UserError, match="--overwrite"):
        train_dreambooth(make_config(run, **options))
    assert (run / "samples").exists()
    train_dreambooth(make_config(run, overwrite=True, **options))
    assert not (run / "samples").exists()
    assert len(metrics(run)) == 1


# --- Every method, every mode ------------------------------------------------------------------------------------------


QUICK = ("ether+", "lora", "oft", "full")  # one of each kind; the others are in the slow tier


def trainable(method: str) -> int:
    from etherdiff.use.inspection import inspect_base

    return inspect_base(InspectOptions(base="tiny", method=[method]))["methods"][method]["trainable_parameters"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_draws(method, tmp_path, make_config):
    run = train_dreambooth(make_config(tmp_path / "run", method=method, learning_rate=1e-2))
    assert len(metrics(run)) == 2
    recorded = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert recorded["peft_type"]
    parameters = load_file(run / "checkpoints" / "step-000002" / "parameters.safetensors")
    assert sum(tensor.numel() for tensor in parameters.values()) == trainable(method)
    assert all(tensor.dtype == torch.float32 for tensor in parameters.values())
    pictures = []
    for scale in (1.0, 0.0) if method in ("ether", "ether+", "ether+one-sided", "naive", "lora", "full") else (1.0,):
        options = GenerateOptions(
            run=run, prompt=["a photo of sks ball"], output=tmp_path / f"pictures {scale}", num=1, steps=1, scale=scale
        )
        assert generate(options).is_file()
        pictures.append(np.array(Image.open(options.output / "000-a-photo-of-sks-ball" / "0.png")))
    generate(GenerateOptions(base="tiny", prompt=["a photo of sks ball"], output=tmp_path / "base", num=1, steps=1))
    undone = np.array(Image.open(tmp_path / "base" / "000-a-photo-of-sks-ball" / "0.png"))
    assert not np.array_equal(pictures[0], undone)  # the adapter does something
    if len(pictures) == 2:
        assert abs(pictures[1].astype(int) - undone).max() <= 1  # and at scale 0 nothing


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_trains_in_mixed_precision(method, tmp_path, make_config):
    """bf16 is the frozen model's: what is trained stays in float32 and moves, also where the rate is far below bf16's steps."""
    options = {"mixed_precision": "bf16", "learning_rate": 1e-5, "prior_preservation": False, "checkpoint_every": 1}
    run = train_dreambooth(make_config(tmp_path / "run", method=method, **options))
    first, second = (load_file(run / "checkpoints" / f"step-00000{step}" / "parameters.safetensors") for step in (1, 2))
    assert all(tensor.dtype == torch.float32 for tensor in first.values())
    moved = [not torch.equal(first[name], second[name]) for name in first]
    assert sum(moved) > 0.5 * len(moved)
    assert all(np.isfinite(row["loss"]) for row in metrics(run))


def test_mixed_precision_is_near_full_precision_and_resumes(tmp_path, make_config):
    options = {"prior_preservation": False, "steps": 3, "checkpoint_every": 2, "ema_decay": 0.9}
    full = metrics(train_dreambooth(make_config(tmp_path / "fp32", **options)))
    AcceleratorState._reset_state(True)
    run = train_dreambooth(make_config(tmp_path / "bf16", mixed_precision="bf16", **options))
    assert [row["loss"] for row in metrics(run)] == pytest.approx([row["loss"] for row in full], rel=0.03)
    assert metrics(run) != full
    before = results(run)
    shutil.rmtree(run / "checkpoints" / "step-000003")
    resume(run)
    assert results(run) == before


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, make_config, monkeypatch):
    options = {"prior_preservation": False, "steps": 3}
    plain = train_dreambooth(make_config(tmp_path / "plain", **options))
    calls = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **more: calls.append(1) or checkpoint(*args, **more)
    )
    run = train_dreambooth(make_config(tmp_path / "checkpointed", gradient_checkpointing=True, **options))
    assert calls
    for one, other in zip(metrics(run), metrics(plain), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], tensor, rtol=1e-4, atol=1e-5)


def test_velocity_prediction_trains_on_another_target(tmp_path, make_config):
    options = {"prior_preservation": False, "steps": 1}
    losses = []
    for kind in ("epsilon", "v_prediction"):
        run = train_dreambooth(make_config(tmp_path / kind, prediction_type=kind, **options))
        losses.append(metrics(run)[0]["loss"])
    assert losses[0] != losses[1]


def test_full_fine_tuning_saves_the_whole_unet(tmp_path, make_config):
    run = train_dreambooth(make_config(tmp_path / "run", method="full", learning_rate=1e-4, prior_preservation=False))
    before = load_base(find_base("tiny")).unet.state_dict()
    after = weights(run)
    assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])


def test_what_is_not_used_is_not_kept(tmp_path, make_config, monkeypatch):
    models = []
    load = run_module.load_base
    monkeypatch.setattr(run_module, "load_base", lambda *args: models.append(load(*args)) or models[-1])
    train_dreambooth(make_config(tmp_path / "run", prior_preservation=False, steps=1))
    assert models[0].text_encoder is None
    assert models[0].vae is None


def test_curves_go_to_tensorboard(tmp_path, make_config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_dreambooth(make_config(tmp_path / "run", tracker="tensorboard", prior_preservation=False, eval_every=1))
    (events,) = (run / "logs").rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    for key in ("loss", "learning_rate", "validation_loss"):
        logged = {event.step: event.value for event in accumulator.Scalars(key)}
        assert logged == pytest.approx({row["step"]: row[key] for row in metrics(run)}, rel=1e-5)


def test_sample_images_and_sheets(tmp_path, make_config):
    prompts = ["a photo of sks ball", "a/../sks ball: at night?"]
    options = {"sample_every": 10, "sample_prompts": prompts, "sample_count": 2, "steps": 2, "prior_preservation": False}
    run = train_dreambooth(make_config(tmp_path / "run", **options))
    samples = run / "samples"
    folders = ["000-a-photo-of-sks-ball", "001-a-sks-ball-at-night"]
    expected = {
        f"{kind}/{folder}/{seed}.png"
        for kind in ("base", "step-000002", "step-000002")
        for folder in folders
        for seed in (0, 1)
    }
    expected |= {"step-000002.png"}
    assert {str(path.relative_to(samples)) for path in samples.rglob("*.png")} == expected
    for name in sorted(expected):
        if "/" not in name:
            continue
        kind, folder, seed = name.removesuffix(".png").split("/")
        settings = read_png_settings(samples / name)
        step = 0 if kind == "base" else int(kind.split("-")[1])
        assert settings["prompt"] == prompts[folders.index(folder)]
        assert (settings["seed"], settings["training_step"]) == (int(seed), step)
        assert (settings["steps"], settings["guidance_scale"], settings["model"]) == (25, 7.5, "tiny")
        assert Image.open(samples / name).size == (64, 64)
    # rows: base and step for each prompt; columns: seeds; cells of 128 px, 8 px apart, labels left and above
    sheet = Image.open(samples / "step-000002.png")
    assert sheet.width > 2 * (128 + 8) + 8
    assert sheet.height > 4 * (128 + 8) + 8
    same_seed = [np.array(Image.open(samples / kind / folders[0] / "0.png")) for kind in ("base", "step-000002")]
    assert not np.array_equal(*same_seed)
    # the last picture is what the finished adapter draws
    drawn = GenerateOptions(run=run, prompt=[prompts[0]], output=tmp_path / "drawn", num=2)
    generate(drawn)
    for seed in (0, 1):
        later, then = (Image.open(f / folders[0] / f"{seed}.png") for f in (drawn.output, samples / "step-000002"))
        assert abs(np.array(later).astype(int) - np.array(then)).max() <= 1


# --- Several processes -------------------------------------------------------------------------------------------------


def test_two_processes_are_one_with_twice_the_batch(tmp_path, make_config):
    options = EVERYTHING | {"steps": 5, "checkpoint_every": 4, "eval_every": 2, "batch_size": 2, "warmup_steps": 2}
    one = train_dreambooth(make_config(tmp_path / "one", **options))
    recipe = as_recipe(make_config(tmp_path / "two", **(options | {"batch_size": 1})), tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "etherdiff"]
    command += ["train-dreambooth", "--config", str(recipe)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    cost = json.loads((two / "cost.json").read_text())
    assert cost["processes"] == 2
    assert done.stderr.count("trainable parameters") == 1  # one process speaks
    for row, expected in zip(metrics(two), metrics(one), strict=True):
        assert set(row) == set(expected)
        assert row["learning_rate"] == expected["learning_rate"]
        for key in row.keys() & {"loss", "validation_loss"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-3, atol=1e-4)
    assert newest_checkpoint(two / "checkpoints")[0] == two / "checkpoints" / "step-000005"
    # what two processes began, one with twice the batch can read
    assert set(load_file(two / "checkpoints/step-000005/parameters.safetensors")) == set(
        load_file(one / "checkpoints/step-000005/parameters.safetensors")
    )
