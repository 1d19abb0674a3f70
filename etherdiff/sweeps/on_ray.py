"""Units as tasks of Ray: on this machine with nothing to set up, or on the nodes of a cluster that share a file system."""

import os
import signal
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from etherdiff.sweeps.execute import PATIENCE, Orders, Outcome, do_unit
from etherdiff.sweeps.runs import Unit
from etherdiff.system.errors import UserError
from etherdiff.system.signals import STOPPING

LOST_NODES = 5
"""How often a unit whose node or worker is lost is begun again elsewhere, from its checkpoint."""
OBJECT_STORE = 100 * 2**20
"""Bytes of shared memory: only commands and outcomes go through it."""

ANSWER = 10.0
"""Seconds for a cluster's address to answer."""


class OnRay:
    """As many units at a time as their CPUs and GPUs allow, at most `jobs`."""

    def __init__(self, units: Sequence[Unit], orders: Orders, address: str | None, jobs: int | None) -> None:
        import ray

        self.ray, self.orders, self.jobs = ray, orders, jobs or len(units)
        self.task = ray.remote(max_retries=LOST_NODES)(_do_there)
        self.waiting, self.running = deque(units), dict[Any, Unit]()
        with _own_signals():
            _connect(ray, address)
        if problem := _lack(ray.nodes(), units):
            ray.shutdown()
            raise UserError(problem)
        self._submit()

    def _submit(self) -> None:
        while self.waiting and len(self.running) < self.jobs:
            unit = self.waiting.popleft()
            task = self.task.options(name=unit.name, num_cpus=unit.threads, num_gpus=unit.gpus)
            self.running[task.remote(unit, self.orders)] = unit

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
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=PATIENCE)
        self.ray.shutdown()


def _do_there(unit: Unit, orders: Orders) -> list[Outcome]:
    """In a worker of Ray."""
    import ray

    return do_unit(unit, orders, place=f"node {ray.get_runtime_context().get_node_id()[:12]}")


def _connect(ray: Any, address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody unless the user wants it
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        ray.init("local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
        return
    try:
        _knock(address)
        ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"address: {address} is not a Ray cluster that answers ({error})") from error


def _knock(address: str) -> None:
    """OSError or ValueError where nobody is at HOST:PORT: Ray itself would try for ever."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER).close()


def _lack(nodes: Sequence[dict[str, Any]], units: Sequence[Unit]) -> str | None:
    """Why no node could ever take a unit."""
    cpus, gpus = max(unit.threads for unit in units), max(unit.gpus for unit in units)
    there = [node["Resources"] for node in nodes if node["Alive"]]
    if any(one.get("CPU", 0) >= cpus and one.get("GPU", 0) >= gpus for one in there):
        return None
    had = "; ".join(sorted({f"{one.get('CPU', 0):g} CPUs and {one.get('GPU', 0):g} GPUs" for one in there}))
    return f"resources: a run is to have {cpus} CPUs and {gpus:g} GPUs, but the nodes have at most {had}"


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts handlers of its own in place, which would end the program without a word."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
