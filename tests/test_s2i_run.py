"""A controllable run from end to end: trained, stopped and resumed, drawn from, merged, refused where it must be."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from s2i_runs import s2i_config, scenes_folder
from safetensors.torch import load_file

from etherdiff.adapters.io import load_adapter, load_adapters
from etherdiff.config import GenerateOptions, S2IConfig
from etherdiff.control.pipeline import HintEncoder, added_hint
from etherdiff.families.bases import find_base
from etherdiff.families.diffusion import S2I_SAMPLING
from etherdiff.families.sd1 import encode_prompts, load_base
from etherdiff.images.writing import read_png_settings
from etherdiff.run import resume, train_s2i
from etherdiff.runs.model import load_control_run
from etherdiff.runs.run import Run
from etherdiff.system.errors import UserError
from etherdiff.tasks.task import as_tensor
from etherdiff.use.export import export_adapter
from etherdiff.use.generate import generate, run_source
from etherdiff.use.inspection import dry_run
from etherdiff.use.merge import merge_to_folder

METHODS = ("ether", "ether+", "ether+one-sided", "lora", "oft", "naive", "boft", "hra", "vera", "full", "none")
QUICK = ("ether+", "oft", "full", "none")  # one of each kind; the others are in the slow tier


@pytest.fixture(scope="module", autouse=True)
def _few_steps_of_sampling():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(S2I_SAMPLING, "steps", 2)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s2i")
    return train_s2i(s2i_config(folder / "run", sample_every=4, sample_count=2))


def results(run: Path) -> dict[str, bytes]:
    """What a run learned and how it went, byte by byte."""
    folders = [run / "adapter", run / "control_encoder"]
    return {str(p.relative_to(run)): p.read_bytes() for f in folders for p in sorted(f.iterdir())} | {
        "metrics": (run / "metrics.jsonl").read_bytes()
    }


def cli(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "etherdiff", *map(str, arguments)], capture_output=True, text=True)


# --- Training --------------------------------------------------------------------------------------------------------


def test_half_precision_draws_its_samples(tmp_path, another_process, capsys):
    config = s2i_config(tmp_path / "run", mixed_precision="bf16", steps=2, sample_every=2, sample_count=1)
    train_s2i(config)
    assert "failed" not in capsys.readouterr().err
    assert len(list((tmp_path / "run/samples/step-000002").glob("*.png"))) == 1


def test_a_run_leaves_what_the_contract_says(run):
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert (run / "control_encoder" / "config.json").is_file()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "validation_loss" in rows[-1]
    with Image.open(run / "samples" / "step-000004.png") as sheet:
        assert sheet.width > 4 * 64
    assert len(list((run / "samples" / "step-000004").glob("*.png"))) == 2
    opened = Run.open(run)
    config, provenance = opened.config, opened.provenance.content()
    assert provenance["task"] == "s2i"
    assert provenance["pairs"] == {"training": 6, "evaluation": 2}
    assert (config.learning_rate, config.encoder_learning_rate, config.targets) == (1e-3, 1e-4, "attention+geglu")


def test_the_encoder_and_the_adapter_have_their_own_rates(run):
    state = json.loads((run / "checkpoints/step-000004/state.json").read_text())
    assert [group["lr"] for group in state["optimizer"]["groups"]] == [1e-3, 1e-4]


def test_the_encoder_learned_and_so_did_the_adapter(run):
    encoder = load_file(run / "control_encoder" / "diffusion_pytorch_model.safetensors")
    assert encoder["layers.7.weight"].abs().max() > 0
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    u = next(name for name in adapter if name.endswith("ether_u"))
    assert not torch.equal(adapter[u], -adapter[u.replace("ether_u", "ether_v")])  # as they began


def test_stopped_and_resumed_it_ends_with_the_same_bytes(run, tmp_path, monkeypatch):
    from etherdiff import run as main_path

    scenes_folder(tmp_path / "scenes")

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("etherdiff.train.recorder.remove_old_checkpoints", cut_off)  # at step 2, after its checkpoint
        with pytest.raises(KeyboardInterrupt):
            main_path.train_s2i(s2i_config(tmp_path / "run", sample_every=4, sample_count=2, keep=5))
    assert not (tmp_path / "run" / "control_encoder").exists()
    again = results(resume(tmp_path / "run"))
    assert again == results(run)


def test_resuming_with_other_maps_is_refused(tmp_path):
    made = train_s2i(s2i_config(tmp_path / "run", steps=2))
    path = tmp_path / "scenes/train/maps/000.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    with pytest.raises(UserError, match="other images"):
        resume(made, steps=4)


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_every_method_trains_and_draws(method, tmp_path):
    made = train_s2i(s2i_config(tmp_path / "run", steps=1, method=method, eval_every=5))
    assert (made / "adapter").is_dir() == (method != "none")
    sheet = draw(made, tmp_path / "scenes/validation/maps/000.png", tmp_path / "out", steps=1, num=1)
    assert sheet.is_file()


def test_none_trains_the_encoder_alone(tmp_path):
    made = train_s2i(s2i_config(tmp_path / "run", method="none"))
    names = load_file(made / "checkpoints/step-000004/parameters.safetensors").keys()
    assert names
    assert all(name.startswith("hint_encoder.") for name in names)


def test_more_steps_lower_the_validation_loss(tmp_path):
    """On what is trained on, there being nothing else: the loop, the optimizer and the hint work together."""
    scenes_folder(tmp_path / "scenes", training=1, validation=0)
    plain = {"ema_decay": None, "caption_dropout": 0, "flip": False}
    made = train_s2i(s2i_config(tmp_path / "run", steps=40, eval_every=20, learning_rate=5e-3, **plain))
    losses = [json.loads(line).get("validation_loss") for line in (made / "metrics.jsonl").read_text().splitlines()]
    first, last = (loss for loss in losses if loss is not None)
    assert last < first


@pytest.mark.parametrize("method", ["oft", "ether+"])
def test_magnitudes_are_learned_on_top_of_a_run(method, tmp_path):
    first = train_s2i(s2i_config(tmp_path / "first", method=method, steps=2))
    again = train_s2i(s2i_config(tmp_path / "again", refit=first, learning_rate=0.05, steps=3))
    assert results(first)["control_encoder/diffusion_pytorch_model.safetensors"] == (
        (again / "control_encoder/diffusion_pytorch_model.safetensors").read_bytes()
    )
    base = find_base("tiny")
    unet = load_base(base).unet
    dense = load_base(base).unet
    stacked = load_adapters(unet, [(again / "refitted_adapter", 1.0), (again / "adapter", 1.0)])
    load_adapter(dense, first / "adapter")
    factors = load_file(again / "adapter" / "adapter_model.safetensors")
    name, factor = next((name, f) for name, f in factors.items() if "to_q" in name)
    layer = name.removeprefix("base_model.model.").rpartition(".magnitude_factor")[0]
    x = torch.randn(3, dense.get_submodule(layer).in_features)
    assert (factor - 1).abs().max() > 0.01
    expected = factor * dense.get_submodule(layer)(x)  # to_q has no bias
    torch.testing.assert_close(stacked.get_submodule(f"base_model.model.{layer}")(x), expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(UserError, match="no adapter of layers"):
        train_s2i(s2i_config(tmp_path / "third", refit=again))


# --- Using it --------------------------------------------------------------------------------------------------------


def draw(run, control, output, **more):
    usual = {"prompt": ["a photo of a red ball"], "num": 2, "steps": 2, "guidance_scale": 3.0}
    return generate(GenerateOptions(run=run, control=control, output=output, **(usual | more)))


def test_generate_follows_files_and_folders(run, tmp_path):
    maps = run.parent / "scenes/validation/maps"
    sheet = draw(run, maps, tmp_path / "all")
    assert sheet.is_file()
    pictures = sorted((tmp_path / "all").glob("*/*.png"))
    assert len(pictures) == 4
    settings = read_png_settings(pictures[0])
    assert (settings["control"], settings["seed"], settings["sampler"]) == ("000.png", 0, "DDIM")
    draw(run, maps / "001.png", tmp_path / "one")
    folders = ["000-000-a-photo-of-a-red-ball", "001-001-a-photo-of-a-red-ball"]
    assert sorted({path.parent.name for path in pictures}) == folders
    for seed in (0, 1):
        (path,) = (tmp_path / "one").glob(f"000-001-*/{seed}.png")
        assert path.read_bytes() == (tmp_path / "all" / folders[1] / f"{seed}.png").read_bytes()


def test_generate_says_all_that_is_wrong(run, tmp_path):
    Image.fromarray(np.full((64, 64), 99, np.uint8)).save(tmp_path / "bad.png")
    with pytest.raises(UserError) as caught:
        draw(run, tmp_path / "bad.png", tmp_path / "out", prompt=[], resolution=50)
    text = "\n".join(caught.value.problems)
    assert all(said in text for said in ("label values outside", "prompt:", "resolution:"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="neither a control file nor a folder"):
        draw(run, tmp_path / "nothing", tmp_path / "out")


def test_a_merged_run_opens_without_etherdiff_and_predicts_the_same(run, tmp_path):
    source = run_source(run)
    report = merge_to_folder(
        source.base, [(p, 1.0) for p in source.adapters], tmp_path / "out", hint_encoder=source.hint_encoder
    )
    assert report["relative_difference"] < 1e-4
    pipeline, dataset, _, config = load_control_run(run, "cpu")
    control = as_tensor(dataset.signal.picture(dataset.evaluation[0].control, config.resolution))[None]
    text = encode_prompts(pipeline.tokenizer, pipeline.text_encoder, ["a photo of a red ball"])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), added_hint(pipeline.unet, pipeline.hint_encoder(control)):
        expected = pipeline.unet(latents, 500, text).sample
    torch.save((latents, text, control, expected), tmp_path / "expected.pt")
    script = (
        "import sys; sys.modules['etherdiff'] = None\n"
        "import torch\n"
        "from diffusers import DiffusionPipeline\n"
        "p = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, local_files_only=True)\n"
        "latents, text, control, expected = torch.load(sys.argv[2])\n"
        "hint = p.hint_encoder(control)\n"
        "h = p.unet.conv_in.register_forward_hook(lambda m, i, o: o + hint)\n"
        "with torch.no_grad(): found = p.unet(latents, 500, text).sample\n"
        "print(float((found - expected).abs().max()))\n"
        "h.remove()\n"
        "p('a red ball', control, num_inference_steps=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out"), str(tmp_path / "expected.pt")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-4


def test_what_no_file_can_hold_is_refused(run, tmp_path):
    source = run_source(run)
    with pytest.raises(UserError, match="holds a control encoder"):
        merge_to_folder(
            source.base, [], tmp_path / "out", single_file=tmp_path / "a.safetensors", hint_encoder=source.hint_encoder
        )
    refused = cli("export", run, "--format", "kohya", "--output", tmp_path / "a.safetensors")
    assert refused.returncode == 2
    assert "control encoder" in refused.stderr
    refused = cli("generate", "--run", run, "--prompt", "a ball", "--output", tmp_path / "out")
    assert refused.returncode == 2
    assert "--control" in refused.stderr
    assert not (tmp_path / "out").exists()
    assert export_adapter(source.base, source.adapters[0], tmp_path / "peft", "peft")["files"] == 3


def test_a_damaged_encoder_is_refused(run, tmp_path):
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    path = copy / "control_encoder" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or changed"):
        run_source(copy)


# --- What the user gives ---------------------------------------------------------------------------------------------


def test_all_that_is_wrong_comes_in_one_message(tmp_path):
    with pytest.raises(UserError) as caught:
        train_s2i(s2i_config(tmp_path / "run", method="none", blocks=4, base="tiny", device="cuda", mixed_precision="fp16"))
    text = "\n".join(caught.value.problems)
    assert "blocks" in text
    with pytest.raises(UserError) as caught:
        train_s2i(S2IConfig(dataset=str(tmp_path / "nowhere"), base="tiny", resolution=60, output=tmp_path / "run"))
    assert "resolution" in "\n".join(caught.value.problems)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["ether+", "none"])
def test_a_dry_run_says_what_it_would_take(method, tmp_path, capsys):
    dry_run(s2i_config(tmp_path / "run", method=method, dry_run=True))
    said = capsys.readouterr().err
    assert "6 pairs" in said
    assert "control encoder" in said
    assert not (tmp_path / "run").exists()


def test_subjects_cannot_be_trained_with_none():
    refused = cli("train-dreambooth", "--subject", "x", "--method", "none")
    assert refused.returncode == 2
    assert "method" in refused.stderr


def test_an_encoder_is_drawn_from_the_seed_alone(run):
    from etherdiff.tasks.s2i import make_hint_encoder, plan_s2i

    config = Run.open(run).config
    plan = plan_s2i(config, resuming=True)
    torch.manual_seed(1)
    first = make_hint_encoder(plan)
    torch.rand(5)
    again = make_hint_encoder(plan)
    assert isinstance(first, HintEncoder)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
