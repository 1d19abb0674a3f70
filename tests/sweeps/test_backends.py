"""Ray: the same runs as one after another, and a node that is lost while a run is on it."""

import signal
import threading
from collections import Counter

import pytest
from sweeps.sweep_files import events, options, run_sweep, start, wait_until, write_file

from etherdiff.sweeps.runs import read_state
from etherdiff.sweeps.sweep import plan_sweep
from etherdiff.system.errors import UserError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")
MEMORY = 100 * 2**20


def counts(cache) -> Counter:
    return Counter(line.rsplit(" ", 1)[0] for line in events(cache))


def test_the_same_runs_as_one_after_another(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml", grid={"identifier": ["sks", "unlucky"]})
    handler = signal.getsignal(signal.SIGTERM)
    run_sweep(file, options(tmp_path / "ray", jobs=None))
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is handler
    run_sweep(file, options(tmp_path / "here"))
    assert set(counts(cache).values()) == {2}  # once there, once here
    for folder in ("runs", "recipes", "states"):
        there, here = ([path.name for path in sorted((tmp_path / place / folder).iterdir())] for place in ("ray", "here"))
        assert there == here
    states = [path.read_text() for path in (tmp_path / "ray/states").iterdir()]
    assert all('"status": "done"' in text and " node " in text for text in states)


@pytest.mark.slow
def test_more_than_any_node_has_is_a_mistake(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml", resources={"cpus": 1000, "gpus": 0.5})
    with pytest.raises(UserError, match=r"resources: a run is to have 1000 CPUs and 0\.5 GPUs, but the nodes have at most"):
        run_sweep(file, options(tmp_path / "out", jobs=None))
    assert not ray.is_initialized()


def test_no_cluster_answers(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml")
    with pytest.raises(UserError, match=r"address: 127\.0\.0\.1:1 is not a Ray cluster that answers"):
        run_sweep(file, options(tmp_path / "out", address="127.0.0.1:1"))


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, cache):
    file = write_file(tmp_path / "mine.yaml", settings={"identifier": "slow", "steps": 40}, grid={"seed": [0, 1, 2]})
    process = start(file, tmp_path / "out", "--jobs", "2")
    wait_until(lambda: len(list((tmp_path / "out").glob("runs/*/checkpoints/step"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped: 0 of 3 runs are finished" in said
    assert not events(cache)
    assert not list((tmp_path / "out").glob("runs/*/.lock"))  # nobody works on
    run_sweep(
        write_file(file, settings={"identifier": "slow", "steps": 40}, grid={"seed": [0, 1, 2]}), options(tmp_path / "out")
    )
    assert len(counts(cache)) == 6
    assert set(counts(cache).values()) == {1}
    assert sum("resuming at step" in path.read_text() for path in (tmp_path / "out/logs").iterdir()) == 2


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_when_its_node_is_lost(tmp_path, cache):
    """Ray's own cluster of several nodes on this machine; one of them is killed."""
    from ray.cluster_utils import Cluster

    file = write_file(tmp_path / "mine.yaml", settings={"identifier": "slow", "steps": 60}, grid={"seed": [0, 1]})
    told = options(tmp_path / "out")
    first, second = (run for unit in plan_sweep(file, told).units for run in unit.runs)
    cluster = Cluster(True, head_node_args={"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=MEMORY) for _ in range(2)]

        def lose_a_node() -> None:
            wait_until(lambda: all(_saved(run) >= 3 for run in (first, second)))
            place = read_state(first)["place"].split()[-1]
            (lost,) = [node for node in nodes if node.node_id.startswith(place)]
            cluster.remove_node(lost, allow_graceful=False)

        killer = threading.Thread(target=lose_a_node, daemon=True)
        killer.start()
        run_sweep(file, options(tmp_path / "out", address=cluster.address, jobs=None))
        killer.join(60)
    finally:
        cluster.shutdown()
    assert counts(cache) == {f"{what} {run.name}": 1 for what in ("trained", "scored") for run in (first, second)}
    places = [line.split(":")[0] for line in first.log.read_text().splitlines() if line.startswith("---")]
    assert len(set(places)) == 2
    assert "resuming at step" in first.log.read_text()
    assert "resuming at step" not in second.log.read_text()


def _saved(run) -> int:
    path = run.folder / "checkpoints/step"
    return int(path.read_text()) if path.exists() else 0
