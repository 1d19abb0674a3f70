"""Planning a run: everything that is wrong, said at once and before anything is loaded."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from subject_photos import draw_subject

from etherdiff.adapters.methods import METHODS
from etherdiff.config import DreamBoothConfig
from etherdiff.families.bases import ALIASES, find_base
from etherdiff.system.errors import UserError
from etherdiff.system.terminal import console
from etherdiff.tasks import planning as plan_module
from etherdiff.tasks.dreambooth import plan_dreambooth
from etherdiff.tiny import tiny_folder

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, so this is no mistake")


@pytest.fixture
def subject(tmp_path):
    draw_subject(tmp_path / "subject")
    return tmp_path / "subject"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args, **more):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


def config(subject, **options) -> DreamBoothConfig:
    settings = {"base": "tiny", "subject": str(subject), "class_noun": "ball", "output": Path(subject) / "no-run"}
    return DreamBoothConfig(**(settings | {"tracker": "none", "device": "cpu"} | options))


def problems(subject, **options) -> list[str]:
    with pytest.raises(UserError) as caught:
        plan_dreambooth(config(subject, **options))
    return caught.value.problems


def said(action) -> str:
    """What the user is told, as one line of text."""
    with console.capture() as captured:
        action()
    return " ".join(captured.get().split())


def test_a_plan_has_every_default_filled_in(subject):
    plan = plan_dreambooth(config(subject, method="ether+"))
    assert plan.config.learning_rate == METHODS["ether+"].learning_rate == 6e-3
    assert (plan.config.blocks, plan.config.rank) == (1, None)
    assert plan.config.resolution == plan.resolution == 64
    assert (plan.subject_prompt, plan.class_prompt) == ("a photo of sks ball", "a photo of ball")
    assert len(plan.photos.paths) == 5
    assert plan_dreambooth(plan.config) == plan  # planning again changes nothing


@pytest.mark.parametrize(
    ("method", "rate"), [("ether", 6e-3), ("ether+", 6e-3), ("lora", 6e-4), ("oft", 6e-5), ("naive", 6e-5), ("full", 5e-6)]
)
def test_the_papers_learning_rate_is_the_default(subject, method, rate):
    assert plan_dreambooth(config(subject, method=method)).config.learning_rate == rate
    assert plan_dreambooth(config(subject, method=method, learning_rate=0.1)).config.learning_rate == 0.1


def test_nothing_is_written_or_loaded_by_planning(subject, monkeypatch):
    monkeypatch.setattr("etherdiff.families.sd1.load_base", None)
    plan = plan_dreambooth(config(subject))
    assert not plan.output.exists()


def test_everything_wrong_is_said_at_once(subject, monkeypatch):
    (subject / "torn.jpg").write_bytes((subject / "00.png").read_bytes()[:500])
    (subject / "notes.png").write_text("not an image")
    monkeypatch.setattr(plan_module, "_installed", lambda package: False)
    output = subject.parent / "taken"
    output.write_text("a file")
    options = {"class_noun": None, "resolution": 60, "blocks": 7, "output": output, "tracker": "wandb"}
    found = "\n".join(problems(subject, **options, optimizer="adamw8bit", mixed_precision="fp16"))
    for part in (
        "torn.jpg",
        "notes.png",
        "--skip-bad",
        "class_noun: ",
        "resolution: ",
        "7 blocks",
        "output: ",
        "tracker: wandb",
    ):
        assert part in found
    assert "adamw8bit" in found
    assert "mixed_precision: fp16" in found


def test_an_unknown_subject_and_an_unknown_base_are_both_named(tmp_path):
    found = problems("no-such-subject", base="no/such/base", output=tmp_path / "run", class_noun=None)
    assert any("no-such-subject" in line for line in found)
    assert any("no/such/base" in line for line in found)
    assert not any("class_noun" in line for line in found)  # nobody can say before the subject is found


def test_bad_images_are_all_listed(subject):
    (subject / "torn.png").write_bytes((subject / "00.png").read_bytes()[:500])
    (subject / "empty.jpg").write_bytes(b"")
    (subject / "page.webp").write_text("<html>")
    found = problems(subject)
    assert "3 of 8 images cannot be read" in found[0]
    assert len(found) == 4


def test_what_is_left_out_of_the_folder_is_said_in_one_line(subject):
    for name in ("a.jxl", "b.DNG", "noext", "00.txt", ".DS_Store", "Thumbs.db", "held_out/c.jp2"):
        (subject / name).parent.mkdir(exist_ok=True)
        (subject / name).write_bytes(b"x")
    draw_subject(subject / "more")
    told = said(lambda: plan_dreambooth(config(subject, dry_run=True)))
    assert (
        f"warning: left out of {subject}: 1 .DNG file, 1 .jxl file, 1 file without suffix, 1 folder with 5 images, "
        f"1 caption beside images warning: left out of {subject / 'held_out'}: 1 .jp2 file"
    ) in told
    assert "left out" not in said(lambda: plan_dreambooth(config("candy_ball")))


def test_a_folder_of_folders_says_what_is_in_them(tmp_path):
    draw_subject(tmp_path / "subject" / "10_sks ball")
    assert "it holds 1 folder with 5 images;" in problems(tmp_path / "subject")[0]


def test_held_out_images_that_are_trained_on_are_named(subject):
    draw_subject(subject / "held_out")
    held_out = subject / "held_out"
    (held_out / "00.png").unlink()
    with Image.open(held_out / "01.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(held_out / "01.png")
    with Image.open(held_out / "02.png") as image:
        image.save(held_out / "2.webp", lossless=True)  # the same pixels in other bytes
    (held_out / "02.png").write_bytes(b"x")  # whatever else is wrong with it, it is no copy
    told = said(lambda: plan_dreambooth(config(subject)))
    assert (
        "3 of 5 held-out images are photos that are trained on "
        "(held_out/2.webp is 02.png, held_out/03.png is 03.png, held_out/04.png is 04.png): remove them"
    ) in told
    assert "held-out" not in said(lambda: plan_dreambooth(config("candy_ball")))


def test_photos_that_come_out_nearly_black_are_named(subject):
    Image.new("RGB", (64, 64), (9, 9, 9)).save(subject / "dark.png")
    assert f"nearly black as read here: {subject / 'dark.png'}." in said(lambda: plan_dreambooth(config(subject)))


def test_skip_bad_leaves_them_out_and_says_so(subject):
    (subject / "torn.png").write_bytes((subject / "00.png").read_bytes()[:500])
    plans = []
    told = said(lambda: plans.append(plan_dreambooth(config(subject, skip_bad=True))))
    assert len(plans[0].photos.paths) == 5
    assert "torn.png" in told


@pytest.mark.parametrize("name", ["photos [best]", "photos [/best]"])
def test_names_in_brackets_are_said_as_they_are(tmp_path, name):
    draw_subject(tmp_path / name)
    (tmp_path / name / "torn.png").write_bytes(b"")
    assert f"{name}/torn.png" in said(lambda: plan_dreambooth(config(tmp_path / name, skip_bad=True)))


def test_skip_bad_does_not_train_on_nothing(tmp_path):
    (tmp_path / "only.png").write_bytes(b"")
    assert "no readable image" in problems(tmp_path, skip_bad=True)[0]


def test_a_missing_class_noun_is_asked_for(subject):
    (found,) = problems(subject, class_noun=None)
    assert found.startswith("class_noun: ")
    assert "--class-noun" in found


def test_a_subject_of_dreambooth_has_its_noun(tmp_path):
    draw_subject(tmp_path / "dreambooth" / "dog")
    plan = plan_dreambooth(config("dog", class_noun=None, data_root=tmp_path, output=tmp_path / "run"))
    assert plan.class_prompt == "a photo of dog"


@pytest.mark.parametrize("resolution", [1, 60, 66, 100])
def test_resolutions_that_the_unet_cannot_take(subject, resolution):
    (found,) = problems(subject, resolution=resolution)
    assert found == f"resolution: must be a multiple of 16 for this base, not {resolution}"


def test_a_resolution_it_can_take(subject):
    assert plan_dreambooth(config(subject, resolution=80)).resolution == 80


@pytest.mark.parametrize(
    "method",
    [
        "ether",
        "ether+",
        "ether+one-sided",
        "naive",
        "boft",
        "oft",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_blocks_that_do_not_divide_name_the_layer(subject, method):
    (found,) = problems(subject, method=method, blocks=7)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in found
    assert "7" in found


@pytest.mark.parametrize(
    ("method", "option"), [("lora", {"blocks": 2}), ("ether", {"rank": 2}), ("hra", {"dropout": 0.1}), ("full", {"rank": 1})]
)
def test_options_that_a_method_does_not_have(subject, method, option):
    (found,) = problems(subject, method=method, **option)
    assert f"method {method} does not have {next(iter(option))}" in found


@WITHOUT_GPU
def test_what_needs_a_gpu(subject):
    assert "mixed_precision: fp16" in problems(subject, mixed_precision="fp16")[0]
    assert "device: there is no CUDA" in problems(subject, device="cuda")[0]
    assert plan_dreambooth(config(subject, mixed_precision="bf16"))


def test_missing_packages_are_named_with_the_extra_that_brings_them(subject, monkeypatch):
    monkeypatch.setattr(plan_module, "_installed", lambda package: False)
    assert problems(subject, tracker="wandb") == ["tracker: wandb is not installed; pip install 'etherdiff[wandb]'"]
    assert "etherdiff[8bit]" in problems(subject, optimizer="adamw8bit")[0]
    monkeypatch.setattr(plan_module, "_installed", lambda package: True)
    assert plan_dreambooth(config(subject, tracker="wandb"))
    assert "needs a GPU" in problems(subject, optimizer="adamw8bit")[0]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_is_really_looked_for(subject):
    assert "wandb" in problems(subject, tracker="wandb")[0]


def test_outputs_that_exist(subject, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").write_text("")
    (tmp_path / "old-run").mkdir()
    (tmp_path / "old-run" / "run.yaml").write_text("")
    (tmp_path / "empty").mkdir()
    assert "is a file" in problems(subject, output=tmp_path / "file")[0]
    assert "not a run" in problems(subject, output=tmp_path / "papers")[0]
    assert "not a run" in problems(subject, output=tmp_path / "papers", overwrite=True)[0]
    assert "etherdiff resume" in problems(subject, output=tmp_path / "old-run")[0]
    assert plan_dreambooth(config(subject, output=tmp_path / "old-run", overwrite=True))
    assert plan_dreambooth(config(subject, output=tmp_path / "empty"))
    assert plan_dreambooth(config(subject, output=tmp_path / "old-run"), resuming=True)


# --- Bases that are no Stable Diffusion 1.x or 2.x ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "name"),
    [
        ("StableDiffusionXLPipeline", "SDXL"),
        ("StableDiffusion3Pipeline", "Stable Diffusion 3"),
        ("FluxPipeline", "Flux"),
        ("KandinskyPipeline", "KandinskyPipeline"),
    ],
)
def test_other_families_are_refused_by_name(subject, tmp_path, pipeline, name):
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (found,) = problems(subject, base=str(base))
    assert f"is {name}. " in found
    assert "1.x and 2.x" in found


@pytest.fixture
def copy_of_tiny(tmp_path):
    return Path(shutil.copytree(tiny_folder(), tmp_path / "base"))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("channels", [8, 9])
def test_an_inpainting_unet_is_refused(subject, copy_of_tiny, channels):
    change(copy_of_tiny / "unet" / "config.json", in_channels=channels)
    (found,) = problems(subject, base=str(copy_of_tiny))
    assert f"{channels} input channels" in found


def test_a_folder_of_another_kind_is_refused(subject, tmp_path):
    assert "no model_index.json" in problems(subject, base=str(subject))[0]
    (tmp_path / "model_index.json").write_text("{")
    assert "cannot be read" in problems(subject, base=str(tmp_path))[0]


def test_a_base_without_a_part_is_refused(subject, copy_of_tiny):
    shutil.rmtree(copy_of_tiny / "vae")
    (found,) = problems(subject, base=str(copy_of_tiny))
    assert "vae" in found


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(subject, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x04.")
    (found,) = problems(subject, base=str(path))
    assert path.name in found
    assert "safetensors" in found


def test_a_missing_or_broken_file_is_refused(subject, tmp_path):
    assert "no such file" in problems(subject, base=str(tmp_path / "model.safetensors"))[0]
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    assert "model.safetensors" in problems(subject, base=str(tmp_path / "model.safetensors"))[0]


def test_a_hub_id_without_a_network_says_what_would_do(subject):
    (found,) = problems(subject, base="sd15")
    assert ALIASES["sd15"] in found
    assert "--base tiny" in found


# --- Identifiers -------------------------------------------------------------------------------------------------------


def test_an_identifier_of_several_tokens_is_warned_of(subject):
    told = said(lambda: plan_dreambooth(config(subject, identifier="qwe")))
    assert "'qwe' is 2 tokens" in told
    assert "warning" in told


def test_the_default_identifier_is_one_token(subject):
    assert "tokens" not in said(lambda: plan_dreambooth(config(subject)))


@pytest.mark.parametrize(("warmup", "warned"), [(0, False), (9, False), (10, True), (50, True)])
def test_a_warm_up_as_long_as_the_run_is_warned_of(subject, warmup, warned):
    told = said(lambda: plan_dreambooth(config(subject, steps=10, warmup_steps=warmup)))
    assert ("warning: warmup_steps" in told) is warned


@pytest.mark.parametrize("given", [{"sample_prompts": ["a sks ball"]}, {"sample_count": 2}])
def test_samples_need_to_be_asked_for(subject, given):
    name = next(iter(given))
    with pytest.raises(UserError, match=f"{name}: does nothing without sample_every"):
        plan_dreambooth(config(subject, **given))
    assert plan_dreambooth(config(subject, sample_every=5, **given)).config.sample_every == 5


def test_ends_of_texts_that_are_not_read_are_said(subject, capsys):
    long = "ball " * 75
    plan_dreambooth(config(subject, sample_every=5, sample_prompts=[long, f"{long} in snow", f"{long} in the desert"]))
    said = " ".join(capsys.readouterr().err.split())
    assert "the text encoder does not read the end of 2 sample prompts, for instance 'in snow': shorten them" in said
    plan_module.warn_of_long_texts(find_base("tiny"), [long, "a ball"], "captions")
    assert capsys.readouterr().err == ""
