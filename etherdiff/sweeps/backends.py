"""Where units run: one after another in this process, or as tasks of Ray on this machine or a cluster."""

import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Protocol

from etherdiff.sweeps.execute import STOP_TIMEOUT, Outcome, RunSettings, run_unit
from etherdiff.sweeps.runs import Unit
from etherdiff.system.errors import UserError
from etherdiff.system.signals import STOPPING

MAX_LOST_NODES = 5
"""Times that a unit whose node or worker is lost is started again elsewhere, from its checkpoint."""
OBJECT_STORE = 100 * 2**20
"""Shared memory of Ray in bytes: only commands and outcomes go through it."""
CONNECT_TIMEOUT = 10.0
"""Seconds for a cluster's address to answer."""


class Backend(Protocol):
    """Runs the units that it was made with; it has started them already."""

    def wait(self, seconds: float) -> list[Outcome]:
        """Return the outcomes since the last call, as soon as there is one, after `seconds` at the latest."""

    def is_busy(self) -> bool:
        """Return whether outcomes are still to come."""

    def stop(self) -> None:
        """Have every run save and end, and return when all have. Call it at the end in any case."""


class LocalBackend:
    """Runs units one after another, in a thread, so that the main thread can draw the table and receive signals."""

    def __init__(self, units: Sequence[Unit], settings: RunSettings) -> None:
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(1)
        self.waiting: set[Future[list[Outcome]]] = {
            self.pool.submit(run_unit, unit, settings, self.stopping.is_set) for unit in units
        }

    def wait(self, seconds: float) -> list[Outcome]:
        done, self.waiting = wait(self.waiting, seconds, FIRST_COMPLETED)
        return [outcome for future in done for outcome in future.result()]

    def is_busy(self) -> bool:
        return bool(self.waiting)

    def stop(self) -> None:
        self.stopping.set()
        self.pool.shutdown(cancel_futures=True)


class RayBackend:
    """Runs as many units at a time as their CPUs and GPUs allow, at most `jobs`. A cluster's nodes share a file system."""

    def __init__(self, units: Sequence[Unit], settings: RunSettings, address: str | None, jobs: int | None) -> None:
        import ray

        self.ray, self.settings, self.jobs = ray, settings, jobs or len(units)
        self.task = ray.remote(max_retries=MAX_LOST_NODES)(_run_on_node)
        self.waiting, self.running = deque(units), dict[Any, Unit]()
        with _own_signals():
            _connect(ray, address)
        if problem := unmet_resources(ray.nodes(), units):
            ray.shutdown()
            raise UserError(problem)
        self._submit()

    def _submit(self) -> None:
        while self.waiting and len(self.running) < self.jobs:
            unit = self.waiting.popleft()
            task = self.task.options(name=unit.name, num_cpus=unit.threads, num_gpus=unit.gpus)
            self.running[task.remote(unit, self.settings)] = unit

    def wait(self, seconds: float) -> list[Outcome]:
        done, _ = self.ray.wait(list(self.running), num_returns=1, timeout=seconds)
        outcomes = [outcome for reference in done for outcome in self._outcomes(reference, self.running.pop(reference))]
        self._submit()
        return outcomes

    def _outcomes(self, reference: Any, unit: Unit) -> list[Outcome]:
        try:
            return list(self.ray.get(reference))
        except self.ray.exceptions.RayError as error:
            return [Outcome(run.name, f"Ray: {error}") for run in unit.runs]

    def is_busy(self) -> bool:
        return bool(self.running)

    def stop(self) -> None:
        if not self.ray.is_initialized():
            return
        for reference in self.running:
            self.ray.cancel(reference)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=STOP_TIMEOUT)
        self.ray.shutdown()


def _run_on_node(unit: Unit, settings: RunSettings) -> list[Outcome]:
    """Run a unit in a worker of Ray."""
    import ray

    return run_unit(unit, settings, place=f"node {ray.get_runtime_context().get_node_id()[:12]}")


def _connect(ray: Any, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # report nothing to anybody unless the user wants it
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        return
    try:
        check_reachable(address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"address: {address} is not a Ray cluster that answers ({error})") from error


def check_reachable(address: str) -> None:
    """Raise OSError or ValueError if nothing answers at HOST:PORT: Ray itself would try forever."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT).close()


def unmet_resources(nodes: Sequence[dict[str, Any]], units: Sequence[Unit]) -> str | None:
    """Return why no node could ever run a unit; None if one could."""
    cpus, gpus = max(unit.threads for unit in units), max(unit.gpus for unit in units)
    available = [node["Resources"] for node in nodes if node["Alive"]]
    if any(one.get("CPU", 0) >= cpus and one.get("GPU", 0) >= gpus for one in available):
        return None
    most = "; ".join(sorted({f"{one.get('CPU', 0):g} CPUs and {one.get('GPU', 0):g} GPUs" for one in available}))
    return f"resources: a run is to have {cpus} CPUs and {gpus:g} GPUs, but the nodes have at most {most}"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep our signal handlers: Ray puts its own in place, which would end the program without a word."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
