"""Where units are done: one after another here, or as tasks of Ray."""

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from etherdiff.sweeps.execute import Orders, Outcome, do_unit
from etherdiff.sweeps.runs import Unit


class Backend(Protocol):
    """Made with the units to do, which it has begun with."""

    def wait(self, seconds: float) -> list[Outcome]:
        """What was done since the last call, as soon as there is something, after `seconds` at the latest."""

    def is_busy(self) -> bool:
        """Whether outcomes are still to come."""

    def stop(self) -> None:
        """Have every run save and end; returns when all have. To be called at the end in any case."""


class Here:
    """One after another, in a thread of this process, so that the main one can draw the table and hear signals."""

    def __init__(self, units: Sequence[Unit], orders: Orders) -> None:
        self.stopping = threading.Event()
        self.pool = ThreadPoolExecutor(1)
        self.waiting: set[Future[list[Outcome]]] = {
            self.pool.submit(do_unit, unit, orders, self.stopping.is_set) for unit in units
        }

    def wait(self, seconds: float) -> list[Outcome]:
        done, self.waiting = wait(self.waiting, seconds, FIRST_COMPLETED)
        return [outcome for future in done for outcome in future.result()]

    def is_busy(self) -> bool:
        return bool(self.waiting)

    def stop(self) -> None:
        self.stopping.set()
        self.pool.shutdown(cancel_futures=True)
