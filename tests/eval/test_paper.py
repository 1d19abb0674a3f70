"""The paper's numbers, and what may stand beside them."""

import pytest

from etherdiff.adapters.methods import METHODS
from etherdiff.eval.metrics import METRICS
from etherdiff.eval.paper import PAPER_S2I, PAPER_SUBJECTS, differs_from_paper, paper_value

DINO = {
    "backbone": {
        "name": "facebook/dino-vits16",
        "revision": "abc",
        "feature": "CLS token of the last hidden state",
        "preprocessing": {
            "edge": None,
            "size": [224, 224],
            "crop": None,
            "resample": "bilinear",
            "mean": [0.485, 0.456, 0.406],
        },
    }
}
CLIP = {
    "backbone": {
        "name": "openai/clip-vit-large-patch14",
        "feature": "projected embeddings",
        "preprocessing": {"edge": 224, "size": None, "crop": [224, 224], "resample": "bicubic"},
    },
    "prompts": {"form": "with identifier"},
}


def test_numbers_of_the_table():
    assert paper_value("dino", "ether+") == 0.666
    assert paper_value("clip_t", "ether+one-sided") is None
    assert paper_value("lpips_real_images", "ether+") == 0.695
    assert paper_value("dino_held_out", "ether+") is None
    assert paper_value("fid", "ether+") == 31.0


def test_rows_are_methods_and_columns_are_scores():
    known = {*METHODS, "full", "real images", "none", "oft+magnitude"}
    assert {*PAPER_SUBJECTS, *PAPER_S2I} <= known
    assert {score for row in PAPER_SUBJECTS.values() for score in row} <= set(METRICS)


@pytest.mark.parametrize(
    ("score", "identity"), [("dino", DINO), ("clip_i", CLIP), ("clip_t", CLIP), ("dino_real_images", DINO)]
)
def test_the_same_setting_may_stand_beside(score, identity):
    assert differs_from_paper(score, identity) == []


def test_another_setting_says_why_not():
    tiny = {"backbone": DINO["backbone"] | {"name": "etherdiff/tiny-dino"}}
    assert differs_from_paper("dino", tiny) == ["backbone name"]
    cropped = {"backbone": CLIP["backbone"] | {"preprocessing": {"edge": 256, "size": None, "crop": [224, 224]}}}
    assert differs_from_paper("clip_i", cropped) == ["backbone preprocessing.edge", "backbone preprocessing.resample"]
    assert differs_from_paper("clip_t", CLIP | {"prompts": {"form": "without identifier"}}) == ["prompts without identifier"]
    assert differs_from_paper("lpips_diversity", {}) == ["the paper has no score lpips_diversity"]
    assert differs_from_paper("dino_held_out", DINO) == ["the paper has no score dino_held_out"]
