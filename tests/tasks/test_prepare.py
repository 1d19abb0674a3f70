"""Class images: made by the base once per what determines them, whoever makes them, and mended where they are damaged."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from subject_photos import draw_subject

from etherdiff.config import DreamBoothConfig
from etherdiff.families.sd1 import make_pipeline
from etherdiff.images.writing import read_png_settings
from etherdiff.system.errors import UserError
from etherdiff.tasks import dreambooth
from etherdiff.tasks.dreambooth import class_seed, make_class_images, plan_dreambooth


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("subject")
    draw_subject(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Each test makes its class images anew."""
    monkeypatch.setattr(dreambooth, "cache_dir", lambda: tmp_path / "cache")


@pytest.fixture
def made(monkeypatch):
    """The seeds of what is sampled, in its order."""
    seeds = []
    sample = dreambooth.sample

    def counted(pipeline, prompt, these, *rest, **more):
        seeds.extend(these)
        return sample(pipeline, prompt, these, *rest, **more)

    monkeypatch.setattr(dreambooth, "sample", counted)
    return seeds


def plan(subject, **options):
    settings = {"class_noun": "ball", "class_images": 3, "class_sampling_steps": 2, "tracker": "none", "output": subject / "no"}
    return plan_dreambooth(DreamBoothConfig(base="tiny", subject=str(subject), **(settings | options)))


def process(index: int = 0, of: int = 1):
    return SimpleNamespace(process_index=index, num_processes=of, device=torch.device("cpu"), wait_for_everyone=lambda: None)


def test_more_steps_than_the_schedule_has_are_refused(subject):
    with pytest.raises(UserError, match="class_sampling_steps: the base's noise schedule allows at most 998, not 999"):
        plan(subject, class_sampling_steps=999)


def test_class_images_are_made_once(subject, model, hashes, made):
    first = make_class_images(plan(subject), model, hashes, process())
    contents = [path.read_bytes() for path in first]
    assert made == [class_seed(0, index) for index in range(3)]
    assert make_class_images(plan(subject), model, hashes, process()) == first
    assert len(made) == 3
    assert [path.read_bytes() for path in first] == contents
    for path in first:
        assert Image.open(path).size == (64, 64)


def test_they_are_what_the_pipeline_draws(subject, model, hashes):
    path = make_class_images(plan(subject, class_images=1), model, hashes, process())[0]
    generator = torch.Generator().manual_seed(class_seed(0, 0))
    pipeline = make_pipeline(model)
    drawn = pipeline("a photo of ball", num_inference_steps=2, guidance_scale=7.5, generator=[generator], height=64, width=64)
    assert Image.open(path).tobytes() == drawn.images[0].tobytes()
    assert read_png_settings(path)["prompt"] == "a photo of ball"


def test_more_of_them_reuse_those_there_are(subject, model, hashes, made):
    few = make_class_images(plan(subject), model, hashes, process())
    contents = [path.read_bytes() for path in few]
    many = make_class_images(plan(subject, class_images=5), model, hashes, process())
    assert many[:3] == few
    assert [path.read_bytes() for path in few] == contents
    assert len(made) == 5


CHANGES = {
    "prompt": {"class_noun": "cube"},
    "seed": {"seed": 1},
    "steps": {"class_sampling_steps": 3},
    "resolution": {"resolution": 32},
}


@pytest.mark.parametrize("change", CHANGES)
def test_they_are_never_used_for_another(subject, model, hashes, made, change):
    first = make_class_images(plan(subject), model, hashes, process())
    other = make_class_images(plan(subject, **CHANGES[change]), model, hashes, process())
    assert not set(first) & set(other)
    assert len(made) == 6
    assert all(read_png_settings(path)["prompt"] == "a photo of cube" for path in other) == (change == "prompt")


def test_another_base_makes_its_own(subject, model, hashes, made):
    first = make_class_images(plan(subject), model, hashes, process())
    other = make_class_images(plan(subject), model, hashes | {"unet": "another"}, process())
    assert not set(first) & set(other)


def test_what_does_not_shape_them_does_not_make_them_again(subject, model, hashes, made):
    make_class_images(plan(subject), model, hashes, process())
    make_class_images(plan(subject, method="lora", steps=7, identifier="xyz"), model, hashes, process())
    assert len(made) == 3


DAMAGES = {"missing": None, "empty": b"", "truncated": -200, "garbage": b"x" * 5000}


def damaged(paths: list[Path], damage: str) -> list[bytes]:
    """Damage the second file; what was in all of them."""
    contents = [path.read_bytes() for path in paths]
    harm = DAMAGES[damage]
    if harm is None:
        paths[1].unlink()
    else:
        paths[1].write_bytes(contents[1][:harm] if isinstance(harm, int) else harm)
    return contents


@pytest.mark.parametrize("damage", DAMAGES)
def test_only_what_is_damaged_is_made_again(subject, model, hashes, made, damage):
    paths = make_class_images(plan(subject), model, hashes, process())
    before = np.array(Image.open(paths[1])).astype(int)
    contents = damaged(paths, damage)
    untouched = [paths[index].stat().st_mtime_ns for index in (0, 2)]
    made.clear()
    make_class_images(plan(subject), model, hashes, process())
    assert made == [class_seed(0, 1)]
    assert [paths[index].read_bytes() for index in (0, 2)] == [contents[0], contents[2]]
    assert [paths[index].stat().st_mtime_ns for index in (0, 2)] == untouched
    assert abs(np.array(Image.open(paths[1])).astype(int) - before).max() <= 1
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [path.name for path in paths]


def test_what_is_made_again_is_the_same_bytes(subject, model, hashes):
    paths = make_class_images(plan(subject), model, hashes, process())
    contents = damaged(paths, "missing")
    make_class_images(plan(subject), model, hashes, process())
    assert [path.read_bytes() for path in paths] == contents


def made_by_two(subject, model, hashes, made, tmp_path, monkeypatch) -> tuple[list[Path], list[Path], list[list[int]]]:
    """Five class images by one process, by two processes into another cache, and the seeds that each of the two made."""
    alone = make_class_images(plan(subject, class_images=5), model, hashes, process())
    monkeypatch.setattr(dreambooth, "cache_dir", lambda: tmp_path / "another cache")
    shares = []
    for index in range(2):
        made.clear()
        shared = make_class_images(plan(subject, class_images=5), model, hashes, process(index, 2))
        shares.append(list(made))
    return alone, shared, shares


def test_processes_share_the_work(subject, model, hashes, made, tmp_path, monkeypatch):
    alone, shared, shares = made_by_two(subject, model, hashes, made, tmp_path, monkeypatch)
    assert sorted(shares[0] + shares[1]) == sorted(class_seed(0, index) for index in range(5))
    assert abs(len(shares[0]) - len(shares[1])) <= 1
    assert [path.name for path in shared] == [path.name for path in alone]
    for one, other in zip(alone, shared, strict=True):
        assert abs(np.array(Image.open(one)).astype(int) - np.array(Image.open(other))).max() <= 1


def test_processes_make_the_same_bytes(subject, model, hashes, made, tmp_path, monkeypatch):
    alone, shared, _ = made_by_two(subject, model, hashes, made, tmp_path, monkeypatch)
    assert [path.read_bytes() for path in shared] == [path.read_bytes() for path in alone]


def test_class_seeds_are_their_own():
    seeds = {class_seed(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(200)}
    assert len(seeds) == 600
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)  # takes it
