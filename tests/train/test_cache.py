"""The cache: what is in it was made from the same key, whole, or it is made again."""

import multiprocessing
from pathlib import Path

import pytest
import safetensors.torch
import torch
from etherdiff.train.cache import cached, digest
from safetensors.torch import save_file

from etherdiff.train import cache


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ETHERDIFF_CACHE", str(tmp_path))


class Compute:
    """Counts its calls."""

    def __init__(self, value: float = 1.0) -> None:
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return {"a": torch.full((3, 4), self.value), "b": torch.arange(6).reshape(2, 3).T}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def assert_right(tensors, value: float = 1.0) -> None:
    expected = Compute(value)()
    assert set(tensors) == set(expected)
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_the_second_time_nothing_is_computed(tmp_path):
    compute = Compute()
    assert_right(cached("kind", {"x": [1, None]}, compute))
    assert_right(cached("kind", {"x": [1, None]}, compute))
    assert_right(cached("kind", {"x": (1, None)}, compute))  # equal as JSON
    assert compute.calls == 1
    assert [path.parent.name for path in files(tmp_path)] == ["kind"]


def test_the_second_time_is_laid_out_as_the_first():
    first, second = (cached("kind", {"x": 1}, Compute()) for _ in range(2))
    assert {name: tensor.stride() for name, tensor in first.items()} == {n: t.stride() for n, t in second.items()}


def test_another_key_or_kind_is_computed_anew():
    compute = Compute()
    for kind, key in (("a", {"x": 1}), ("a", {"x": 2}), ("b", {"x": 1}), ("a", {"x": 1, "y": None})):
        cached(kind, key, compute)
    assert compute.calls == 4


def test_the_order_of_keys_does_not_matter():
    assert digest({"a": 1, "b": {"c": 2, "d": 3}}) == digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert len({digest(key) for key in ({"a": 1}, {"a": "1"}, {"a": 1.5}, {"b": 1}, {"a": [1]}, {})}) == 6


def test_a_file_made_from_another_key_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "digest", lambda key: "same-name")
    assert_right(cached("kind", {"x": 1}, Compute(1.0)), 1.0)
    assert_right(cached("kind", {"x": 2}, Compute(2.0)), 2.0)
    compute = Compute(3.0)
    assert_right(cached("kind", {"x": 2}, compute), 2.0)
    assert compute.calls == 0


def test_a_file_without_a_key_is_not_believed(tmp_path):
    cached("kind", {"x": 1}, Compute())
    (path,) = files(tmp_path)
    save_file({"a": torch.zeros(1)}, path)
    assert_right(cached("kind", {"x": 1}, Compute()))


@pytest.mark.parametrize("keep", [0, 1, 8, 20, 100, -1], ids=lambda keep: f"{keep} bytes")
def test_a_torn_file_is_made_again(tmp_path, keep):
    cached("kind", {"x": 1}, Compute())
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    compute = Compute()
    assert_right(cached("kind", {"x": 1}, compute))
    assert_right(cached("kind", {"x": 1}, compute))  # the file is whole again
    assert compute.calls == 1
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("at", [0.5, 0.9, 1.0])
def test_a_flipped_bit_is_noticed(tmp_path, at):
    """In a tensor, which safetensors itself would read as it is."""
    cached("kind", {"x": 1}, Compute())
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    values = len(content) - 4 * (12 + 6 * 2)  # 12 float32, 6 int64
    content[values + int(at * (len(content) - 1 - values))] ^= 1
    path.write_bytes(content)
    compute = Compute()
    assert_right(cached("kind", {"x": 1}, compute))
    assert compute.calls == 1


def test_garbage_is_made_again(tmp_path):
    cached("kind", {"x": 1}, Compute())
    (path,) = files(tmp_path)
    path.write_bytes(b"\xff" * 1000)
    assert_right(cached("kind", {"x": 1}, Compute()))


def test_a_file_whose_key_is_garbled_is_made_again(tmp_path):
    cached("kind", {"x": 1}, Compute())
    (path,) = files(tmp_path)
    tensors = {name: tensor.contiguous() for name, tensor in Compute()().items()}
    save_file(tensors, path, metadata={"key": '{"x": '})
    assert_right(cached("kind", {"x": 1}, Compute()))


def test_a_failed_computation_leaves_nothing(tmp_path):
    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cached("kind", {"x": 1}, fail)
    assert files(tmp_path) == []


def test_a_failed_write_leaves_nothing_and_the_next_succeeds(tmp_path, monkeypatch):
    def half_a_file(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half_a_file)
        with pytest.raises(OSError, match="disk full"):
            cached("kind", {"x": 1}, Compute())
    assert files(tmp_path) == []
    assert_right(cached("kind", {"x": 1}, Compute()))


def _write_at_once(barrier, wrong) -> None:
    def compute():
        barrier.wait(30)  # nobody writes before all have looked
        return Compute()()

    try:
        assert_right(cached("kind", {"x": 1}, compute))
    except BaseException as error:
        wrong.put(repr(error))


def test_processes_that_write_at_the_same_time_leave_one_whole_file(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, wrong = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_write_at_once, args=(barrier, wrong)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert wrong.empty(), wrong.get()
    assert len(files(tmp_path)) == 1
    unused = Compute()
    assert_right(cached("kind", {"x": 1}, unused))
    assert unused.calls == 0
