"""`etherdiff generate`: what is checked before anything is loaded, and how an image is drawn."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from etherdiff.config import DreamBoothConfig, GenerateOptions
from etherdiff.control.signals.landmarks import Landmarks
from etherdiff.families.diffusion import sample
from etherdiff.families.sd1 import make_pipeline
from etherdiff.images.writing import read_png_settings
from etherdiff.system.errors import RunError, UserError
from etherdiff.use import generate as module
from etherdiff.use.generate import Drawing, control_files, generate, plan_drawing


def options(tmp_path, **more):
    return GenerateOptions(**({"output": tmp_path / "out", "base": "tiny", "prompt": ["a ball", "a tree", "a ball"]} | more))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    wrong = options(tmp_path, prompts=tmp_path / "none.txt", offload=True, resolution=65, adapter=[tmp_path / "nowhere"])
    with pytest.raises(UserError) as caught:
        plan_drawing(wrong)
    found = "\n".join(caught.value.problems)
    for part in ("none.txt", "offload: there is no GPU", "nowhere"):
        assert part in found
    with pytest.raises(UserError, match="multiple of 16") as caught:
        plan_drawing(options(tmp_path, prompt=[], resolution=65))
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"base": None}, "either --run, or --base"),
        ({"run": "runs/dog"}, "either --run, or --base"),
        ({"base": None, "run": "runs/dog", "adapter": ["a"]}, "--adapter goes with --base"),
        ({"base": None, "run": "runs/dog", "prediction_type": "epsilon"}, "--prediction-type goes with --base"),
        ({"control": "map.png"}, "--control goes with --run"),
    ],
)
def test_what_does_not_go_together(tmp_path, more, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_drawing(options(tmp_path, **more))


def test_prompts_are_drawn_once_with_the_usual_sampling(tmp_path):
    (tmp_path / "prompts.txt").write_text("# places\na beach\na tree\n", encoding="utf-8")
    drawing = plan_drawing(options(tmp_path, prompts=tmp_path / "prompts.txt", steps=3))
    assert drawing.prompts == ["a ball", "a tree", "a beach"]
    assert [row.folder.name for row in drawing.rows()] == ["000-a-ball", "001-a-tree", "002-a-beach"]
    assert drawing.sampling == {"sampler": "DPM++ 2M", "steps": 3, "guidance_scale": 7.5}


def test_control_files_of_a_folder(tmp_path):
    for name in ("b.png", "a.png", "metadata.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in control_files(tmp_path)] == ["a.png", "b.png"]
    assert control_files(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_what_systems_hide_in_a_folder_does_not_stop_it_and_what_else_is_there_is_said(tmp_path, capsys):
    names = ("a.png", "b.JPG", ".DS_Store", "Thumbs.db", "._a.png", "desktop.ini", "p.json", "a.jxl", "a.txt", "more/0.png")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in control_files(tmp_path)] == ["a.png", "b.JPG"]
    said = " ".join(capsys.readouterr().err.split())
    assert f"left out of {tmp_path}: 1 .json file, 1 .jxl file, 1 folder with 1 image, 1 caption beside images" in said


def test_control_files_are_those_of_the_signal(tmp_path, capsys):
    for name in ("a.json", "b.NPY", "a.png"):
        (tmp_path / name).touch()
    assert [path.name for path in control_files(tmp_path, Landmarks.suffixes)] == ["a.json", "b.NPY"]
    assert "1 .png file" in capsys.readouterr().err
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"nor a folder of them \(\.jpg.*it holds 1 \.NPY file, 1 \.json file"):
        control_files(tmp_path)


def test_an_image_is_a_function_of_its_prompt_and_seed(model):
    """However it is asked for: one prompt for all seeds, a prompt for each, or embeddings."""
    pipeline = make_pipeline(model)
    first, second = sample(pipeline, "a red ball", [3, 4], 64, steps=2)
    (alone,) = sample(pipeline, "a red ball", [4], 64, steps=2)
    paired = sample(pipeline, ["a tree", "a red ball"], [9, 4], 64, steps=2)[1]
    embeddings, empty = pipeline.encode_prompt("a red ball", "cpu", 1, True)
    (embedded,) = sample(pipeline, None, [4], 64, steps=2, prompt_embeds=embeddings, negative_prompt_embeds=empty)
    images = [np.asarray(image).astype(int) for image in (second, alone, paired, embedded)]
    assert all(abs(image - images[0]).max() <= 1 for image in images)  # batches differ in the last bit
    assert abs(np.asarray(first).astype(int) - images[0]).max() > 1


# --- What is saved, and where -------------------------------------------------------------------------------------------


def drawn(output):
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def quick(tmp_path, **more):
    usual = {"prompt": ["a ball"], "num": 4, "batch_size": 2, "steps": 1, "device": "cpu"}
    return options(tmp_path, **(usual | more))


def test_names_that_look_alike_are_folders_of_their_own(tmp_path):
    prompts = ["猫", "犬", "!!!", "a ball", "a  BALL", "a ball."]
    rows = plan_drawing(options(tmp_path, prompt=prompts)).rows()
    assert [row.prompt for row in rows] == prompts
    assert len({str(row.folder).lower() for row in rows}) == len(prompts)
    made = Drawing(
        plan_drawing(options(tmp_path)).source, options(tmp_path), ["!!!", "犬"], "", [Path("猫.png"), Path("犬.png")]
    )
    assert [row.folder.name for row in made.rows()] == [f"{n:03d}-prompt-prompt" for n in range(4)]


def test_a_stopped_command_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    generate(quick(tmp_path, output=tmp_path / "whole"))
    batches = []

    def counted(*given, **more):
        batches.append(list(given[2]))
        if len(batches) == 2:
            raise RunError("stopped here")
        return sample(*given, **more)

    monkeypatch.setattr(module, "sample", counted)
    with pytest.raises(RunError, match="stopped here"):
        generate(quick(tmp_path))
    assert drawn(tmp_path / "out").keys() == {"000-a-ball/0.png", "000-a-ball/1.png"}
    assert "2 of 4 images are in" in capsys.readouterr().err
    generate(quick(tmp_path))
    assert batches == [[0, 1], [2, 3], [2, 3]]
    assert drawn(tmp_path / "out") == drawn(tmp_path / "whole")
    generate(quick(tmp_path, prompt=["a ball", "a tree"], num=2))
    assert batches[3:] == [[0, 1]]
    generate(quick(tmp_path, prompt=["a ball", "a tree"], num=2))
    assert len(batches) == 4


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"steps": 2}, "steps: 1, here 2"),
        ({"negative_prompt": "rain"}, "negative_prompt: , here rain"),
        ({"resolution": 32}, "resolution: 64, here 32"),
        ({"steps": 2, "prompt": ["a tree"], "seed": 9}, "steps: 1, here 2"),  # would lie beside them
        ({"prompt": ["a  ball"]}, "prompt: a ball, here a  ball"),  # has the same name
    ],
)
def test_images_of_other_settings_are_refused_until_overwrite(tmp_path, monkeypatch, more, named):
    generate(quick(tmp_path, num=1))
    (tmp_path / "out/mine").mkdir()
    (tmp_path / "out/mine/0.png").write_bytes(b"not ours")
    before = drawn(tmp_path / "out")
    other = quick(tmp_path, **({"num": 1} | more))
    with pytest.raises(UserError, match=rf"images made with other settings, such as 000-a-ball.0\.png \({named}.*--overwrite"):
        generate(other)
    monkeypatch.setattr(module, "sample", lambda *_, **__: (_ for _ in ()).throw(RunError("not finite")))
    with pytest.raises(RunError):
        generate(other.model_copy(update={"overwrite": True}))
    assert drawn(tmp_path / "out") == before
    monkeypatch.undo()
    generate(other.model_copy(update={"overwrite": True}))
    after = drawn(tmp_path / "out")
    assert len(after) == 3
    assert after["mine/0.png"] == b"not ours"
    (path,) = (tmp_path / "out").glob("[0-9]*/*.png")
    settings = read_png_settings(path)
    assert [settings["prompt"], settings["steps"], settings["seed"]] == [other.prompt[0], other.steps, other.seed]


def test_what_others_wrote_is_not_replaced_without_a_word(tmp_path):
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out/sheet.png")
    with pytest.raises(UserError, match=r"such as sheet\.png \(nothing in it says how it was made\)"):
        generate(quick(tmp_path))


def test_the_output_is_tried_first(tmp_path, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr(module, "load_base", lambda _: pytest.fail("loaded"))
    with pytest.raises(UserError, match="out cannot be written"):
        generate(quick(tmp_path))
    with pytest.raises(UserError, match="cannot be written"):
        generate(quick(tmp_path, output=tmp_path / "out/below"))


# --- Options and prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"negative_prompt": "rain", "guidance_scale": 1}, "negative_prompt: does nothing without guidance"),
        ({"control_scale": 0.3}, "control_scale: is for runs of train-s2i"),
        ({"guide_control": True}, "guide_control: is for runs of train-s2i"),
        ({"scale": 0.5}, "scale: there is no adapter here"),
        ({"steps": 999}, "steps: the base's noise schedule allows at most 998, not 999"),
        ({"prompt": ["a {identifier} {class_noun}"]}, r"prompt: \{class_noun\}, \{identifier\} can be filled in for a run"),
        ({"negative_prompt": "{identifier}"}, r"prompt: \{identifier\} can be filled in for a run"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, more, sentence):
    with pytest.raises(UserError, match=sentence):
        plan_drawing(options(tmp_path, **more))


def test_identifier_and_class_noun_are_filled_in_as_eval_does(tmp_path):
    base = plan_drawing(options(tmp_path)).source.base
    run = SimpleNamespace(config=DreamBoothConfig(subject="photos", identifier="{class_noun} [v]", class_noun="ball"))
    templates = ["a {identifier} {class_noun}", " a {place} "]
    assert module._fill_in(module.Source(base, [], run), templates) == ["a {class_noun} [v] ball", " a {place} "]


def test_weights_of_a_lora_file_count(tmp_path, monkeypatch):
    base, path = plan_drawing(options(tmp_path)).source.base, tmp_path / "a.safetensors"
    monkeypatch.setattr(module, "read_adapter", lambda place: SimpleNamespace(folder=place))
    found = []
    for content in (b"one", b"other"):
        path.write_bytes(content)
        found.append(module.Source(base, [path]).weights)
    assert found[0] != found[1]


def test_what_is_cut_off_and_what_means_nothing_is_said(tmp_path, capsys):
    long = " ".join(["ball"] * 75) + " in the desert"
    plan_drawing(options(tmp_path, prompt=[long, "a (ball:1.5)"], negative_prompt=long))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("does not read 'in the desert', the end of a prompt that is too long; --long-prompts") == 2
    assert "'(ball:1.5)' is read as it stands" in said
    plan_drawing(options(tmp_path, prompt=[long], long_prompts=True))
    assert "does not read" not in capsys.readouterr().err


def test_long_prompts_are_read_to_their_end(tmp_path):
    """Two that differ beyond the 75th token give different images; short ones the same as without."""
    start = " ".join(["ball"] * 75)
    for name, more in {"cut": {}, "whole": {"long_prompts": True}}.items():
        prompts = [f"{start} in snow", f"{start} a red house", "a ball"]
        generate(quick(tmp_path, output=tmp_path / name, prompt=prompts, num=1, steps=2, **more))
    cut, whole = (
        [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / name).glob("*/0.png"))]
        for name in ("cut", "whole")
    )
    assert (cut[0] == cut[1]).all()
    assert abs(whole[0] - whole[1]).max() > 1
    assert (cut[2] == whole[2]).all()
