"""controlnet-aux's annotators: what they draw, in which size, and what is said where they cannot."""

from typing import get_args

import cv2
import numpy as np
import pytest
from PIL import Image

from etherdiff.config import SignalName
from etherdiff.control.signals import SIGNALS, annotation, recorded_signal
from etherdiff.control.signals.annotation import ANNOTATORS, annotate, annotated_by
from etherdiff.control.signals.canny import edges
from etherdiff.images.reading import resize_and_crop
from etherdiff.system.errors import UserError
from etherdiff.tiny.world import render_scene


def a_photo(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(render_scene("train", 5).image).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("side", [64, 96, 128])
def test_edges_are_opencvs_whether_controlnet_aux_draws_them_or_not(side):
    square = np.asarray(a_photo((side, side)))
    wanted = cv2.Canny(square, 50, 120) > 0
    assert wanted.any()
    assert (edges(square, 50, 120) == wanted).all()


def test_every_annotator_there_is_one():
    import controlnet_aux

    assert all(hasattr(controlnet_aux, name) for name, _ in ANNOTATORS.values())


@pytest.mark.parametrize("size", [(128, 128), (96, 96), (100, 70)])
def test_a_picture_is_drawn_in_the_images_size(size):
    image = np.asarray(a_photo(size))
    drawn = annotate("shuffle", image)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert not (drawn == image).all()
    low, high = image.reshape(-1, 3).min(0), image.reshape(-1, 3).max(0)
    assert (drawn >= low - 3.0).all()  # its colours are the image's, mixed by scaling
    assert (drawn <= high + 3.0).all()


def test_an_annotation_is_a_signal(tmp_path):
    signal = annotated_by("shuffle")(96)
    a_photo((120, 100)).save(tmp_path / "a.png")
    signal.derive(tmp_path / "a.png", tmp_path / "control.png")
    assert signal.problems(tmp_path / "control.png") == []
    picture = signal.picture(tmp_path / "control.png", 96)
    assert picture.shape == (96, 96, 3)
    assert (picture == np.asarray(Image.open(tmp_path / "control.png"))).all()
    half = np.asarray(resize_and_crop(Image.open(tmp_path / "control.png"), 48))
    assert (signal.target(tmp_path / "control.png", 48) == half).all()
    (tmp_path / "none.png").write_bytes(b"")
    assert "zero bytes" in signal.problems(tmp_path / "none.png")[0]
    with pytest.raises(UserError, match="no such file"):
        signal.derive(tmp_path / "absent.png", tmp_path / "control.png")


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    import controlnet_aux

    def fetch(*_: object) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr(controlnet_aux.HEDdetector, "from_pretrained", fetch)
    annotation._annotator.cache_clear()
    a_photo((64, 64)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"hed: the weights .* \(no route to the hub\).*give the control images as files"):
        SIGNALS["hed"].choose(None, 64).derive(tmp_path / "a.png", tmp_path / "control.png")


def test_the_names_offered_are_the_signals_there_are():
    assert get_args(SignalName) == tuple(SIGNALS)


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_comes_back_from_what_a_run_records(name):
    signal = SIGNALS[name].choose(None, 64)
    assert recorded_signal(signal.settings()) == signal
