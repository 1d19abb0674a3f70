"""Faults that really happen here: to the disk, the files, the numbers, the memory, other processes, the clock."""

import ast
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import (
    STEPS,
    as_recipe,
    checkpoints,
    finish,
    flip_a_bit,
    leftovers,
    metrics,
    results,
    small_config,
    start,
    wait_for,
)

import etherdiff
from etherdiff import cli
from etherdiff import run as run_module
from etherdiff.results.runs import LeftOut, read_run
from etherdiff.run import resume, train_dreambooth
from etherdiff.system.errors import NotFiniteError, RunError, UserError
from etherdiff.system.files import remove_temporary, staged_folder, temporary_path
from etherdiff.system.locks import LOCK, run_lock
from etherdiff.system.terminal import console
from etherdiff.tasks import task as task_module
from etherdiff.tasks.task import DenoisingLoss
from etherdiff.train import loop as loop_module
from etherdiff.train import recorder as recorder_module
from etherdiff.train.batches import StepBatches
from etherdiff.use.generate import run_source

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("another_process")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that met no fault; read it only."""
    return train_dreambooth(small_config(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture
def copy(whole, tmp_path):
    """The finished run, to be harmed."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


@pytest.fixture
def stopped(copy):
    """The run as it was when it had just written step 4."""
    shutil.rmtree(copy / "adapter")
    (copy / "adapter.sha256.json").unlink()
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    return copy


class Told:
    """What a block tells the user, as one line."""

    def __enter__(self) -> "Told":
        self.capture = console.capture()
        self.capture.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.capture.__exit__(None, None, None)
        self.text = " ".join(self.capture.get().split())


def after_step(monkeypatch, step: int, action) -> None:
    """Have something happen once a step has been made and before it is recorded."""
    on_step = recorder_module.Recorder.on_step

    def disturbed(self, state, loss):
        if state.step == step:
            action()
        on_step(self, state, loss)

    monkeypatch.setattr(recorder_module.Recorder, "on_step", disturbed)


# --- The disk ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_full_while_a_checkpoint_is_saved(whole, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with monkeypatch.context() as patch:
            after_step(patch, 4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1])))
            with pytest.raises(RunError, match=r"File too large.*make room.*etherdiff resume"):
                train_dreambooth(small_config(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(tmp_path / "run") == [2]
    assert not leftovers(tmp_path / "run")
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(whole)


@pytest.mark.parametrize("command", ["generate --prompt ball --steps 2 --run", "merge", "export --format lora"])
def test_a_disk_that_is_full_while_a_result_is_written(command, whole, tmp_path, monkeypatch, capsys):
    output = tmp_path / ("out.safetensors" if command.startswith("export") else "out")
    monkeypatch.setattr(sys, "argv", ["etherdiff", *command.split(), str(whole), "--output", str(output)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, limits[1]))
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert end.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*: File too large\. Make room there.*start the command again", last)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not leftovers(tmp_path)


def can_mount() -> bool:
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.slow
def test_a_small_file_system_that_fills_up(tmp_path):
    if not shutil.which("unshare") or not can_mount():
        pytest.skip("only root may mount a small file system")
    config, small = small_config(tmp_path / "run", steps=60, checkpoint_every=1), tmp_path / "small"
    small.mkdir()
    train = f"{sys.executable} -m etherdiff train-dreambooth --config {as_recipe(config)} --output"
    resume_ = f"{sys.executable} -m etherdiff resume {small}/run"
    script = f"""
        mount -t tmpfs -o size=5m tmpfs {small} || exit 99
        cd {tmp_path}
        {train} {small}/run 2> said; echo $? > status
        ls -A {small}/run {small}/run/checkpoints > left
        mount -o remount,size=200m {small}
        {resume_} 2> resumed; echo $? >> status
        cp -r {small}/run kept
        mount -o remount,ro {small}
        {resume_} 2> readonly; echo $? >> status
        {train} {small}/new 2>> readonly; echo $? >> status
    """
    subprocess.run(["unshare", "-m", "sh", "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    assert (tmp_path / "status").read_text().split() == ["1", "0", "2", "2"], (tmp_path / "said").read_text()
    assert "No space left on device" in (tmp_path / "said").read_text()
    assert "Traceback" not in (tmp_path / "said").read_text() + (tmp_path / "readonly").read_text()
    assert ".partial" not in (tmp_path / "left").read_text()
    assert "resuming at step" in (tmp_path / "resumed").read_text()
    assert (tmp_path / "readonly").read_text().lower().count("read-only") == 2
    assert results(tmp_path / "kept") == results(train_dreambooth(config))


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a file system where not even root may write")
def test_an_output_where_nothing_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "load_base", None)  # nothing expensive is started
    small_config(tmp_path / "run")
    config = small_config(tmp_path / "run").model_copy(update={"output": Path("/sys/kernel/etherdiff-run")})
    with pytest.raises(UserError, match=r"output: /sys/kernel.*(cannot be written|read-only)"):
        train_dreambooth(config)


@pytest.mark.parametrize("place", ["file", "file/deeper/run", "x" * 300, "x" * 5000])
def test_outputs_that_no_folder_can_have(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is a file|too long"):
        train_dreambooth(small_config(tmp_path / "run").model_copy(update={"output": tmp_path / place}))


# --- Files -------------------------------------------------------------------------------------------------------------

HARM = {
    "bit": lambda path: flip_a_bit(path, 0.6),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "base.json"])
def test_a_damaged_adapter_is_refused_where_it_is_loaded_and_resume_mends_it(name, harm, whole, copy):
    HARM[harm](copy / "adapter" / name)
    with pytest.raises(UserError, match=rf"damaged or changed.*{name}.*etherdiff resume"):
        run_source(copy)
    if harm == "bit":
        resume(copy)
        assert results(copy) == results(whole)
        assert run_source(copy).adapters == [copy / "adapter"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"../../etc/passwd": "x"}', b'{"a\\u0000b": "x"}', b'{"/etc/passwd": 1}']
)
def test_a_record_of_the_adapter_that_is_damaged_itself(content, copy):
    (copy / "adapter.sha256.json").write_bytes(content)
    with pytest.raises(UserError, match="damaged or changed"):
        run_source(copy)


def test_an_adapter_of_a_run_that_recorded_nothing_is_taken(copy):
    (copy / "adapter.sha256.json").unlink()
    assert run_source(copy).adapters == [copy / "adapter"]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *(("run.yaml", harm) for harm in HARM),
        *(("metrics.jsonl", harm) for harm in ("bit", "gone")),
        ("cost.json", "truncated"),
        *(("checkpoints/step-000004/optimizer.safetensors", harm) for harm in ("bit", "truncated")),
    ],
)
def test_whatever_is_damaged_the_run_goes_on_to_the_same_bytes(name, harm, whole, stopped):
    HARM[harm](stopped / name)
    with Told() as told:
        resume(stopped)
    assert results(stopped) == results(whole)
    if name == "run.yaml":
        assert "put back from step-000004" in told.text
    if name.startswith("checkpoints"):
        assert "passed over checkpoint step-000004: " in told.text
        assert "resuming at step 2" in told.text


def test_settings_that_are_damaged_before_the_first_checkpoint_are_not_believed(stopped):
    shutil.rmtree(stopped / "checkpoints")
    text = (stopped / "run.yaml").read_text()
    (stopped / "run.yaml").write_text(text.replace("learning_rate: 0.006", "learning_rate: 0.004"))
    with pytest.raises(UserError, match="not what the run wrote"):
        resume(stopped)


def test_what_killed_processes_left_aside_is_cleared(whole, stopped):
    folder = stopped / "checkpoints"
    unfinished = temporary_path(folder / "step-000006")
    unfinished.mkdir()
    (unfinished / "state.json").write_text("{")
    temporary_path(stopped / "run.yaml").write_text("steps:")
    shutil.copytree(folder / "step-000002", temporary_path(folder / "step-000002", "old"))
    (folder / "step-000004").rename(temporary_path(folder / "step-000004", "old"))  # killed between the two renames
    (stopped / ".mine").write_text("a file that we did not make")
    with Told() as told:
        resume(stopped)
    assert "resuming at step 4" in told.text
    assert results(stopped) == results(whole)
    assert [path.name for path in leftovers(stopped)] == [".mine"]


def test_a_folder_that_is_exchanged_comes_back(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("")

    class Killed(BaseException):
        pass

    rename, calls = Path.rename, []

    def dies_at_the_second(self, target):
        calls.append(target)
        if len(calls) == 2:
            raise Killed
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", dies_at_the_second)
        with pytest.raises(Killed), staged_folder(tmp_path / "a") as staged:
            (staged / "new").write_text("")
    assert not (tmp_path / "a").exists()
    remove_temporary(tmp_path)
    assert not (tmp_path / "a").exists()  # this process lives, so the exchange may be under way
    remove_temporary(tmp_path, also_of_live_processes=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "old"]


def test_only_what_dead_processes_of_this_machine_left_is_cleared_from_a_cache(tmp_path):
    code = "import sys; from pathlib import Path; from etherdiff.system.files import temporary_path\n"
    code += "temporary_path(Path(sys.argv[1]) / 'x').touch()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    mine = temporary_path(tmp_path / "y")
    mine.touch()
    (left,) = set(leftovers(tmp_path)) - {mine}
    elsewhere = left.with_name(re.sub(r"\.[0-9a-f]{8}-", ".00000000-", left.name))
    shutil.copy(left, elsewhere)
    remove_temporary(tmp_path)
    assert set(leftovers(tmp_path)) == {mine, elsewhere}


@pytest.mark.parametrize("name", ["checkpoints", "samples", "run.yaml", "adapter/adapter_model.safetensors"])
def test_a_run_folder_with_links_that_lead_out_is_not_resumed(name, copy, tmp_path):
    """A run folder from elsewhere must not have us write, or delete, somewhere else."""
    path, outside = copy / name, tmp_path / "outside"
    if path.exists():
        path.rename(outside)
    path.symlink_to(outside)
    before = {item: item.stat().st_mtime_ns for item in [outside, *outside.rglob("*")]} if outside.exists() else {}
    with pytest.raises(UserError, match="leads outside the run folder"):
        resume(copy)
    assert before == ({item: item.stat().st_mtime_ns for item in [outside, *outside.rglob("*")]} if outside.exists() else {})


# --- Which checkpoints are kept ----------------------------------------------------------------------------------------


def test_only_the_newest_are_kept_and_best_is_never_touched(tmp_path, monkeypatch):
    run, keep = tmp_path / "run", 2

    def write_best():
        (run / "best").mkdir()
        (run / "best" / "adapter_model.safetensors").write_bytes(b"best")

    after_step(monkeypatch, 1, write_best)
    train_dreambooth(small_config(run, keep=keep))
    assert checkpoints(run) == [2, 4, 6][-keep:]
    resume(run, steps=10)
    assert checkpoints(run) == [2, 4, 6, 8, 10][-keep:]
    assert (run / "best" / "adapter_model.safetensors").read_bytes() == b"best"


def test_damaged_checkpoints_do_not_push_out_the_whole_ones(whole, copy):
    for step in (4, 6):
        HARM["bit"](copy / "checkpoints" / f"step-{step:06d}" / "state.json")
    provenance = run_module.reopen(copy)[0].provenance.content()
    config = run_module.reopen(copy)[1].model_copy(update={"keep": 1})
    run_module.write_settings(run_module.RunFolder(copy), "dreambooth", config, provenance)
    resume(copy)
    assert checkpoints(copy) == [6]
    assert results(copy) == results(whole)


# --- Numbers -----------------------------------------------------------------------------------------------------------


def poison(monkeypatch, step: int) -> None:
    """One image's noise is NaN at a step."""
    batches = StepBatches.batches

    def poisoned(self, at, *rest):
        made = batches(self, at, *rest)
        if at == step:
            made[-1]["noise"] = made[-1]["noise"].clone()
            made[-1]["noise"][0, 0, 0, 0] = float("nan")
        return made

    monkeypatch.setattr(StepBatches, "batches", poisoned)


def is_known_to_have_diverged(run: Path) -> bool:
    return isinstance(read := read_run(run, scored=True), LeftOut) and read.diverged and "NaN or infinite" in read.why


def test_nan_stops_the_run_with_the_last_good_state_kept(tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with pytest.raises(NotFiniteError, match=r"NaN or infinite at step 4.*lower --learning-rate.*resume .*--on-nan skip"):
        train_dreambooth(small_config(tmp_path / "run", keep=1))
    assert checkpoints(tmp_path / "run") == [2, 3]
    assert metrics(tmp_path / "run")[-1] == {"step": 4, "loss": None, "diverged": True}
    assert is_known_to_have_diverged(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "step-000003"
    for name in ("parameters", "optimizer", "ema"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(last / f"{name}.safetensors").values())
    resume(tmp_path / "run", on_nan="skip")
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if row["loss"] is None] == [4]
    assert len(rows) == STEPS
    assert not is_known_to_have_diverged(tmp_path / "run")


def test_nan_is_skipped_as_told_and_says_so(tmp_path, monkeypatch):
    poison(monkeypatch, 3)
    with Told() as told:
        run = train_dreambooth(small_config(tmp_path / "run", on_nan="skip", checkpoint_every=1))
    assert "step 4 was skipped" in told.text
    assert [row["loss"] is None for row in metrics(run)] == [False, False, False, True, False, False]
    before, after = (load_file(run / "checkpoints" / f"step-00000{step}" / "parameters.safetensors") for step in (3, 4))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(run / "adapter" / "adapter_model.safetensors").values())


def test_skipping_for_ever_is_no_way_on(tmp_path, monkeypatch):
    monkeypatch.setattr(loop_module, "MAX_SKIPPED_IN_A_ROW", 3)
    monkeypatch.setattr(loop_module, "isfinite", lambda _: False)
    with pytest.raises(NotFiniteError, match=r"for 3 steps.*skipping does not help"):
        train_dreambooth(small_config(tmp_path / "run", on_nan="skip"))
    assert is_known_to_have_diverged(tmp_path / "run")


@pytest.mark.parametrize("rate", [1e20, 1e30])
def test_a_rate_that_really_diverges(rate, tmp_path):
    config = small_config(tmp_path / "run", method="lora", learning_rate=rate, lr_schedule="constant", checkpoint_every=1)
    with pytest.raises(RunError, match=r"lower --learning-rate"):
        train_dreambooth(config)
    assert is_known_to_have_diverged(tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoints/*/parameters.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values())


def test_failures_of_a_run_have_status_1_and_no_traceback(monkeypatch, capsys):
    def fail(*_):
        raise NotFiniteError("the loss is NaN")

    monkeypatch.setattr("etherdiff.run.resume", fail)
    monkeypatch.setattr(sys, "argv", ["etherdiff", "resume", "x"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert (left.value.code, capsys.readouterr().err) == (1, "error: the loss is NaN\n")


# --- Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch's allocator", "numpy's", "CUDA"])
def test_out_of_memory_says_what_to_change(kind, tmp_path, monkeypatch):
    def too_much(*_):
        if kind == "CUDA":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return torch.empty(2**55) if kind == "torch's allocator" else bytearray(2**60)

    monkeypatch.setattr(DenoisingLoss, "forward", too_much)
    with pytest.raises(RunError) as caught:
        train_dreambooth(small_config(tmp_path / "run", batch_size=4))
    for part in (
        "out of memory",
        "--batch-size 1 --gradient-accumulation 8",
        "--gradient-checkpointing",
        "bf16",
        "--resolution",
    ):
        assert part in str(caught.value)


def test_out_of_memory_while_images_are_drawn(whole, tmp_path, monkeypatch, capsys):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.forward", too_much)
    command = ["etherdiff", "generate", "--run", str(whole), "--prompt", "ball", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        cli.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 1
    assert re.fullmatch(r"error: out of memory\..*a smaller --batch-size takes less", last)


@pytest.mark.slow
def test_out_of_memory_for_real(tmp_path):
    """The address space ends a little above what the program holds when training starts."""
    code = (
        "import resource, sys; from etherdiff import cli, run\n"
        "fit = run.fit\n"
        "def limited(*args):\n"
        "    held = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))\n"
        "    fit(*args)\n"
        "run.fit = limited\n"
        "cli.main()\n"
    )
    recipe = as_recipe(small_config(tmp_path / "run", batch_size=512, gradient_accumulation=1))
    command = [sys.executable, "-c", code, "train-dreambooth", "--config", str(recipe)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: out of memory. Start again with --batch-size 1 --gradient-accumulation 512" in done.stderr
    assert "Traceback" not in done.stderr


# --- What is only beside the run ---------------------------------------------------------------------------------------


def test_a_tracker_that_fails_does_not_stop_the_run(whole, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    add_scalar, calls = SummaryWriter.add_scalar, []

    def unreachable(self, *args, **more):
        calls.append(args)
        if len(calls) > 3:
            raise ConnectionError("the tracker's host is unreachable")
        return add_scalar(self, *args, **more)

    monkeypatch.setattr(SummaryWriter, "add_scalar", unreachable)
    with Told() as told:
        run = train_dreambooth(small_config(tmp_path / "run", tracker="tensorboard"))
    assert told.text.count("tensorboard failed (ConnectionError: the tracker's host is unreachable): training goes on") == 1
    assert len(calls) == 4  # it is not asked again
    assert results(run) == results(whole)


def test_a_tracker_that_cannot_even_start(whole, stopped):
    opened, config = run_module.reopen(stopped)
    run, provenance = opened.folder, opened.provenance.content()
    run_module.write_settings(run, "dreambooth", config.model_copy(update={"tracker": "tensorboard"}), provenance)
    (stopped / "logs").write_text("a file where the folder should be")
    with Told() as told:
        resume(stopped)
    assert "tensorboard failed" in told.text
    assert results(stopped) == results(whole)


def test_the_tracker_forgets_what_is_logged_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train_dreambooth(small_config(tmp_path / "run", tracker="tensorboard"))
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    time.sleep(1.1)  # event files are named after the second
    resume(run)
    (folder,) = {path.parent for path in run.rglob("events.out.tfevents*")}
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("fault", ["the pipeline", "the disk", "the base's own"])
def test_sample_images_that_fail_do_not_stop_the_run(fault, whole, tmp_path, monkeypatch):
    run, sample, calls = tmp_path / "run", task_module.sample, []

    def failing(*args, **more):
        calls.append(args)
        if fault == "the base's own" or (fault == "the pipeline" and len(calls) == 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "the disk" and len(calls) == 2:
            shutil.rmtree(run / "samples")
            (run / "samples").write_text("a file where the folder should be")
        return sample(*args, **more)

    monkeypatch.setattr(task_module, "sample", failing)
    with Told() as told:
        train_dreambooth(small_config(run, sample_every=3, sample_count=1))
    assert "sample images" in told.text
    assert "failed" in told.text
    assert "training goes on" in told.text
    assert (run / "samples" / "step-000006.png").exists() == (fault == "the pipeline")
    assert results(run) == results(whole)


# --- Other processes ---------------------------------------------------------------------------------------------------

HOLD = "import sys, time; from pathlib import Path; from etherdiff.system.locks import run_lock\n" + (
    "with run_lock(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"
)


@pytest.fixture
def held(tmp_path):
    """A run folder that a process of its own holds."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_two_runs_into_one_folder(held, tmp_path, monkeypatch):
    load_base = run_module.load_base
    monkeypatch.setattr(run_module, "load_base", None)  # nothing expensive is started
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"in use by process {held.pid} on"):
            train_dreambooth(small_config(tmp_path / "run", overwrite=overwrite))
    (tmp_path / "run" / "run.yaml").write_text("steps: 1")
    with pytest.raises(UserError, match=rf"in use by process {held.pid} on"):
        resume(tmp_path / "run")
    (tmp_path / "run" / "run.yaml").unlink()
    held.kill()
    held.wait()
    assert (tmp_path / "run" / LOCK).exists()  # nobody cleaned up, and it does not matter
    monkeypatch.setattr(run_module, "load_base", load_base)
    run = train_dreambooth(small_config(tmp_path / "run", steps=1))
    assert not leftovers(run)


def test_the_lock_is_let_go_whatever_happens(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with suppress(error), run_lock(tmp_path / "run"):
            assert (tmp_path / "run" / LOCK).exists()
            raise error
        assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    with run_lock(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()  # it was there before


def test_many_that_want_one_folder_have_it_one_at_a_time(tmp_path):
    inside, most, times = [], [], []

    def want():
        for _ in range(150):
            with suppress(UserError), run_lock(tmp_path / "run"):
                inside.append(1)
                most.append(len(inside))
                times.append(1)
                inside.pop()

    (tmp_path / "run").mkdir()
    workers = [threading.Thread(target=want) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert max(most) == 1
    assert len(times) > 10


def test_overwriting_leaves_nothing_of_the_old_run_and_keeps_the_lock(copy, monkeypatch):
    (copy / "link").symlink_to(copy.parent)
    seen = []
    after_step(monkeypatch, 1, lambda: seen.append((copy / LOCK).exists()))
    train_dreambooth(small_config(copy, steps=1, overwrite=True))
    assert seen == [True]
    assert not (copy / "link").is_symlink()
    assert checkpoints(copy) == [1]
    assert (copy.parent / "ball").is_dir()


def test_a_run_of_several_processes_goes_on_with_as_many(copy, monkeypatch):
    opened, config = run_module.reopen(copy)
    run, provenance = opened.folder, opened.provenance.content()
    run_module.write_settings(run, "dreambooth", config, provenance | {"processes": 2})
    with pytest.raises(UserError, match=r"begun by 2 processes.*torchrun --nproc-per-node 2 -m etherdiff resume"):
        resume(copy)
    became = []
    monkeypatch.setattr(os, "execv", lambda program, arguments: became.append(arguments) or sys.exit(0))
    monkeypatch.setattr(sys, "argv", ["etherdiff", "resume", str(copy)])
    with pytest.raises(SystemExit):
        cli.main()
    assert became[0][1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "etherdiff", "resume", str(copy))
    ]


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory):
    """A run of two processes that was never interrupted, long enough to be killed."""
    config = small_config(tmp_path_factory.mktemp("two") / "run", steps=60)
    status, said = finish(start("train-dreambooth", "--config", as_recipe(config), processes=2))
    assert status == 0, said
    return config.output


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["one worker", "all of them, twice"])
def test_two_processes_of_which_some_die(victim, whole_of_two, tmp_path):
    """There are no data loading workers here, since batches are computed in the process: a worker is a rank."""
    config = small_config(tmp_path / "run", steps=60)
    arguments = ["train-dreambooth", "--config", as_recipe(config)]
    for step in (6,) if victim == "one worker" else (6, 20):
        launcher = start(*arguments, processes=2, start_new_session=True)
        wait_for(tmp_path / "run" / "checkpoints" / f"step-{step:06d}", launcher)
        workers = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
        assert len(workers) == 2
        if victim == "one worker":
            os.kill(workers[1], signal.SIGKILL)
            assert finish(launcher)[0] != 0
        else:
            for pid in (launcher.pid, *workers):
                os.kill(pid, signal.SIGKILL)
            launcher.wait()
            launcher.stderr.close()
        arguments = ["resume", tmp_path / "run"]
    status, said = finish(start("resume", tmp_path / "run"))  # it knows that it takes two
    assert status == 0, said
    assert results(tmp_path / "run") == results(whole_of_two)
    assert json.loads((tmp_path / "run" / "cost.json").read_text())["processes"] == 2
    assert not leftovers(tmp_path / "run")


# --- Clocks, threads, versions -----------------------------------------------------------------------------------------


def test_a_clock_that_jumps(whole, tmp_path, monkeypatch):
    jumps, now = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: now() + jumps.choice([-1e9, 0, 3600, 1e9]))
    began = time.monotonic()
    run = train_dreambooth(small_config(tmp_path / "run", tracker="tensorboard"))
    assert results(run) == results(whole)
    seconds = json.loads((run / "cost.json").read_text())["seconds"]
    assert all(value >= 0 for value in seconds.values())
    assert 0 < sum(seconds.values()) < time.monotonic() - began


def test_no_duration_is_taken_from_the_clock_on_the_wall():
    for path in Path(etherdiff.__file__).parent.rglob("*.py"):
        called = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not called & {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "datetime.utcnow"}, path


def test_a_run_goes_on_with_its_own_number_of_threads(copy, whole):
    recorded = torch.get_num_threads()
    shutil.rmtree(copy / "checkpoints" / "step-000006")
    try:
        torch.set_num_threads(recorded + 1)
        with Told() as told:
            resume(copy)
        assert torch.get_num_threads() == recorded
    finally:
        torch.set_num_threads(recorded)
    assert f"computing with {recorded} threads" in told.text
    assert results(copy) == results(whole)
    assert f"threads: {recorded}\n" in (copy / "checkpoints" / "step-000004" / "run.yaml").read_text()


def test_other_images_are_not_taken_for_those_it_began_with(copy):
    (copy.parent / "ball").mkdir(exist_ok=True)
    opened, config = run_module.reopen(copy)
    run, provenance = opened.folder, opened.provenance.content()
    shutil.copytree(config.subject, copy.parent / "ball", dirs_exist_ok=True)
    (copy.parent / "ball" / "00.png").unlink()
    config = config.model_copy(update={"subject": str(copy.parent / "ball")})
    run_module.write_settings(run, "dreambooth", config, provenance)
    with pytest.raises(UserError, match="other images than"):
        resume(copy)


def test_another_version_of_what_computes_is_warned_of(copy):
    opened, config = run_module.reopen(copy)
    run, provenance = opened.folder, opened.provenance.content()
    versions = provenance["versions"] | {"torch": "1.0"}
    run_module.write_settings(run, "dreambooth", config, provenance | {"versions": versions})
    with Told() as told:
        resume(copy)
    assert "warning: this run began with torch 1.0 (now " in told.text
    assert run_module.reopen(copy)[0].provenance.content()["versions"]["torch"] == "1.0"  # what it began with stays on record
