"""Features of files: read once, cached by content and network, never from an image that cannot be used."""

import os

import pytest
import torch
from eval_toys import black, draw
from PIL import Image

from etherdiff.eval import features as features_module
from etherdiff.eval.features import Features, compute_features, encode_images, hash_images, is_black
from etherdiff.eval.functional import lpips_distances
from etherdiff.eval.networks import Backbone, Identity, Preprocessing
from etherdiff.images.reading import read_image

DINO, BOTH = frozenset({"dino"}), frozenset({"dino", "clip"})


class Counted(Backbone):
    """A mean colour per image, which counts the images it sees."""

    preprocessing = Preprocessing(size=(4, 4))

    def __init__(self, name="counted", value=None):
        self.identity = Identity(name, None, "0" * 64, "tensors", "mean colour", self.preprocessing.describe())
        self.seen = 0
        self.value = value

    def encode(self, pixels):
        batch = pixels if isinstance(pixels, torch.Tensor) else torch.stack(list(pixels))
        self.seen += len(batch)
        return batch.float().mean((2, 3)) if self.value is None else torch.full((len(batch), 3), self.value)


class CountedLayers(Counted):
    cached = False


@pytest.fixture
def files(tmp_path):
    return [draw(tmp_path / f"{number}.png", number) for number in range(5)]


def run(paths, backbones, roles=DINO, **more):
    return compute_features(paths, backbones, [roles] * len(paths), **more)[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_those_of_each_image_alone_in_order(files, backbones, workers):
    found = run(files, {role: backbones[role] for role in BOTH}, BOTH, batch_size=2, workers=workers)
    for role in BOTH:
        alone = [backbones[role].encode([backbones[role].preprocessing.pixels(read_image(path))])[0] for path in files]
        for index, expected in enumerate(alone):
            torch.testing.assert_close(found.vectors[role][index], expected, atol=1e-5, rtol=0)
    assert not found.faults
    assert not found.unusable


def test_an_image_is_decoded_once_for_all_networks(files, backbones, monkeypatch):
    opened = []
    monkeypatch.setattr(features_module, "read_image", lambda path: opened.append(path) or read_image(path))
    run(files, {role: backbones[role] for role in BOTH}, BOTH)
    assert opened == files


def test_what_is_cached_is_not_computed_again(files):
    first, again = Counted(), Counted()
    before = run(files, {"dino": first})
    after = run(files, {"dino": again})
    assert (first.seen, again.seen) == (5, 0)
    for index in range(5):
        torch.testing.assert_close(after.vectors["dino"][index], before.vectors["dino"][index], atol=0, rtol=0)


def test_the_same_content_under_another_name_is_known(files, tmp_path):
    run(files[:1], {"dino": Counted()})
    again = Counted()
    (tmp_path / "copy.png").write_bytes(files[0].read_bytes())
    run([tmp_path / "copy.png"], {"dino": again})
    assert again.seen == 0


def test_a_changed_image_is_computed_again(files):
    old = run(files, {"dino": Counted()})
    status = files[2].stat()
    draw(files[2], 99)
    os.utime(files[2], ns=(status.st_atime_ns, status.st_mtime_ns))  # content decides, not the clock
    again = Counted()
    new = run(files, {"dino": again})
    assert again.seen == 1
    assert not torch.equal(new.vectors["dino"][2], old.vectors["dino"][2])


def test_another_network_shares_nothing(files):
    run(files, {"dino": Counted()})
    other = Counted("another")
    run(files, {"dino": other})
    assert other.seen == 5


def test_a_torn_file_in_the_cache_is_as_good_as_none(files, cache):
    run(files, {"dino": Counted()})
    torn, *_ = sorted(cache.rglob("*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-5])
    again = Counted()
    run(files, {"dino": again})
    assert again.seen == 1


def test_a_cache_that_cannot_be_written_only_costs_time(files, cache):
    cache.write_text("in the way")
    assert len(run(files, {"dino": Counted()}).vectors["dino"]) == 5


def test_black_and_unreadable_images_have_no_features(files, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(files[0].read_bytes()[:100])
    paths = [files[0], black(tmp_path / "black.png"), broken, tmp_path / "nowhere.png", files[1]]
    found = run(paths, {"dino": Counted()})
    assert sorted(found.vectors["dino"]) == [0, 4]
    assert found.faults[1] == "black"
    assert sorted(found.faults) == [1, 2, 3]
    again = Counted()
    assert run(paths, {"dino": again}).faults == found.faults
    assert again.seen == 0


def test_nearly_black_is_not_black():
    image = Image.new("RGB", (8, 8))
    assert is_black(image)
    image.putpixel((3, 3), (0, 0, 1))
    assert not is_black(image)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_features_that_mean_nothing_are_noted_and_never_cached(files, value):
    found = run(files, {"dino": Counted(value=value)})
    assert found.unusable == {"dino": [0, 1, 2, 3, 4]}
    assert found.vectors == {}
    mended = Counted()
    assert len(run(files, {"dino": mended}).vectors["dino"]) == 5


def test_images_of_any_size_go_in_one_batch(tmp_path):
    class AsIs(Counted):
        preprocessing = Preprocessing()

        def encode(self, pixels):
            return torch.stack([image.float().mean((1, 2)) for image in pixels])

    paths = [draw(tmp_path / f"{side}.png", side, (side, side)) for side in (20, 30)]
    assert len(run(paths, {"dino": AsIs()}).vectors["dino"]) == 2


def test_hashes_are_of_the_content(files):
    assert hash_images([files[0], files[0].with_name("nowhere.png")])[1] is None
    assert list(encode_images([], {})) == []


# LPIPS distances


def distances(paths, backbone, reference, groups, batch_size=32):
    found, tables = compute_features(
        paths, {"lpips": backbone}, [frozenset({"lpips"})] * len(paths), reference, groups, batch_size
    )
    return found, tables


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_distances_are_those_of_each_pair(files, backbones, batch_size):
    lpips = backbones["lpips"]
    _, tables = distances(files, lpips, range(2), [range(2, 5)], batch_size)
    vectors = [lpips.encode([lpips.preprocessing.pixels(read_image(path))])[0] for path in files]
    torch.testing.assert_close(tables.to_reference[1], lpips_distances(vectors[2:], vectors[:2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tables.among[1], lpips_distances(vectors[2:], vectors[2:]), atol=1e-5, rtol=0)
    torch.testing.assert_close(tables.among[0], lpips_distances(vectors[:2], vectors[:2]), atol=1e-5, rtol=0)
    assert not tables._vectors.keys() & {2, 3, 4}  # dropped as soon as the group is done


def test_distances_are_cached_until_an_image_of_theirs_changes(files):
    groups = [range(2, 4), range(4, 5)]
    seen = []
    for change in (None, None, files[4], files[0]):
        if change is not None:
            draw(change, 77)
        backbone = CountedLayers()
        _, tables = distances(files, backbone, range(2), groups)
        assert len(tables.among) == 3
        seen.append(backbone.seen)
    assert seen == [5, 0, 3, 5]  # a changed group needs the reference again; a changed reference everything


def test_images_that_cannot_be_used_have_no_distances(files, tmp_path):
    paths = [files[0], black(tmp_path / "black.png"), files[2], tmp_path / "nowhere.png", files[3]]
    for _ in range(2):  # and the second time neither
        found, tables = distances(paths, CountedLayers(), range(2), [range(2, 5)])
        assert sorted(found.faults) == [1, 3]
        assert torch.isfinite(tables.to_reference[1]).tolist() == [[True, False], [False, False], [True, False]]
        assert torch.isfinite(tables.among[1]).tolist() == [[True, False, True], [False] * 3, [True, False, True]]


def test_no_reference_image_leaves_the_distances_within_groups(files):
    _, tables = distances(files, CountedLayers(), range(0), [range(2), range(2, 5)])
    assert tables.to_reference[2].shape == (3, 0)
    assert torch.isfinite(tables.among[2]).all()


def test_nothing_is_known_of_no_images():
    assert compute_features([], {}, []) == (Features([]), None)
