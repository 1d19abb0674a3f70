"""Checkpoints: what comes back is what was there, bit for bit, and what is damaged is passed over."""

import hashlib
import json
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from etherdiff.config import TrainConfig
from etherdiff.train.checkpoint import checkpoint_path, load_checkpoint, newest_checkpoint, save_checkpoint
from etherdiff.train.loop import TrainingState, fit, make_accelerator, prepare_training


class Regression(nn.Module):
    """A task: squared error of a small network with a frozen part."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(4, 5).requires_grad_(False)
        self.hidden, self.out = nn.Linear(5, width), nn.Linear(width, 1)

    def forward(self, batch):
        return (self.out(torch.tanh(self.hidden(self.frozen(batch["x"])))) - batch["y"]).square().mean()


def batches(step: int):
    generator = torch.Generator().manual_seed(step)
    return [{"x": torch.randn(8, 4, generator=generator), "y": torch.randn(8, 1, generator=generator)}]


def config(**options) -> TrainConfig:
    settings = {
        "steps": 9,
        "learning_rate": 0.05,
        "lr_schedule": "cosine",
        "warmup_steps": 3,
        "tracker": "none",
        "device": "cpu",
    }
    return TrainConfig(**(settings | options))


@pytest.fixture(params=[None, 0.9], ids=["plain", "ema"])
def settings(request):
    return config(ema_decay=request.param)


def start(settings, tmp_path, task=None) -> tuple[TrainingState, object]:
    accelerator = make_accelerator(settings, tmp_path / "logs")
    return prepare_training(task or Regression(), settings, accelerator), accelerator


def train(state, settings, accelerator, until: int) -> list[float]:
    losses = []
    fit(state, batches, settings.model_copy(update={"steps": until}), accelerator, lambda _, loss: losses.append(loss))
    return losses


def everything(state) -> dict[str, torch.Tensor]:
    """All that training depends on, as tensors by name."""
    found = {f"parameter {name}": p.detach().clone() for name, p in state.parameters.items()}
    for index, entries in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {key}": torch.as_tensor(value).clone() for key, value in entries.items()}
    if state.ema is not None:
        found |= {f"ema {i}": p.clone() for i, p in enumerate(state.ema.shadow_params)}
        found["ema step"] = torch.tensor(state.ema.optimization_step)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    found["learning rate"] = torch.tensor([*rates, *state.lr_scheduler.get_last_lr()], dtype=torch.float64)
    found["schedule"] = torch.tensor([state.lr_scheduler.last_epoch, state.step])
    return found


def assert_same(first, second) -> None:
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


def test_the_state_comes_back_bit_for_bit_and_goes_on_the_same(settings, tmp_path):
    state, accelerator = start(settings, tmp_path)
    train(state, settings, accelerator, 5)
    at_five = everything(state)
    path = save_checkpoint(state, tmp_path / "checkpoints", accelerator)
    assert path == checkpoint_path(tmp_path / "checkpoints", 5)
    assert_same(everything(state), at_five)  # saving changes nothing
    losses = train(state, settings, accelerator, 9)

    torch.manual_seed(99)
    other_task = Regression()
    with torch.no_grad():
        other_task.hidden.weight.add_(1.0)
        other_task.out.bias.add_(1.0)
    resumed, accelerator = start(settings, tmp_path, other_task)
    load_checkpoint(resumed, path, accelerator)
    assert_same(everything(resumed), at_five)
    assert train(resumed, settings, accelerator, 9) == losses
    assert_same(everything(resumed), everything(state))


def test_a_state_that_has_moved_on_goes_back(settings, tmp_path):
    state, accelerator = start(settings, tmp_path)
    train(state, settings, accelerator, 4)
    before = everything(state)
    path = save_checkpoint(state, tmp_path / "checkpoints", accelerator)
    train(state, settings, accelerator, 8)
    load_checkpoint(state, path, accelerator)
    assert_same(everything(state), before)


def test_a_checkpoint_before_the_first_step_is_one(tmp_path):
    settings = config()
    state, accelerator = start(settings, tmp_path)
    path = save_checkpoint(state, tmp_path / "checkpoints", accelerator)
    losses = train(state, settings, accelerator, 3)
    resumed, accelerator = start(settings, tmp_path)
    load_checkpoint(resumed, path, accelerator)
    assert train(resumed, settings, accelerator, 3) == losses


def test_nothing_in_a_checkpoint_is_a_pickle(settings, tmp_path):
    state, accelerator = start(settings, tmp_path)
    train(state, settings, accelerator, 1)
    path = save_checkpoint(state, tmp_path / "checkpoints", accelerator)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    assert not any("frozen" in name for name in json.loads((path / "manifest.json").read_text()))


@pytest.fixture
def three(tmp_path):
    """A folder with whole checkpoints of steps 2, 4 and 6."""
    settings = config(ema_decay=0.9)
    state, accelerator = start(settings, tmp_path)
    for step in (2, 4, 6):
        train(state, settings, accelerator, step)
        save_checkpoint(state, tmp_path / "checkpoints", accelerator)
    return tmp_path / "checkpoints"


def test_the_newest_whole_one_is_taken(three):
    assert newest_checkpoint(three) == (three / "step-000006", [])
    shutil.rmtree(three / "step-000006")
    assert newest_checkpoint(three) == (three / "step-000004", [])


def test_there_may_be_none(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") == (None, [])
    (tmp_path / "step-000001").mkdir()
    path, passed_over = newest_checkpoint(tmp_path)
    assert path is None
    assert len(passed_over) == 1


FILES = ("parameters.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json")


def _flip_a_bit(path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "first bit": lambda path: _flip_a_bit(path, 0.0),
    "middle bit": lambda path: _flip_a_bit(path, 0.5),
    "last bit": lambda path: _flip_a_bit(path, 1.0),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_with_a_reason(three, name, damage):
    DAMAGES[damage](three / "step-000006" / name)
    path, passed_over = newest_checkpoint(three)
    assert path == three / "step-000004"
    (reason,) = passed_over
    assert reason.startswith("step-000006: ")
    assert len(reason) > len("step-000006: ") + 10


def test_several_damaged_ones_are_all_named(three):
    for step in (4, 6):
        DAMAGES["middle bit"](three / f"step-{step:06d}" / "optimizer.safetensors")
    path, passed_over = newest_checkpoint(three)
    assert path == three / "step-000002"
    assert [reason.split(":")[0] for reason in passed_over] == ["step-000006", "step-000004"]


@pytest.mark.parametrize("manifest", ["[]", "{}", "1", '"x"', "null"])
def test_a_manifest_that_names_nothing_proves_nothing(three, manifest):
    (three / "step-000006" / "manifest.json").write_text(manifest)
    (three / "step-000006" / "parameters.safetensors").write_bytes(b"")
    assert newest_checkpoint(three)[0] == three / "step-000004"


def test_another_format_is_passed_over(three):
    newest = three / "step-000006"
    state = json.loads((newest / "state.json").read_text()) | {"format": 999}
    (newest / "state.json").write_text(json.dumps(state))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((newest / "state.json").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    path, passed_over = newest_checkpoint(three)
    assert path == three / "step-000004"
    assert "format" in passed_over[0]


def test_the_newest_is_the_largest_step_beyond_six_digits(three):
    for step in (999_999, 1_000_000):
        shutil.copytree(three / "step-000006", checkpoint_path(three, step))
    assert newest_checkpoint(three)[0] == checkpoint_path(three, 1_000_000)


@pytest.mark.parametrize("files_written", [0, 1, 2])
def test_a_crash_half_way_leaves_the_older_one(three, tmp_path, monkeypatch, files_written):
    settings = config(ema_decay=0.9)
    state, accelerator = start(settings, tmp_path)
    load_checkpoint(state, three / "step-000006", accelerator)
    train(state, settings, accelerator, 8)
    save_file, count = safetensors.torch.save_file, 0

    def crash(tensors, path, metadata=None):
        nonlocal count
        count += 1
        if count > files_written:
            raise OSError("no space left")
        save_file(tensors, path, metadata=metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", crash)
        with pytest.raises(OSError, match="no space left"):
            save_checkpoint(state, three, accelerator)
    assert sorted(path.name for path in three.glob("step-*")) == ["step-000002", "step-000004", "step-000006"]
    assert newest_checkpoint(three) == (three / "step-000006", [])
    save_checkpoint(state, three, accelerator)  # with space again, it is written
    assert newest_checkpoint(three) == (three / "step-000008", [])
    assert sorted(path.name for path in three.iterdir()) == [f"step-{step:06d}" for step in (2, 4, 6, 8)]


def test_a_crash_while_a_step_is_written_again_leaves_it_as_it_was(three, tmp_path, monkeypatch):
    settings = config(ema_decay=0.9)
    state, accelerator = start(settings, tmp_path)
    load_checkpoint(state, three / "step-000006", accelerator)

    def crash(*args, **more):
        raise OSError("no space left")

    monkeypatch.setattr(safetensors.torch, "save_file", crash)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(state, three, accelerator)
    assert newest_checkpoint(three) == (three / "step-000006", [])


def test_what_a_killed_process_left_aside_is_no_checkpoint(three):
    shutil.copytree(three / "step-000006", three / ".step-000008.1234.partial")
    assert newest_checkpoint(three) == (three / "step-000006", [])


def test_other_parameters_are_refused(three, tmp_path):
    settings = config(ema_decay=0.9)
    state, accelerator = start(settings, tmp_path, Regression(width=4))
    before = everything(state)
    with pytest.raises(ValueError, match="other parameters"):
        load_checkpoint(state, three / "step-000006", accelerator)
    assert_same(everything(state), before)
    fewer = Regression()
    fewer.out.requires_grad_(False)
    state, accelerator = start(settings, tmp_path, fewer)
    with pytest.raises(ValueError, match="other parameters"):
        load_checkpoint(state, three / "step-000006", accelerator)
