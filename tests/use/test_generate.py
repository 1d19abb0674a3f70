"""`etherdiff generate`: what is checked before anything is loaded, and how an image is drawn."""

import numpy as np
import pytest

from etherdiff.config import GenerateOptions
from etherdiff.control.signals.landmarks import Landmarks
from etherdiff.families.sampling import sample
from etherdiff.families.sd1 import make_pipeline
from etherdiff.system.errors import UserError
from etherdiff.use.generate import control_files, plan_drawing


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
