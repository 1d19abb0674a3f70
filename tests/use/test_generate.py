"""`etherdiff generate`: what is checked before anything is loaded, and how an image is drawn."""

import numpy as np
import pytest

from etherdiff.config import GenerateOptions
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
