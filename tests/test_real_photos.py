"""The main job on the real DreamBooth photos, found by the subject's name under a data root."""

import pytest
import yaml
from PIL import Image

from etherdiff.config import DreamBoothConfig, GenerateOptions
from etherdiff.images.reading import read_image
from etherdiff.run import train_dreambooth
from etherdiff.tasks.dreambooth import plan_dreambooth
from etherdiff.use.generate import generate

NOUNS = {"backpack": "backpack", "cat": "cat", "dog": "dog", "rc_car": "toy", "teapot": "teapot"}


def config(subject, data_root, output, **options):
    settings = {"steps": 2, "class_images": 2, "class_sampling_steps": 2, "tracker": "none", "flip": True, "crop": "random"}
    settings |= {"base": "tiny", "subject": subject, "data_root": data_root, "output": output, "eval_scores": "off"}
    return DreamBoothConfig(**(settings | options))


@pytest.mark.parametrize("subject", NOUNS)
def test_every_subject_is_found_with_its_noun(dreambooth_data, tmp_path, subject):
    plan = plan_dreambooth(config(subject, dreambooth_data, tmp_path / "run"))
    assert plan.subject_prompt == f"a photo of sks {NOUNS[subject]}"
    assert plan.class_prompt == f"a photo of {NOUNS[subject]}"
    files = sorted((dreambooth_data / "dreambooth" / subject).glob("*.jpg"))
    assert plan.photos.paths == tuple(files)
    images = [read_image(path) for path in files]
    assert all(image.mode == "RGB" and min(image.size) >= 256 for image in images)


def test_from_the_photos_of_a_dog_to_a_picture(dreambooth_data, tmp_path):
    run = train_dreambooth(config("dog", dreambooth_data, tmp_path / "run"))
    recorded = yaml.safe_load((run / "run.yaml").read_text())
    assert recorded["class_noun"] == "dog"
    assert recorded["provenance"]["subject_prompt"] == "a photo of sks dog"
    sheet = generate(
        GenerateOptions(run=run, prompt=["a photo of sks dog in the snow"], output=tmp_path / "out", num=2, steps=2)
    )
    assert Image.open(sheet).width > 2 * 64
