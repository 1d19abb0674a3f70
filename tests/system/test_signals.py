"""Signals: a run finishes its step, saves, and leaves with the status that the contract names."""

import signal
import subprocess
import sys
import time

import pytest
from small_runs import STEPS, as_recipe, checkpoints, finish, leftovers, metrics, results, small_config, start, wait_for

from etherdiff import cli
from etherdiff.run import resume, train_dreambooth
from etherdiff.system import signals
from etherdiff.system.errors import Stopped
from etherdiff.tasks import task as task_module
from etherdiff.train.batches import StepBatches

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("another_process")]
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never interrupted; read it only."""
    return train_dreambooth(small_config(tmp_path_factory.mktemp("whole") / "run"))


# --- The handlers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_stops_at_once_where_nothing_has_to_be_finished(number):
    with signals.stop_signals(), pytest.raises(Stopped) as stopped:
        signal.raise_signal(number)
    assert stopped.value.number == number


@pytest.mark.parametrize("number", STATUS)
def test_a_signal_waits_where_something_has_to_be_finished(number):
    with signals.stop_signals(), signals.deferred():
        assert signals.received() is None
        signal.raise_signal(number)
        assert signals.received() == number
        signal.raise_signal(signal.SIGTERM)  # and the first one counts
        assert signals.received() == number


def test_a_part_of_what_waits_can_be_cut_short():
    with signals.stop_signals(), signals.deferred():
        with pytest.raises(Stopped), signals.at_once():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped), signals.at_once():
            pytest.fail("a signal that came before stops it too")
        assert signals.received() == signal.SIGTERM


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STATUS]
    with pytest.raises(Stopped), signals.stop_signals():
        signal.raise_signal(signal.SIGUSR1)
    assert [signal.getsignal(number) for number in STATUS] == before
    assert signals.received() is None


def test_a_failure_is_not_mistaken_for_a_stop():
    assert not issubclass(Stopped, Exception)  # or the libraries' `except Exception` would swallow it


@pytest.mark.parametrize("number", STATUS)
def test_a_sigint_after_any_signal_exits_at_once(number):
    code = (
        "import sys, time\nfrom etherdiff.system import signals\nwith signals.stop_signals(), signals.deferred():\n"
        "    print('ready', flush=True)\n    while True: time.sleep(0.01)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    for again in (number, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(again)
        time.sleep(0.2)
        assert process.poll() is None  # it is deferred
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    process.stdout.close()


@pytest.mark.parametrize(("number", "status"), STATUS.items())
def test_the_programs_status_is_the_signals(number, status, monkeypatch, capsys):
    monkeypatch.setattr("etherdiff.run.resume", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr(sys, "argv", ["etherdiff", "resume", "x"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == status
    assert capsys.readouterr().err == "stopped\n"


# --- A run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def signal_in_step(monkeypatch):
    """Have a signal arrive while a step is computed."""

    def arrange(number, step):
        batches = StepBatches.batches

        def interrupted(self, at, *rest):
            if at == step:
                signal.raise_signal(number)
            return batches(self, at, *rest)

        monkeypatch.setattr(StepBatches, "batches", interrupted)

    return arrange


@pytest.mark.parametrize("number", STATUS)
def test_the_step_is_finished_and_saved_and_the_run_goes_on_to_the_same_bytes(number, whole, tmp_path, signal_in_step):
    signal_in_step(number, 2)  # steps count from 0: the third
    with signals.stop_signals(), pytest.raises(Stopped, match=r"at step 3; go on with: etherdiff resume") as stopped:
        train_dreambooth(small_config(tmp_path / "run"))
    assert stopped.value.number == number
    run = tmp_path / "run"
    assert checkpoints(run) == [2, 3]
    assert len(metrics(run)) == 3
    assert not (run / "adapter").exists()
    assert not leftovers(run)
    assert resume(run) == run
    assert results(run) == results(whole)


def test_stopped_twice(whole, tmp_path, signal_in_step):
    actions = [lambda: train_dreambooth(small_config(tmp_path / "run")), lambda: resume(tmp_path / "run")]
    for first_step, action in zip((1, 4), actions, strict=True):
        signal_in_step(signal.SIGTERM, first_step)
        with signals.stop_signals(), pytest.raises(Stopped):
            action()
    resume(tmp_path / "run")
    assert results(tmp_path / "run") == results(whole)


def test_a_signal_in_the_last_step_lets_the_run_end(whole, tmp_path, signal_in_step):
    signal_in_step(signal.SIGTERM, STEPS - 1)
    with signals.stop_signals():
        train_dreambooth(small_config(tmp_path / "run"))
    assert results(tmp_path / "run") == results(whole)


def test_sample_images_are_cut_short_and_drawn_when_the_run_goes_on(whole, tmp_path, monkeypatch):
    sample, calls = task_module.sample, []

    def interrupted(*args, **more):
        calls.append(args)
        if len(calls) == 2:  # the first draws the base's
            signal.raise_signal(signal.SIGTERM)
        return sample(*args, **more)

    monkeypatch.setattr(task_module, "sample", interrupted)
    options = {"sample_every": 3, "sample_count": 1}
    with signals.stop_signals(), pytest.raises(Stopped, match="step 3"):
        train_dreambooth(small_config(tmp_path / "run", **options))
    sheets = tmp_path / "run" / "samples"
    assert checkpoints(tmp_path / "run") == [2, 3]
    assert not list(sheets.glob("step-*"))
    resume(tmp_path / "run")
    assert sorted(path.name for path in sheets.glob("*.png")) == ["step-000003.png", "step-000006.png"]
    assert results(tmp_path / "run") == results(whole)


def stop_real_run(tmp_path, number, processes=1):
    """Start a run of the program that would take hours, stop it after some steps; status, what it said, seconds to stop."""
    config = small_config(tmp_path / "run", steps=100_000, checkpoint_every=5)
    process = start("train-dreambooth", "--config", as_recipe(config), processes=processes)
    wait_for(tmp_path / "run" / "checkpoints" / "step-000005", process)
    began = time.monotonic()
    process.send_signal(number)
    status, said = finish(process)
    return status, said, time.monotonic() - began


def check_stopped_run(run):
    last = len(metrics(run))
    assert checkpoints(run)[-1] == last
    assert [row["step"] for row in metrics(run)] == list(range(1, last + 1))
    assert not leftovers(run)


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(n, s, marks=[] if n == signal.SIGTERM else [pytest.mark.slow]) for n, s in STATUS.items()],
)
def test_the_program_stops_within_seconds(number, status, tmp_path):
    left, said, seconds = stop_real_run(tmp_path, number)
    assert left == status, said
    assert seconds < 20  # a few on a machine that does nothing else
    assert "etherdiff resume" in said
    assert "Traceback" not in said
    check_stopped_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.05, 0.5, 1.5, 3.0])
def test_the_program_can_be_stopped_while_it_starts(delay, tmp_path):
    process = start("train-dreambooth", "--config", as_recipe(small_config(tmp_path / "run", steps=100_000)))
    time.sleep(delay)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status in (143, -signal.SIGTERM), said  # the latter before Python has come to our first line
    assert not leftovers(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_under_torchrun_the_workers_save(number, tmp_path):
    status, said, _ = stop_real_run(tmp_path, number, processes=2)
    assert status != 0
    check_stopped_run(tmp_path / "run")
    assert said.count("stopped at step") == 1
