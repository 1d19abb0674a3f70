"""Moments of many images on the disk: what the autoencoder says, resumed where cut off, computed again where damaged."""

from concurrent.futures import ThreadPoolExecutor, wait
from threading import Event

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from etherdiff.system.files import cache_dir, write_text
from etherdiff.train import batches as module
from etherdiff.train.batches import stored_moments

COUNT, SIDE = 9, 16


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "BETWEEN_RECORDS", 1)


def image(number):
    return np.random.default_rng(number).uniform(-1, 1, (3, SIDE, SIDE)).astype(np.float32)


def store(vae, read=image, flips=2, count=COUNT):

    def views(pixels):
        return np.stack([pixels, pixels[..., ::-1]][:flips])

    key = {"of": "test", "flips": flips, "count": count}
    return stored_moments(vae, count, lambda number: views(read(number)), key, "encoding", flips, at_once=2)


def test_they_are_the_autoencoders_of_each_image_and_its_mirror_image(vae):
    found = store(vae)
    assert len(found) == COUNT
    assert found.flips == 2
    for number in (0, 4, COUNT - 1):
        for flip, pixels in enumerate((image(number), image(number)[..., ::-1].copy())):
            with torch.no_grad():
                expected = vae.encode(torch.from_numpy(pixels)[None]).latent_dist
            mean, std = found.read(number, 0, flip)
            torch.testing.assert_close(mean, expected.mean[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(std, expected.std[0], atol=1e-5, rtol=1e-5)


def test_they_are_computed_once(vae):
    first = np.array(store(vae).array)

    def never(number):
        raise AssertionError(f"image {number} was read again")

    assert np.array_equal(store(vae, never).array, first)


def test_a_run_that_was_cut_off_goes_on_where_it_was(vae):
    whole = np.array(store(vae, count=COUNT).array)
    for path in (cache_dir() / "latents").iterdir():
        path.unlink()
    read = []

    def until_the_sixth(number):
        read.append(number)
        if number == 6 and read.count(6) == 1:
            raise KeyboardInterrupt
        return image(number)

    with pytest.raises(KeyboardInterrupt):
        store(vae, until_the_sixth)
    read.clear()
    read.append(6)  # from here on it is let through
    assert np.array_equal(store(vae, until_the_sixth).array, whole)
    assert sorted(set(read[1:]) - {0}) == [6, 7, 8]  # image 0 tells the shape


def test_damage_is_found_told_of_once_and_mended(vae, monkeypatch):
    warned = []
    monkeypatch.setattr(module, "warn", warned.append)
    whole = np.array(store(vae).array)
    (path,) = (cache_dir() / "latents").glob("*.npy")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert np.array_equal(store(vae).array, whole)
    assert warned == [f"{path} is damaged: computing it again"]


@pytest.mark.parametrize("keep", [0, 1, 8, 20, 100, -1], ids=lambda keep: f"{keep} bytes")
def test_a_torn_file_is_made_again(vae, keep):
    whole = np.array(store(vae).array)
    (path,) = (cache_dir() / "latents").glob("*.npy")
    path.write_bytes(path.read_bytes()[:keep])
    assert np.array_equal(store(vae).array, whole)
    read = []
    assert np.array_equal(store(vae, read.append).array, whole)  # the file is whole again
    assert not read
    assert len(list((cache_dir() / "latents").iterdir())) == 2  # and its record


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"done": 9}', '{"sha256": 1}', "\xff"])
def test_a_file_whose_record_is_damaged_is_made_again(vae, record):
    whole = np.array(store(vae).array)
    (path,) = (cache_dir() / "latents").glob("*.json")
    path.write_text(record)
    assert np.array_equal(store(vae).array, whole)


def test_a_failed_write_leaves_nothing_finished_and_the_next_succeeds(vae, monkeypatch):
    def refuse(path, text):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", refuse)
        with pytest.raises(OSError, match="disk full"):
            store(vae)
    assert not [path for path in (cache_dir() / "latents").glob("*.npy") if "partial" not in path.name]
    assert len(store(vae)) == COUNT


@pytest.mark.parametrize("limit", [0, 2**30])
def test_small_files_are_read_whole_and_large_ones_mapped(vae, monkeypatch, limit):
    monkeypatch.setattr(module, "MAX_IN_MEMORY", limit)
    for found in (store(vae), store(vae)):  # computed, and found
        assert isinstance(found.array, np.memmap) == (limit == 0)
        mean, std = found.read(COUNT - 1, 0, 1)
        assert mean.shape == std.shape == found.array.shape[3:]
        mean += 1  # what was read is the reader's own
        assert not torch.equal(mean, found.read(COUNT - 1, 0, 1)[0])


def test_another_key_is_another_file(vae):
    store(vae)
    assert store(vae, flips=1).flips == 1
    assert len(list((cache_dir() / "latents").glob("*.npy"))) == 2


def test_processes_at_the_same_time_do_not_write_into_one_file(vae):
    """The second waits for the first and reads what it wrote. Threads stand for processes: a lock is of an open file."""
    is_half_way, may_go_on = Event(), Event()

    def held_up(number):
        if number == COUNT // 2:
            is_half_way.set()
            assert may_go_on.wait(60)
        return image(number)

    def never(number):
        raise AssertionError(f"image {number} was read by both")

    with ThreadPoolExecutor(2) as both:
        first = both.submit(store, vae, held_up)
        assert is_half_way.wait(60)
        second = both.submit(store, vae, never)
        assert not wait([second], timeout=1).done
        may_go_on.set()
        one, other = first.result(60), second.result(60)
    assert np.array_equal(one.array, other.array)
    (cache_dir() / "latents").rename(cache_dir() / "before")
    assert np.array_equal(store(vae).array, one.array)
    assert not list(cache_dir().rglob("*.lock"))


def test_a_finished_cache_may_be_read_only(vae, monkeypatch):
    whole = np.array(store(vae).array)

    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(module, "wait_for_lock", refuse)
    assert np.array_equal(store(vae).array, whole)


def test_at_no_moment_does_a_finished_cache_seem_damaged(vae, monkeypatch):
    """Whoever looks just before or after it gets its name either finds nothing or finds it whole."""
    warned = []
    monkeypatch.setattr(module, "warn", warned.append)
    seen = []

    def look_after(path, text):
        write_text(path, text)
        seen.append(module._read_whole(path.with_suffix(".npy")))

    monkeypatch.setattr(module, "write_text", look_after)
    whole = np.array(store(vae).array)
    assert not warned
    assert all(found is None for found in seen)
    monkeypatch.setattr(module, "write_text", write_text)
    (path,) = (cache_dir() / "latents").glob("*.npy")
    path.rename(path.with_suffix(".partial.npy"))  # killed after the record, before the file got its name
    read = []
    assert np.array_equal(store(vae, lambda number: read.append(number) or image(number)).array, whole)
    assert read == [0]
